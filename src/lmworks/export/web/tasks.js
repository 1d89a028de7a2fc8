// One loaded model that answers: its tokenizer, its graph, its task. Text generation is in engine.js.
//
// The same file runs in the page's worker (transformers.js on WASM or WebGPU) and in Node (transformers.js on the native
// ONNX Runtime); the library comes in as an argument. Inputs and answers are the JSON of lmworks' own predictor:
//
//   text-classification   { text, pair? }          [{ label, score }, …]
//   token-classification  { text }                 [{ label, score, word, start, end }, …]
//   question-answering    { question, context }    { text, score, start, end }
//   fill-mask             { text }                 [{ token_str, token, score, sequence }, …], a list for each of several masks
//   feature-extraction    { texts }                { embeddings: [[…], …] }
//   image-classification  { image }                [{ label, score }, …]

const version = new URL(import.meta.url).search;
const { DTYPES, compareLogits, toBase64 } = await import(`./engine.js${version}`);
const { Encoder, InputError } = await import(`./encoding.js${version}`);
const { READERS } = await import(`./readers.js${version}`);
const { readSteps } = await import(`./pictures.js${version}`);

export { InputError };

const ATTENTIONS = "attentions."; // outputs that say where each layer looks
const AT_ONCE = 2e6; // pairs of tokens, over layers, whose weights are fetched together: 100 MB with 12 heads
const EXCERPT = 12; // tokens
const STATES = ["last_hidden_state", "token_embeddings"]; // what bodies call their answer
const OFFSETS = ["roberta", "xlm-roberta", "camembert"]; // families that count positions from pad_token_id + 1
const POOLINGS = { cls: "cls", mean: "mean", max: "max", lasttoken: "last" };
const FLAGS = { // older names of the same
  pooling_mode_cls_token: "cls", pooling_mode_max_tokens: "max", pooling_mode_mean_tokens: "mean", pooling_mode_lasttoken: "lasttoken",
  pooling_mode_mean_sqrt_len_tokens: "mean_sqrt_len_tokens", pooling_mode_weightedmean_tokens: "weightedmean",
};
const SETTINGS = ["bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"];

// Load a model folder for a task. `pause`, when given, is awaited before each window: it lets messages through.
export async function openTask(library, folder, { task, dtype, device, session = {}, pause = null }) {
  if (!(task in READERS)) throw new Error(`This page does not know the task ${task}.`);
  const isVision = task === "image-classification";
  const read = (name) => readJson(library, folder, name);
  const [config, network] = await Promise.all([
    read("config.json"),
    library.PreTrainedModel.from_pretrained(folder, { dtype: DTYPES[dtype], device, session_options: session }),
  ]);
  const parts = { library, facts: readFacts(config) };
  if (isVision) {
    parts.steps = readSteps(await read("preprocessor_config.json"));
  } else {
    const tokenizer = await library.AutoTokenizer.from_pretrained(folder);
    parts.encoder = new Encoder(tokenizer, await read("special_tokens_map.json"));
    const stated = parts.encoder.config.model_max_length;
    if (stated > 0 && stated < 1e9) parts.facts.length = Math.min(parts.facts.length, Math.trunc(stated));
  }
  if (task === "feature-extraction") parts.recipe = await readRecipe(read);
  return new TaskModel(task, parts, new Graph(library, network.sessions.model, config, pause));
}

class TaskModel {
  constructor(task, parts, graph) {
    this.task = task;
    this.parts = parts;
    this.graph = graph;
    this.labels = parts.facts.labels;
    this.context = parts.encoder ? parts.facts.length : null; // tokens of one window
    this.mask = task === "fill-mask" ? this.reader({}).mask : null;
    this.attentions = parts.encoder ? graph.attentions.length : 0; // layers whose weights the graph gives out
  }

  reader(options) {
    return READERS[this.task](this.parts, options);
  }

  encode(text) {
    return this.parts.encoder.encode(text).map((token) => token.id);
  }

  // Answer one input; `options` are those of Python's task.
  async run(input, options = {}) {
    return (await this.compute(input, options)).output;
  }

  // Where the tokens of one window look: { tokens: [{ text, special, joined }, …], heads, weights (H, T, T) } and the
  // beginnings of all windows in `parts`; of one layer, or the mean of all. No tokens where there is no window.
  async attend(input, options = {}, { layer = null, part = 0 } = {}) {
    const { encoder } = this.parts;
    const features = await this.reader(options).encode(input);
    if (!features.length) return { tokens: [], parts: [], heads: 0, weights: new Float32Array() };
    const parts = features.map(({ tokens }) => {
      const last = Math.max(...tokens.map((token) => token.sequence ?? 0));
      const ids = tokens.filter(({ sequence }) => sequence === last).map(({ id }) => id);
      return encoder.decode(ids.slice(0, EXCERPT)).replace(/\ufffd+$/, "").trim() + (ids.length > EXCERPT ? " …" : "");
    });
    const { tokens } = features[part];
    const joined = (a, b) => Boolean(a) && !a.special && !b.special && a.sequence === b.sequence && a.word === b.word && a.end >= b.start;
    const texts = encoder.show(tokens);
    const shown = tokens.map((token, i) => ({ text: texts[i], special: token.special, joined: joined(tokens[i - 1], token) }));
    const weights = await this.graph.attend(features[part], layer);
    return { tokens: shown, parts, heads: weights.length / tokens.length ** 2, weights };
  }

