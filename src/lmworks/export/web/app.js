// The page: one worker a loaded model, ended on a switch of precision or device, on any error and when the page is left.

const version = new URL(import.meta.url).search;
const { Client } = await import(`./client.js${version}`);
const { compare } = await import(`./engine.js${version}`);

const $ = (id) => document.getElementById(id);
const ABOUT = {
  fp32: "32-bit floats: the very answers of the trained model",
  int8: "8-bit integers: smaller, nearly the same answers",
  wasm: "WebAssembly, in every browser",
  webgpu: "WebGPU, on the graphics card",
};
const QUICK = { limit: 16, budget: 1500 }; // the self-test on load: tokens a prompt, milliseconds until the last prompt begins
const LARGE = 100e6; // bytes from which the smaller file is suggested first

const [page, selftest] = await Promise.all([readJson("web/page.json"), readJson("selftest.json")]);
let client = null; // the worker of the loaded (or loading) model
let busy = false;

show();
await offerChoices();
update();
registerServiceWorker();

$("load").onclick = () => attempt(load);
$("unload").onclick = () => unload("Unloaded: its memory is free again.");
$("write").onclick = () => attempt(() => write($("prompt").value));
$("more").onclick = () => attempt(() => write($("given").textContent + $("output").textContent));
$("stop").onclick = stop;
$("fulltest").onclick = () => attempt(() => test({}));
$("temperature").oninput = () => ($("temperature-value").value = $("temperature").value);
$("temperature").oninput();
for (const name of ["dtypes", "devices"]) {
  $(name).onchange = () => {
    unload("");
    update();
  };
}
addEventListener("pagehide", () => client?.end());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy) stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !busy) $("write").click();
});

// -- loading ---------------------------------------------------------------------------------------------------------

