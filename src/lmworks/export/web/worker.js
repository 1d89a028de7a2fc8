// A module Worker that holds one loaded model. The page ends the Worker on a switch, an error and when it is left:
// that is the only way to give WebAssembly memory back, and after a failed load or run nothing else recovers.
//
//   { id, type: "load", task, dtype, device, files, threads } -> { variant, threads, context, labels, mask, attentions, seconds },
//                                                     notes { loaded, total }
//   { id, type: "generate", text | messages, chat, options } -> what Engine.generate returns and { cut, dropped, prompt },
//                                                     notes { piece, count }
//   { id, type: "run", input, options }               -> the answer of any other task (tasks.js)
//   { id, type: "attend", input, options, choice }   -> where the text's tokens look (tasks.js)
//   { id, type: "check", prompts | items, texts, options, limit, budget } -> { answers, texts } (ids of each text)
//   { type: "stop" }                                  ends the writing after the current token, any other task after the
//                                                     current window: its answer is the error "Stopped."
//
// Every answer is { id, result } or { id, error }; notes in between are { id, note }. An error that is `kept` was in what
// was asked for: the model is as good as before. A file of `files` may have a `url` of its own.

const version = self.location.search; // "?v=…", so that a new page never meets an old file in a cache

const PREFIX = "/lmworks/model/"; // transformers.js asks for PREFIX + file; nothing is ever fetched from there
const MANY_THREADS = 16e6; // bytes of a graph from which threads pay
const SUBGROUP = 8; // threads of a graphics card that the library's attention counts on to be together
let library = null;
let answer = null;
let engine = null; // an Engine (engine.js) or a TaskModel (tasks.js)
let graphs = null;
let stopping = null; // how generate() is told to stop
let stopped = false;

const VERBS = {
  async load({ task = "text-generation", dtype, device, files, threads = null }, note) {
    const started = performance.now();
    const [parts, found] = await Promise.all([import(`./engine.js${version}`), import(`./vendor/transformers.min.js${version}`)]);
    const writes = task === "text-generation";
    const { openTask } = writes ? {} : await import(`./tasks.js${version}`);
    library = found;
    answer = parts.answer;
    graphs = parts.GRAPHS;
    const variant = chooseVariant(device, files);
    const pair = `web/vendor/ort-wasm-simd-threaded${variant}`;
    const wanted = [`${pair}.wasm`, ...modelFiles(files, dtype)];
    const progress = new Progress(wanted.map((name) => files[name].bytes), note);
    const { env } = library;
    let failure = null; // the library would replace it by "not found"
    Object.assign(env, {
      allowRemoteModels: false,
      allowLocalModels: true,
      localModelPath: PREFIX.split("model/")[0],
      useBrowserCache: false,
      useWasmCache: false,
      fetch: async (url) => {
        const name = String(url).split(PREFIX)[1];
        if (!files[name]) return new Response(null, { status: 404 });
        return new Response(await download(name, files[name], progress).catch((error) => Promise.reject((failure ??= error))));
      },
    });
    threads = self.crossOriginIsolated ? (threads ?? chooseThreads(files[wanted[1]].bytes)) : 1;
    const [mjs, wasm] = ["mjs", "wasm"].map((suffix) => address(`${pair}.${suffix}`, files[`${pair}.${suffix}`]));
    Object.assign(env.backends.onnx.wasm, {
      numThreads: threads,
      wasmPaths: { mjs, wasm },
      wasmBinary: await download(`${pair}.wasm`, files[`${pair}.wasm`], progress),
    });
    if (device === "webgpu") leaveSmallSubgroups();
    const options = { task, dtype, device, pause: writes ? nextMessage : checkStopped };
    engine = await (writes ? parts.Engine.open(library, "model", options) : openTask(library, "model", options)).catch((error) => {
      throw failure ?? error;
    });
    const seconds = (performance.now() - started) / 1000;
    const { context, labels = [], mask = null, attentions = 0 } = engine;
    return { variant, threads, context, labels, mask, attentions, seconds };
  },

  async generate({ text, messages = null, chat = {}, options }, note) {
    const room = Math.min(options.tokens, Math.ceil(engine.context / 2));
    const { ids, cut = 0, dropped = 0 } = messages ? engine.converse(messages, { ...chat, room }) : engine.prompt(text, { room });
    stopping = new library.InterruptableStoppingCriteria();
    const onText = (piece, count) => note({ piece, count });
    return { ...(await engine.generate(ids, { ...options, onText, stopping })), cut, dropped, prompt: ids.length };
  },

  async run({ input, options }) {
    return engine.run(input, options);
  },

  async attend({ input, options, choice }) {
    return engine.attend(input, options, choice);
  },

  async check({ prompts = null, items = [], texts = [], options = {}, limit = Infinity, budget = Infinity }) {
    stopping = new library.InterruptableStoppingCriteria();
    const until = performance.now() + budget;
    const enough = () => performance.now() > until || stopping.interrupted;
    const answers = prompts
      ? await answer(engine, prompts, { limit, enough, stopping })
      : await engine.answer(items, { limit, enough, options });
    return { answers, texts: texts.map((item) => engine.encode(item.text)) };
  },
};

