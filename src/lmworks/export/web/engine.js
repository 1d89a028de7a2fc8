// One loaded language model: its tokenizer, its network, its way of writing.
//
// The same file runs in the page's worker (transformers.js on WASM or WebGPU) and in Node (transformers.js on the
// native ONNX Runtime); the library comes in as an argument. Ids are plain arrays of numbers, logits Float32Arrays.

const version = new URL(import.meta.url).search;
const { Encoder } = await import(`./encoding.js${version}`);

export const DTYPES = { // our name -> transformers.js's, which finds the file by it
  fp32: "fp32", fp16: "fp16", int8: "q8", uint8: "uint8", q4: "q4", q4f16: "q4f16", bnb4: "bnb4",
};
export const GRAPHS = { // the file itself
  fp32: "onnx/model.onnx", fp16: "onnx/model_fp16.onnx", int8: "onnx/model_quantized.onnx", uint8: "onnx/model_uint8.onnx",
  q4: "onnx/model_q4.onnx", q4f16: "onnx/model_q4f16.onnx", bnb4: "onnx/model_bnb4.onnx",
};

const NEAR = 8; // tokens of a prompt among which one is text by itself, as good as always
const INCOMPLETE = "\ufffd"; // what decoding shows for bytes that do not (yet) make a character

export class Engine {
  constructor(library, tokenizer, model) {
    this.library = library;
    this.tokenizer = tokenizer;
    this.model = model;
    this.context = model.config.max_position_embeddings;
    const ends = model.generation_config?.eos_token_id ?? model.config.eos_token_id ?? [];
    this.ends = [ends].flat();
  }

  // Load a model folder. `pause`, when given, is awaited before each token: it lets messages through.
  static async open(library, folder, { dtype, device, session = {}, pause = null }) {
    const tokenizer = await library.AutoTokenizer.from_pretrained(folder);
    const options = { dtype: DTYPES[dtype], device, session_options: session };
    const model = await library.AutoModelForCausalLM.from_pretrained(folder, options);
    if (pause) {
      const forward = model.forward.bind(model);
      model.forward = async (inputs) => {
        await pause();
        return forward(inputs);
      };
    }
    return new Engine(library, tokenizer, model);
  }

  get encoder() {
    return (this.made ??= new Encoder(this.tokenizer));
  }

  // The ids of a text that is to be continued, after those that the model expects at a start.
  encode(text) {
    return this.encoder.encode(text).map(({ id }) => id);
  }

  decode(ids) {
    return this.encoder.decode(ids);
  }

  // The ids to start from: an empty text begins a new document, and a long one keeps its last part.
  prompt(text, { room = 1 } = {}) {
    const tokens = this.encoder.encode(text);
    const ids = tokens.length ? tokens.map(({ id }) => id) : this.ends.slice(0, 1);
    const most = Math.max(1, this.context - room + 1);
    const cut = Math.max(0, ids.length - most);
    const first = Math.max(0, tokens.findIndex(({ special }) => !special)); // what every text begins with stays
    return { ids: cut ? [...ids.slice(0, first), ...ids.slice(first + cut)].slice(-most) : ids, cut };
  }

  // The ids of a conversation in the model's chat template. One that is too long loses its oldest messages, a question and
  // its answer at a time, never the system's text.
  converse(messages, { template, tokens, room = 1 }) {
    const first = messages[0]?.role === "system" ? 1 : 0;
    for (let dropped = 0; ; dropped += 2) {
      const kept = messages.filter((_, i) => i < first || i >= first + dropped);
      const ids = this.encoder.ids(renderChat(this.tokenizer, kept, { template, tokens })); // it writes what a text begins with
      if (ids.length + room - 1 <= this.context) return { ids, dropped };
      if (kept.length < first + 3) {
        throw refuse(`The message is too long: ${ids.length} tokens; the model reads ${this.context - room + 1} and answers with ${room}.`);
      }
    }
  }

  // Continue `ids`. Returns { tokens, reason: "stop" | "length" | "interrupted", tokensPerSecond (without the first) }.
  // onText(piece, count) gets whole characters only. `ends: []` writes on past the end of a document.
  async generate(ids, options = {}) {
    const { tokens: wanted = 128, temperature = 0, topK = 0, repetitionPenalty = 1, seed = null } = options;
    const { ends = this.ends, onText = null, stopping = null } = options;
    const most = Math.min(wanted, this.context - ids.length + 1); // the last token is written, never read
    if (ids.length < 1 || most < 1) {
      throw new Error(`The text has ${ids.length} tokens; the model reads 1 to ${this.context}.`);
    }
    if (seed !== null) this.library.random.seed(seed);
    const written = new Written(this, onText);
    await this.model.generate({
      ...this.inputs(ids),
      max_new_tokens: most,
      min_new_tokens: null,
      do_sample: temperature > 0,
      temperature: temperature > 0 ? temperature : 1,
      top_k: topK,
      repetition_penalty: repetitionPenalty,
      num_beams: 1,
      eos_token_id: ends.length ? ends : null,
      streamer: written,
      stopping_criteria: stopping,
    });
    const last = written.tokens.at(-1);
    const reason = ends.includes(last) ? "stop" : written.tokens.length < most ? "interrupted" : "length";
    return { tokens: written.tokens, reason, full: most < wanted, tokensPerSecond: written.tokensPerSecond };
  }

