// The page: the view of its task, a model to load, and one thing done at a time.

const version = new URL(import.meta.url).search;
const { $, megabytes, sum } = await import(`./dom.js${version}`);
const { readJson, single } = await import(`./source.js${version}`);
const { Choices } = await import(`./choices.js${version}`);
const { Session } = await import(`./session.js${version}`);
const { Attention } = await import(`./attention.js${version}`);
const { showAbout } = await import(`./about.js${version}`);
const { makeView } = await import(`./views.js${version}`);

const STOPPED = "Stopped."; // what a worker says that was told to
const PATIENCE = 5000; // milliseconds that a worker has to stop before it is ended

const [page, selftest] = await Promise.all([readJson("web/page.json"), readJson("selftest.json")]);
const choices = new Choices(page);
const session = new Session(page, selftest, choices, update);
const view = await makeView(page);
let busy = false;
let known = null; // what the view was told of the loaded model

view.attention = new Attention(session, attempt);
$("fields").innerHTML = view.fields;
$("options").innerHTML = view.settings;
$("settings").hidden = view.settings === "";
$("form").setAttribute("aria-label", view.verb);
view.start(page.examples);
showAbout(page);
await choices.offer();
update();
document.documentElement.dataset.ready = "";
registerServiceWorker();

$("form").onsubmit = (event) => {
  event.preventDefault();
  attempt(() => view.act(session));
};
$("more").onclick = () => attempt(() => view.act(session, view.more));
$("load").onclick = () => attempt(() => session.load());
$("unload").onclick = () => session.unload("Unloaded: its memory is free again.");
$("stop").onclick = stop;
$("fulltest").onclick = () => attempt(() => session.test({}));
for (const name of ["dtypes", "devices"]) {
  $(name).onchange = () => {
    choices.fit();
    session.unload("");
  };
}
addEventListener("pagehide", () => session.client?.end());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy) stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !busy) $("form").requestSubmit();
});

// Run one thing at a time. An error is shown; unless it is about the input, it has ended the worker: nothing else helps then.
async function attempt(action) {
  if (busy) return;
  busy = true;
  $("problem").hidden = true;
  $("result").setAttribute("aria-busy", "true");
  update();
  try {
    await action();
  } catch (error) {
    const wasThere = session.client !== null;
    if (!session.client || session.client.ended) session.unload("");
    if (session.loaded && error.message === STOPPED) {
      $("ending").textContent = STOPPED;
    } else if (wasThere || error.message !== "The model was unloaded.") {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
  } finally {
    busy = false;
    $("result").setAttribute("aria-busy", "false");
    update();
  }
}

// Ask for a stop at the next place where it can be; a worker that does not answer is ended.
function stop() {
  const asked = session.client;
  view.stop?.();
  session.stop();
  setTimeout(() => {
    if (busy && session.client === asked) session.unload("Stopped; the model had to be unloaded.");
  }, PATIENCE);
}

function update() {
  const { loaded, info } = session;
  if (loaded && info !== known) view.loaded(info);
  known = info;
  const size = megabytes(sum(choices.sizes()));
  const [model, runtime] = choices.sizes().map(megabytes);
  $("load").hidden = loaded;
  $("load").textContent = single ? "Load" : `Load ${size}`;
  $("parts").hidden = session.client !== null;
  $("parts").textContent = single
    ? `${model} model and tokenizer, ${runtime} runtime: all of it is in this file.`
    : `${model} model and tokenizer, ${runtime} runtime; fetched once, from this page's own address.`;
  $("unload").hidden = session.client === null;
  $("load").disabled = $("fulltest").disabled = $("run").disabled = $("more").disabled = busy;
  $("run").textContent = loaded || busy ? view.verb : `Load ${single ? "" : `${size} `}and ${view.verb.toLowerCase()}`;
  $("stop").disabled = !busy || !session.client;
  $("more").hidden = busy || !view.more;
}

// Keeps what was loaded for use without a connection, and adds the headers that threads need where a host does not send them.
async function registerServiceWorker() {
  if (single || !("serviceWorker" in navigator) || !isSecureContext) return;
  try {
    await navigator.serviceWorker.register(new URL(`../sw.js${version}`, import.meta.url));
    await navigator.serviceWorker.ready;
  } catch {
    return; // the page works without it
  }
  if (!crossOriginIsolated && !sessionStorage.getItem("isolated")) {
    sessionStorage.setItem("isolated", "tried");
    location.reload();
  }
}