self.onmessage = async ({ data: { id, type, ...rest } }) => {
  if (type === "stop") {
    stopped = true;
    stopping?.interrupt();
    return;
  }
  stopped = false;
  try {
    self.postMessage({ id, result: await VERBS[type](rest, (note) => self.postMessage({ id, note })) });
  } catch (error) {
    self.postMessage({ id, error: explain(error), kept: error?.name === "InputError" });
  }
};

// JSPI is the fastest build and the smaller one with WebGPU; the plain build runs everywhere, without WebGPU.
function chooseVariant(device, files) {
  const has = (variant) => `web/vendor/ort-wasm-simd-threaded${variant}.wasm` in files;
  if ("Suspending" in WebAssembly && has(".jspi")) return ".jspi";
  if (device !== "webgpu") return "";
  if (has(".asyncify")) return ".asyncify";
  throw new Error("This browser cannot run the WebGPU build that came with this page; choose WebAssembly.");
}

// The library's attention reads the keys of 32 tokens and more eight at a time, each by another member of a subgroup: where
// a subgroup may have fewer, as on software adapters, it is wrong. A device without subgroups takes another way.
function leaveSmallSubgroups() {
  const { prototype } = self.GPUAdapter;
  const { requestDevice } = prototype;
  prototype.requestDevice = function (wanted = {}) {
    const small = (this.info?.subgroupMinSize ?? SUBGROUP) < SUBGROUP;
    const features = [...(wanted.requiredFeatures ?? [])].filter((name) => !(small && name.startsWith("subgroup")));
    return requestDevice.call(this, { ...wanted, requiredFeatures: features });
  };
}

// In a small graph threads wait for each other longer than they work, and half of the logical processors do the work.
function chooseThreads(bytes) {
  return bytes < MANY_THREADS ? 1 : Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2));
}

function modelFiles(files, dtype) {
  const elsewhere = /^(web|onnx)\//; // the other files that the page names are small, and read with the model
  const weights = Object.keys(files).filter((name) => name.startsWith(`${graphs[dtype]}_data`));
  return [graphs[dtype], ...weights, ...Object.keys(files).filter((name) => !elsewhere.test(name))].filter((name) => name in files);
}

function address(name, file) {
  if (file.url) return file.url;
  const url = new URL(`../${name}`, self.location.href);
  url.searchParams.set("v", file.sha256.slice(0, 16));
  return url.href;
}

// Fetch a file of the page and refuse it unless it is the very file that the page was made with. A wrong one may come
// from a cache, so it is asked for once more, past every cache.
async function download(name, file, progress) {
  for (const cache of ["default", "reload"]) {
    const bytes = await fetchBytes(name, file, progress, cache);
    if (bytes && (await hasHash(bytes, file.sha256))) return bytes.buffer;
  }
  throw new Error(`${name} is damaged: it is not the file that this page was made with.`);
}

async function fetchBytes(name, file, progress, cache) {
  let response;
  try {
    response = await fetch(address(name, file), { cache });
  } catch (error) {
    throw new Error(`${name} could not be fetched (${error.message}).`);
  }
  if (!response.ok) throw new Error(`${name} could not be fetched: the server answered ${response.status}.`);
  const bytes = new Uint8Array(file.bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return at === bytes.length ? bytes : null;
    if (at + value.length > bytes.length) return null;
    bytes.set(value, at);
    at += value.length;
    progress.add(value.length);
  }
}

async function hasHash(bytes, known) {
  if (!self.crypto?.subtle) return true; // only secure contexts can compute one
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === known;
}

class Progress {
  constructor(sizes, note) {
    this.total = sizes.reduce((sum, size) => sum + size, 0);
    this.loaded = 0;
    this.told = -1;
    this.note = note;
  }

  add(count) {
    this.loaded = Math.min(this.loaded + count, this.total);
    const percent = Math.floor((100 * this.loaded) / this.total);
    if (percent === this.told) return;
    this.told = percent;
    this.note({ loaded: this.loaded, total: this.total });
  }
}

// Give waiting messages (a "stop") their turn: computing alone never returns to the event loop.
const channel = new MessageChannel();
let resume = null;
channel.port1.onmessage = () => resume();
function nextMessage() {
  return new Promise((resolve) => {
    resume = resolve;
    channel.port2.postMessage(null);
  });
}

async function checkStopped() {
  await nextMessage();
  if (stopped) throw Object.assign(new Error("Stopped."), { name: "InputError" });
}

function explain(error) {
  const text = typeof error === "number" ? `the WebAssembly runtime stopped with code ${error}` : (error?.message ?? String(error));
  return /memory|allocat|RangeError|bad_alloc/i.test(text) ? `${text} (most likely out of memory: try int8)` : text;
}