async function load() {
  unload("");
  const { dtype, device } = chosen();
  $("progress").hidden = false;
  $("progress").value = 0;
  $("state").textContent = "Loading …";
  client = new Client(version);
  const onNote = ({ loaded, total }) => {
    $("progress").value = (100 * loaded) / total;
    $("state").textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)}` : "Starting …";
  };
  let info;
  try {
    info = await client.call("load", { dtype, device, files: page.files }, onNote);
  } finally {
    $("progress").hidden = true;
  }
  const threads = info.threads === 1 ? "1 thread" : `${info.threads} threads`;
  $("state").textContent = `Ready: ${dtype} on ${device === "webgpu" ? "WebGPU" : `WebAssembly, ${threads}`}.`;
  document.documentElement.dataset.loaded = `${dtype} ${device}`;
  update();
  const passed = await test(QUICK);
  if (!passed && device === "webgpu") {
    select("devices", "wasm");
    await load();
    $("state").textContent += " This browser's WebGPU gave other answers than the record, so the page went back to WebAssembly.";
  }
}

// Compare with what torch recorded when the model was made. fp32 must give the same tokens; int8 may differ a little.
async function test(bounds) {
  const { dtype } = chosen();
  const line = $("selftest");
  delete line.dataset.verdict;
  line.textContent = "Self-test …";
  $("fulltest").hidden = true;
  const { answers } = await client.call("check", { prompts: selftest.prompts, ...bounds });
  const { equal, checked, difference, ids } = compare(answers, selftest.prompts);
  const near = difference <= selftest.tolerance[dtype];
  const passed = ids === null && near && (dtype !== "fp32" || equal === checked);
  const counted = `${equal} of ${checked} tokens as PyTorch recorded them`;
  line.dataset.verdict = passed ? "good" : "bad";
  if (ids !== null) line.textContent = "Self-test failed: the tokenizer gives other tokens than the recorded ones.";
  else line.textContent = `Self-test ${passed ? "passed" : "failed"}: ${counted}; largest difference of a logit ${difference.toExponential(1)}.`;
  $("fulltest").hidden = !("limit" in bounds);
  document.documentElement.dataset.selftest = passed ? "passed" : "failed";
  return passed;
}

function unload(message) {
  client?.end();
  client = null;
  delete document.documentElement.dataset.loaded;
  delete document.documentElement.dataset.selftest;
  $("state").textContent = message;
  $("selftest").textContent = "";
  $("fulltest").hidden = true;
  update();
}

// -- writing ---------------------------------------------------------------------------------------------------------

async function write(text) {
  const options = settings();
  if (!client) await load();
  $("given").textContent = text;
  $("output").replaceChildren();
  const body = $("output").appendChild(document.createTextNode(""));
  $("ending").textContent = "";
  $("speed").textContent = "";
  $("page").setAttribute("aria-busy", "true");
  $("stop").disabled = false;
  try {
    const onNote = ({ piece }) => body.appendData(piece);
    const done = await client.call("generate", { text, options }, onNote);
    const speed = done.tokensPerSecond ? `${done.tokensPerSecond.toPrecision(3)} tokens a second` : "";
    $("speed").textContent = [`${done.tokens.length} tokens`, speed].filter(Boolean).join(" · ");
    $("ending").textContent = describeEnd(done);
    document.documentElement.dataset.written = JSON.stringify(done);
  } finally {
    $("page").setAttribute("aria-busy", "false");
  }
}

function describeEnd({ reason, full, cut }) {
  const ends = {
    stop: "The model ended its text here.",
    interrupted: "Stopped.",
    length: full ? "The model's context is full; Go on continues from the last part of the text." : "",
  };
  const cutOff = cut ? `The beginning was too long: the model did not see its first ${cut} tokens.` : "";
  return [ends[reason], cutOff].filter(Boolean).join(" ");
}

// Ask the worker to stop after this token; a worker that does not answer is ended.
function stop() {
  const asked = client;
  client?.stop();
  setTimeout(() => {
    if (busy && client === asked) unload("Stopped; the model had to be unloaded.");
  }, 5000);
}

function settings() {
  for (const id of ["top-k", "penalty", "tokens", "seed"]) {
    if (!$(id).checkValidity()) {
      $(id).closest("details").open = true;
      $(id).reportValidity();
      throw new Error(`${$(id).closest("label").firstChild.textContent.trim()}: ${$(id).validationMessage}`);
    }
  }
  return {
    temperature: $("temperature").valueAsNumber,
    topK: $("top-k").valueAsNumber || 0,
    repetitionPenalty: $("penalty").valueAsNumber || 1,
    tokens: $("tokens").valueAsNumber || 128,
    seed: $("seed").value === "" ? null : $("seed").valueAsNumber,
  };
}

// Run one thing at a time. An error is shown and ends the worker: nothing else recovers from one.
async function attempt(action) {
  if (busy) return;
  busy = true;
  $("problem").hidden = true;
  update();
  try {
    await action();
  } catch (error) {
    const wasLoaded = client !== null;
    if (!client || client.ended) unload("");
    if (wasLoaded || error.message !== "The model was unloaded.") {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
  } finally {
    busy = false;
    update();
  }
}

// -- showing ---------------------------------------------------------------------------------------------------------

function show() {
  $("summary").textContent = page.summary;
  for (const [name, value] of page.rows) $("facts").append(element("dt", name), element("dd", value));
  for (const text of page.examples) {
    const chip = element("button", text.trim().replace(/\s+/g, " "));
    chip.type = "button";
    chip.onclick = () => {
      $("prompt").value = text;
      $("prompt").focus();
    };
    $("examples").append(chip);
  }
  $("prompt").value = page.examples[0] ?? "";
  showBars(page.bars);
  showCertificate().catch(() => {});
}

function showBars({ title, note, rows }) {
  if (rows.length < 2) return;
  $("bars").hidden = false;
  $("bars").querySelector("figcaption").textContent = title;
  $("bars").querySelector("p").textContent = note;
  const most = Math.max(...rows.map(([, value]) => value));
  for (const [name, value] of rows) {
    const bar = element("li");
    bar.className = "bar";
    bar.append(element("span", name), element("b", value.toFixed(3)), element("i"));
    bar.style.setProperty("--part", `${(100 * value) / most}%`);
    $("bars").querySelector("ul").append(bar);
  }
}

// The certificate is written after this page, so it is read when the page is opened.
async function showCertificate() {
  const { runtimes } = await readJson("certificate.json", { cache: "no-cache" });
  const dtypes = [...new Set(Object.values(runtimes).flatMap((cells) => Object.keys(cells)))];
  const head = element("tr");
  head.append(element("th", "runtime"), ...dtypes.map((dtype) => element("th", dtype)));
  $("certificate").querySelector("thead").append(head);
  for (const [name, cells] of Object.entries(runtimes)) {
    const row = element("tr");
    row.append(element("th", { torch: "PyTorch", onnx: "ONNX Runtime", node: "Node.js", browser: "Chromium" }[name] ?? name));
    for (const dtype of dtypes) {
      const cell = cells[dtype];
      const text = !cell ? "–" : cell.skipped ? "not checked" : `${cell.tokens_equal.join(" of ")} ${cell.passed ? "✓" : "✗"}`;
      const box = element("td", text);
      if (cell && !cell.skipped) box.dataset.verdict = cell.passed ? "good" : "bad";
      row.append(box);
    }
    $("certificate").querySelector("tbody").append(row);
  }
  $("certificate").hidden = false;
  for (const [name, href] of [["Report", "report.html"], ["Certificate", "certificate.json"]]) {
    const link = element("a", name);
    link.href = href;
    $("links").append(link);
  }
}

async function offerChoices() {
  const sizes = Object.fromEntries(Object.entries(page.dtypes).map(([dtype, { bytes }]) => [dtype, bytes]));
  const first = sizes.fp32 > LARGE && sizes.int8 ? "int8" : Object.keys(sizes)[0];
  for (const [dtype, bytes] of Object.entries(sizes)) $("dtypes").append(choice("dtype", dtype, megabytes(bytes), dtype === first));
  const gpu = await hasWebGpu();
  $("devices").append(choice("device", "wasm", "", true));
  if (gpu) $("devices").append(choice("device", "webgpu", "", false));
  $("devices").hidden = !gpu;
}

async function hasWebGpu() {
  const built = ("Suspending" in WebAssembly && hasVariant(".jspi")) || hasVariant(".asyncify");
  try {
    return built && Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

function hasVariant(variant) {
  return `web/vendor/ort-wasm-simd-threaded${variant}.wasm` in page.files;
}

function choice(group, value, size, checked) {
  const label = element("label");
  label.className = "choice";
  const input = Object.assign(document.createElement("input"), { type: "radio", name: group, value, checked });
  label.append(input, element("b", { wasm: "WebAssembly", webgpu: "WebGPU" }[value] ?? value));
  const box = element("span", size);
  box.className = "size";
  label.append(box, element("small", ABOUT[value]));
  return label;
}

function chosen() {
  const value = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
  return { dtype: value("dtype"), device: value("device") };
}

function select(group, value) {
  $(group).querySelector(`input[value="${value}"]`).checked = true;
}

function update() {
  const loaded = "loaded" in document.documentElement.dataset;
  const writing = $("page").getAttribute("aria-busy") === "true";
  const size = megabytes(sum(download()));
  $("load").hidden = loaded;
  $("load").textContent = `Load ${size}`;
  $("parts").hidden = client !== null;
  $("parts").textContent = describeDownload();
  $("unload").hidden = !client;
  $("load").disabled = $("fulltest").disabled = busy;
  $("write").disabled = $("more").disabled = busy;
  $("write").textContent = loaded || busy ? "Write" : `Load ${size} and write`;
  $("stop").disabled = !busy || !loaded;
  $("more").hidden = $("output").textContent === "" || writing;
}

// What is fetched at most: the model with its tokenizer, and the WebAssembly build that this browser takes.
function download() {
  const { dtype, device } = chosen();
  const variant = "Suspending" in WebAssembly && hasVariant(".jspi") ? ".jspi" : device === "webgpu" ? ".asyncify" : "";
  const size = (name) => page.files[name]?.bytes ?? 0;
  const pair = ["mjs", "wasm"].map((suffix) => size(`web/vendor/ort-wasm-simd-threaded${variant}.${suffix}`));
  return [size(page.dtypes[dtype].file) + size("tokenizer.json"), sum(pair) + size("web/vendor/transformers.min.js")];
}

function describeDownload() {
  const [model, runtime] = download().map(megabytes);
  return `${model} model and tokenizer, ${runtime} runtime; fetched once, from this page's own address.`;
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toLocaleString("en", { maximumSignificantDigits: bytes < 1e6 ? 2 : 3 })} MB`;
}

function element(name, text = "") {
  return Object.assign(document.createElement(name), { textContent: text });
}

async function readJson(name, options = { cache: "no-cache" }) {
  const response = await fetch(new URL(`../${name}`, import.meta.url), options);
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}.`);
  return response.json();
}

// Keeps what was loaded for use without a connection, and adds the headers that threads need where a host does not send them.
async function registerServiceWorker() {
  if (!("serviceWorker" in navigator) || !isSecureContext) return;
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