  // Answer recorded items. `enough()` true stops between them; `limit` bounds their number.
  async answer(items, { limit = Infinity, enough = () => false, options = {} } = {}) {
    const answers = [];
    for (const item of items.slice(0, limit)) {
      if (answers.length && enough()) break;
      const { features, outputs, output, reader } = await this.compute(item.input, item.options ?? options);
      const record = reader.record ?? ((_, { data }) => Float32Array.from(data));
      const ids = features[0]?.tokens?.map((token) => token.id) ?? [];
      answers.push({ ids, logits: toBase64(features.length ? record(features[0], outputs[0]) : new Float32Array()), output });
    }
    return answers;
  }

  async compute(input, options) {
    const reader = this.reader(options);
    const features = await reader.encode(input);
    const outputs = [];
    for (const feature of features) outputs.push(await this.graph.run(feature));
    return { reader, features, outputs, output: reader.decode(features, outputs, input) };
  }
}

// An ONNX graph, fed one window at a time: without padding, whatever the tokens are.
class Graph {
  constructor(library, session, config, pause) {
    this.library = library;
    this.session = session;
    this.types = (config.type_vocab_size ?? 2) > 1;
    this.pause = pause;
    const names = session.outputNames;
    this.attentions = names.filter((name) => name.startsWith(ATTENTIONS));
    this.outputs = names.includes("start_logits") ? ["start_logits", "end_logits"] : ["logits", ...STATES].filter((name) => names.includes(name)).slice(0, 1);
    if (!this.outputs.length) throw new Error(`The graph gives nothing that a task reads: ${names.join(", ")}.`);
  }

  // { tokens } or { pixels } -> { data, dims }: logits, hidden states, or (1, T, 2) where an answer starts and ends.
  async run(feature) {
    await this.pause?.();
    const parts = this.outputs;
    const found = await this.session.run(this.feed(feature), parts);
    const data = await Promise.all(parts.map((name) => found[name].getData()));
    if (!data.every((numbers) => numbers.every(Number.isFinite))) throw new Error("The model's answers are not numbers.");
    const { dims } = found[parts[0]];
    if (parts.length === 1) return { data: data[0], dims };
    return { data: Float32Array.from({ length: 2 * data[0].length }, (_, i) => data[i % 2][i >> 1]), dims: [...dims, 2] };
  }

  // The weights (H, T, T) of a layer, or the mean of all. Nothing else is fetched.
  async attend(feature, layer = null) {
    const names = layer === null ? this.attentions : [this.attentions[layer]];
    const size = feature.tokens.length ** 2;
    const group = Math.max(1, Math.floor(AT_ONCE / size));
    let sum = null;
    for (let at = 0; at < names.length; at += group) {
      await this.pause?.();
      const found = await this.session.run(this.feed(feature), names.slice(at, at + group));
      for (const tensor of Object.values(found)) sum = add(sum, await tensor.getData(), size);
    }
    return sum.map((x) => x / names.length);
  }

  feed({ tokens, pixels }) {
    const { session } = this;
    const tensor = (type, data, dims) => new this.library.Tensor(type, data, dims).ort_tensor;
    const whole = (values) => tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const makers = pixels
      ? { pixel_values: () => tensor("float32", pixels.data, pixels.dims) }
      : {
          input_ids: () => whole(tokens.map((token) => token.id)),
          attention_mask: () => whole(tokens.map(() => 1)),
          token_type_ids: () => whole(tokens.map((token) => (this.types ? token.type : 0))),
          position_ids: () => whole(tokens.map((_, i) => i)),
          num_logits_to_keep: () => tensor("int64", BigInt64Array.of(0n), []),
        };
    const feed = {};
    for (const name of session.inputNames) {
      if (!makers[name]) throw new Error(`The graph asks for ${name}, which this task does not have.`);
      feed[name] = makers[name]();
    }
    return feed;
  }
}

// Layers that were pruned may have fewer heads than others: then only the means of heads can be added.
function add(sum, weights, size) {
  if (sum === null) return Float32Array.from(weights);
  if (sum.length !== weights.length) [sum, weights] = [sum, weights].map((all) => meanOfHeads(all, size));
  return sum.map((x, i) => x + weights[i]);
}

export function meanOfHeads(weights, size) {
  const heads = weights.length / size;
  return Float32Array.from({ length: size }, (_, i) => {
    let sum = 0;
    for (let at = i; at < weights.length; at += size) sum += weights[at];
    return sum / heads;
  });
}

