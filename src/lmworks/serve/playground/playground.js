// The playground: the views of the export's page over the models of a server.

const version = new URL(import.meta.url).search;
const { $, element } = await import(`./dom.js${version}`);
const { makeView } = await import(`./views.js${version}`);
const { Session, WantsKey, request, setKey } = await import(`./session.js${version}`);

const DOES = {
  "text-generation": "writes",
  "text-classification": "classifies",
  "token-classification": "finds entities",
  "question-answering": "answers questions",
  "fill-mask": "fills gaps",
  "feature-extraction": "searches by meaning",
};
const CONTEXT = "Ada Lovelace was born in London in 1815. She wrote the first program for a machine that was never finished.";
const EXAMPLES = {
  "text-generation": () => [{ text: "Once upon a time" }],
  "text-classification": () => [{ text: "A warm and clever film, a joy to watch." }, { text: "It was dull, and it never ended." }],
  "token-classification": () => [{ text: "Ada Lovelace lived in London and wrote to Charles Babbage." }],
  "question-answering": () => [{ question: "Where was Ada Lovelace born?", context: CONTEXT }],
  "fill-mask": (mask) => [{ text: `The capital of France is ${mask}.` }],
  "feature-extraction": () => [{ texts: ["A dog runs in the park.", "The bank raised its rates.", "A puppy plays outside.", "Where can a dog play?"] }],
};
const LONG = { long: "window" }; // said in the answer where it happens
const OPTIONS = { "token-classification": { ...LONG, aggregation: "first" }, "feature-extraction": { long: "truncate" } };
let view = null;
let session = null;
let busy = false;

$("locked").onsubmit = (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  open();
};
$("form").onsubmit = (event) => {
  event.preventDefault();
  attempt(() => view.act(session));
};
$("more").onclick = () => attempt(() => view.act(session, view.more));
$("stop").onclick = stop;
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy) stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !busy && session) $("form").requestSubmit();
});
await open();
document.documentElement.dataset.ready = "";

// Find out what is served. Without the right key ask for one.
async function open() {
  try {
    const info = await (await request("info")).json();
    const models = info.models.filter(({ task }) => task in DOES);
    for (const id of ["form", "aside"]) $(id).hidden = models.length === 0;
    $("locked").hidden = models.length > 0;
    if (models.length === 0) throw new Error("No model of this server reads texts.");
    $("model").replaceChildren(...models.map(({ name, task }) => element("option", `${name}: ${DOES[task]}`, { value: name })));
    $("model").onchange = () => attempt(async () => choose(await warm(models.find(({ name }) => name === $("model").value))));
    if (!$("key").value) showLinks(info); // a browser sends no key with a link
    await attempt(async () => choose(await warm(models[0])));
  } catch (error) {
    $("locked").hidden = false;
    $("wrong").textContent = error instanceof WantsKey ? "The server does not know this key." : error.message;
    $("wrong").hidden = error instanceof WantsKey && !$("key").value;
    $("key").focus();
  }
}

function showLinks({ page }) {
  $("links").append(element("a", "Every route of this server", { href: "../openapi.json" }));
  if (page) $("links").append(element("a", "Run the first model in this browser", { href: "../" }));
}

// A model that is loaded when it is first asked tells its labels and its length from then on.
async function warm(model) {
  if (model.state === "ready") return model;
  await request("tokenize", { inputs: "a", model: model.name });
  const { models } = await (await request("info")).json();
  return models.find(({ name }) => name === model.name);
}

async function choose(model) {
  session = new Session(model);
  const scores = model.problem_type === "regression" ? "none" : isMany(model) ? "sigmoid" : "softmax";
  const page = { options: { scores, ...(OPTIONS[model.task] ?? LONG) }, labels: model.labels, mask: model.mask, task: model.task };
  view = await makeView(page);
  for (const id of ["examples", "result"]) $(id).replaceChildren();
  for (const id of ["speed", "ending", "spoken"]) $(id).textContent = "";
  $("problem").hidden = true;
  delete document.documentElement.dataset.output;
  $("fields").innerHTML = view.fields;
  $("options").innerHTML = view.settings;
  if (model.task === "feature-extraction") $("options").querySelector('[value="window"]').remove(); // no route does that
  $("settings").hidden = view.settings === "";
  $("form").setAttribute("aria-label", view.verb);
  view.start(EXAMPLES[model.task](model.mask));
  const facts = { Does: model.task, Runs: `${model.runtime}, ${model.dtype}`, Reads: `${model.max_input_length} tokens` };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  document.documentElement.dataset.model = model.name;
  update();
}

function isMany({ labels, problem_type }) {
  return labels?.length === 1 || problem_type === "multi_label_classification";
}

async function attempt(action) {
  if (busy) return;
  busy = true;
  $("problem").hidden = true;
  $("result").setAttribute("aria-busy", "true");
  update();
  try {
    await action();
    if (session?.remark) $("ending").textContent = [session.remark, $("ending").textContent].join(" ").trim();
  } catch (error) {
    if (error.message === "Stopped.") $("ending").textContent = error.message;
    else {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
  } finally {
    busy = false;
    $("result").setAttribute("aria-busy", "false");
    update();
  }
}

function stop() {
  view?.stop?.();
  session?.stop();
}

function update() {
  if (!view) return;
  $("run").textContent = view.verb;
  $("run").disabled = $("more").disabled = $("model").disabled = busy;
  $("stop").disabled = !busy;
  $("more").hidden = busy || !view.more;
}