  // The logits (V,) that follow the last of `ids`.
  async logits(ids) {
    const { logits } = await this.model(this.inputs(ids)); // (1, T, V)
    const size = logits.dims.at(-1);
    return Float32Array.from(logits.data.subarray(logits.data.length - size));
  }

  inputs(ids) {
    const tensor = (values) => new this.library.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
    return { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
  }
}

// What generate() calls for the prompt and for each token: collects tokens, gives out text, keeps the time.
class Written {
  constructor(engine, onText) {
    this.engine = engine;
    this.onText = onText;
    this.tokens = [];
    this.waiting = []; // tokens since the text was last whole, after one more for context
    this.shown = 0; // characters of their text that were given out
    this.seenPrompt = false;
    this.first = this.latest = 0;
  }

  put([ids]) {
    if (!this.seenPrompt) {
      this.seenPrompt = true; // decoders take the space off the first token of all: the text goes on after the prompt's
      if (this.onText && Array.from(ids).slice(-NEAR).reverse().some((id) => this.standsAlone(Number(id)))) this.startOver();
      return;
    }
    const token = Number(ids[0]);
    this.latest = performance.now();
    if (this.tokens.length === 0) this.first = this.latest;
    this.tokens.push(token);
    if (!this.onText) return;
    this.waiting.push(token);
    const text = this.engine.decode(this.waiting).slice(this.shown);
    const whole = text.replace(/\ufffd+$/, ""); // of a run of byte tokens, none is shown before all are there
    this.shown += whole.length;
    this.standsAlone(token);
    if (whole === text) this.startOver();
    this.onText(whole, this.tokens.length);
  }

  // Whether a token is text by itself, and so can be context; it is kept then.
  standsAlone(token) {
    const text = this.engine.decode([token]);
    if (!text || text.includes(INCOMPLETE)) return false;
    this.context = [token, text.length];
    return true;
  }

  // Forget what was given out, but for a token of context.
  startOver() {
    if (!this.context) return;
    this.waiting = [this.context[0]];
    this.shown = this.context[1];
  }

  end() {
    if (!this.onText) return;
    const rest = this.engine.decode(this.waiting).slice(this.shown);
    if (rest) this.onText(rest, this.tokens.length);
  }

  get tokensPerSecond() {
    const seconds = (this.latest - this.first) / 1000;
    return seconds > 0 ? (this.tokens.length - 1) / seconds : null;
  }
}

// A conversation as the template that the model came with writes it; `tokens` are the special ones by their names.
export function renderChat(tokenizer, messages, { template, tokens = {} }) {
  try {
    return tokenizer.apply_chat_template(messages, { chat_template: template, add_generation_prompt: true, tokenize: false, ...tokens });
  } catch (error) {
    throw refuse(`The model's chat template does not take this conversation: ${error.message}`);
  }
}

// An error about the input, after which the model is as good as before.
function refuse(message) {
  return Object.assign(new Error(message), { name: "InputError" });
}

// Run recorded prompts as the reference did: greedy, past the end of a document. Each answer is { ids, tokens, text, logits }.
// `enough()` true stops between prompts; `limit` bounds the tokens of each.
export async function answer(engine, prompts, { limit = Infinity, enough = () => false, stopping = null } = {}) {
  const answers = [];
  for (const prompt of prompts) {
    if (answers.length && enough()) break;
    const ids = engine.encode(prompt.text);
    const logits = await engine.logits(ids);
    const tokens = Math.min(limit, prompt.tokens.length);
    const done = await engine.generate(ids, { tokens, ends: [], stopping });
    answers.push({ ids, tokens: done.tokens, text: engine.decode(done.tokens), logits: toBase64(logits) });
  }
  return answers;
}

// How answers differ from the record: equal and checked tokens, the logits' differences (compareLogits), the first prompt whose ids differ.
export function compare(answers, prompts) {
  let equal = 0, checked = 0, ids = null;
  answers.forEach((given, i) => {
    const recorded = prompts[i];
    if (ids === null && given.ids.join() !== recorded.ids.join()) ids = i;
    given.tokens.forEach((token, t) => {
      checked += 1;
      equal += token === recorded.tokens[t] ? 1 : 0;
    });
  });
  return { equal, checked, ids, ...compareLogits(answers, prompts) };
}

// The largest difference of a logit and the root mean square of all, infinite where they cannot be compared. The first
// judges fp32; the second what is lossy, as the largest of many differences grows with their number.
export function compareLogits(answers, recorded) {
  let difference = 0, squares = 0, count = 0;
  answers.forEach((given, i) => {
    const [a, b] = [given, recorded[i]].map(({ logits }) => fromBase64(logits));
    if (a.length !== b.length) difference = Infinity;
    for (let k = 0; k < a.length; k += 1) {
      const gap = Math.abs(a[k] - b[k]);
      if (!(gap <= difference)) difference = Number.isNaN(gap) ? Infinity : gap;
      squares += gap * gap;
    }
    count += b.length;
  });
  return { difference, rms: Number.isFinite(difference) ? Math.sqrt(squares / Math.max(count, 1)) : Infinity };
}

export function toBase64(floats) {
  const bytes = new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

export function fromBase64(text) {
  return new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}