// What a task must know about a model.
function readFacts(config) {
  const named = Object.entries(config.id2label ?? {}).sort(([a], [b]) => a - b);
  const labels = named.length ? named.map(([, label]) => label) : Array.from({ length: config.num_labels ?? 2 }, (_, i) => `LABEL_${i}`);
  const type = config.lmworks_quantization?.model_type ?? config.model_type; // of fewer heads than published configs can say
  const offset = OFFSETS.includes(type) ? (config.pad_token_id ?? 1) + 1 : 0;
  const length = (config.max_position_embeddings ?? config.n_positions ?? 512) - offset;
  return { labels, problemType: config.problem_type ?? null, length };
}

// How a checkpoint of sentence-transformers turns a text into one vector; { problem } where that is not known here.
async function readRecipe(read) {
  const recipe = { pooling: "mean", normalize: false, length: null, lowerCase: false, prompt: "" };
  const modules = await read("modules.json");
  if (!modules) return recipe;
  const kinds = modules.map((module) => module.type.split(".").at(-1)).join(" ");
  const [own, pooled] = modules.map((module) => (module.path ? `${module.path}/` : ""));
  const pooling = (pooled && (await read(`${pooled}config.json`))) || {};
  const flags = Object.keys(FLAGS).filter((flag) => pooling[flag]).map((flag) => FLAGS[flag]);
  const modes = [pooling.pooling_mode ?? (flags.length ? flags : "mean")].flat();
  const stated = (await read("config_sentence_transformers.json")) ?? {};
  const prompt = stated.prompts?.[stated.default_prompt_name] || "";
  const known = /^Transformer Pooling( Normalize)?$/.test(kinds) && modes.length === 1 && modes[0] in POOLINGS;
  if (!known || (prompt && pooling.include_prompt === false)) {
    return { ...recipe, problem: `This recipe for vectors is not supported (${kinds}, ${modes.join(" + ")}): choose a pooling.` };
  }
  let settings = null;
  for (const name of SETTINGS) settings ??= await read(`${own}sentence_${name}_config.json`);
  return {
    pooling: POOLINGS[modes[0]],
    normalize: kinds.includes("Normalize"),
    length: settings?.max_seq_length ?? null,
    lowerCase: Boolean(settings?.do_lower_case),
    prompt,
  };
}

// A file of the folder as JSON, null where there is none: from the disk in Node, else through the library's fetch.
async function readJson(library, folder, name) {
  if (globalThis.process?.versions?.node) {
    const { readFile } = await import("node:fs/promises");
    const text = await readFile(`${folder}/${name}`, "utf-8").catch(() => null);
    return text === null ? null : JSON.parse(text);
  }
  const response = await library.env.fetch(`${library.env.localModelPath}${folder}/${name}`);
  return response.ok ? response.json() : null;
}

// How answers differ from the record: equal and checked decisions, the logits' differences (compareLogits), the first item
// whose ids differ. `options` are those that the items were answered with.
export function compareTask(task, answers, items, options = {}) {
  let equal = 0, checked = 0, ids = null;
  answers.forEach((given, i) => {
    const known = items[i];
    if (ids === null && given.ids.join() !== (known.ids ?? []).join()) ids = i;
    const [same, all] = compareOutputs(task, given.output, known.output, known.options ?? options);
    equal += same;
    checked += all;
  });
  return { equal, checked, ids, ...compareLogits(answers, items) };
}

// [equal decisions, decisions] of two outputs.
function compareOutputs(task, given, known, options) {
  const count = (a, b) => [a.filter((one, i) => one === b[i]).length, Math.max(a.length, b.length)];
  if (task === "token-classification") {
    const [a, b] = [given, known].map((found) => new Set(found.map((one) => JSON.stringify([one.label, one.start, one.end]))));
    const both = [...a].filter((one) => b.has(one)).length;
    return a.size || b.size ? [both, a.size + b.size - both] : [1, 1];
  }
  if (task === "question-answering") {
    const place = (found) => JSON.stringify([found].flat().slice(0, 1).map(({ text, start, end }) => [text, start, end]));
    return count([place(given)], [place(known)]);
  }
  if (task === "fill-mask") {
    const firsts = (found) => (Array.isArray(found[0]) ? found : [found]).map((fills) => fills[0].token);
    return count(firsts(given), firsts(known));
  }
  if (task === "feature-extraction") return count(findNearest(given.embeddings), findNearest(known.embeddings));
  const chosen = (found) => {
    const kept = options.scores === "sigmoid" ? found.filter((one) => one.score > 0.5) : found.slice(0, 1);
    return kept.map((one) => one.label).sort().join("\n");
  };
  return count([chosen(given)], [chosen(known)]);
}

// For each vector the place of the nearest other by cosine, the first of equals.
export function findNearest(vectors) {
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const norms = vectors.map((vector) => Math.sqrt(dot(vector, vector)) || 1);
  return vectors.map((one, i) => {
    const scores = vectors.map((other, k) => (k === i ? -Infinity : dot(one, other) / (norms[i] * norms[k])));
    return scores.indexOf(Math.max(...scores));
  });
}
