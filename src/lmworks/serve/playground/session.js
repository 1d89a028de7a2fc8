// The server, in the shape of the session that the views know: what a worker does for the export's page, its routes do here.

const STOPPED = "Stopped.";
const KEY = { key: "" }; // in memory only

export class WantsKey extends Error {}

export function setKey(key) {
  KEY.key = key;
}

// Ask a route of this server; without a body it is a GET. Raises an error that says what the server said.
export async function request(path, body = null, signal = undefined) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(KEY.key && { Authorization: `Bearer ${KEY.key}` }) };
  let response;
  try {
    response = await fetch(new URL(`../${path}`, location.href), {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store",
    });
  } catch (error) {
    throw new Error(error.name === "AbortError" ? STOPPED : "The server does not answer.");
  }
  if (response.ok) return response;
  const said = await response.json().then(({ error }) => error.message, () => `The server answered ${response.status}.`);
  if (response.status === 401) throw new WantsKey(said);
  throw new Error(said);
}

async function ask(path, body, signal) {
  return (await request(path, body, signal)).json();
}

// task -> what a view asks (input, options) to the route's body, and its answer to what the view shows
const TASKS = {
  "text-classification": async (ask, { text }, { long }) => (await ask("classify", { text, long })).answers[0],
  "token-classification": async (ask, { text }, { aggregation, long }) =>
    (await ask("ner", { text, aggregation, long })).answers[0].entities,
  "question-answering": async (ask, { question, context }, { top_k, max_answer_length, no_answer }) =>
    (await ask("qa", { question, context, top_k, max_answer_length, no_answer })).answers,
  "fill-mask": async (ask, { text }, { top_k, long }) => (await ask("fill-mask", { text, top_k, long })).answers[0].fills,
  "feature-extraction": async (ask, { texts }, { long }) => ({ embeddings: await ask("embed", { inputs: texts, truncate: long === "truncate" }) }),
};

export class Session {
  constructor(model) {
    this.model = model.name;
    this.task = model.task;
    this.info = { context: model.max_input_length };
    this.client = { ended: null }; // a server is not ended by an error
    this.stopper = null;
    this.remark = ""; // what the server says beside its answer
  }

  async ready() {
    this.stopper = new AbortController();
    this.remark = "";
  }

  async run(input, options) {
    const named = (path, body) => ask(path, { ...body, model: this.model }, this.stopper.signal);
    const answer = await TASKS[this.task](named, input, options);
    if (this.task !== "text-classification") return answer;
    if (answer.ood) this.remark = `This text is unlike those that the model learned from (score ${answer.ood_score.toPrecision(3)}).`;
    return answer.labels;
  }

  // Leave the beginning of a text out where the model could not read it and write half a context, as the export's page does.
  async fit(text, tokens) {
    const keep = this.info.context - Math.min(tokens, Math.ceil(this.info.context / 2));
    if (4 * text.length <= keep) return { prompt: text, cut: 0 }; // a character has 4 bytes at most
    const [found] = await ask("tokenize", { inputs: text, model: this.model }, this.stopper.signal);
    const cut = Math.max(0, found.length - keep);
    return { prompt: cut ? Array.from(text).slice(found[cut].start).join("") : text, cut };
  }

  // Write a text; `onNote` hears each piece. The only call of the views is "generate".
  async call(_, { text, options }, onNote) {
    const { temperature, topK, repetitionPenalty, tokens, seed } = options;
    let count = 0;
    try {
      const { prompt, cut } = await this.fit(text, tokens);
      const body = { prompt, model: this.model, temperature, top_k: topK, repeat_penalty: repetitionPenalty, max_tokens: tokens };
      const started = performance.now();
      const response = await request("generate", seed === null ? body : { ...body, seed }, this.stopper.signal);
      for await (const event of readEvents(response)) {
        if (event.error) throw new Error(event.error.message);
        if (!event.done) {
          count += 1;
          onNote({ piece: event.text, count });
          continue;
        }
        const tokensPerSecond = event.tokens.length / ((performance.now() - started) / 1000);
        const full = event.prompt_tokens + event.tokens.length >= this.info.context;
        return { tokens: event.tokens, tokensPerSecond, reason: event.finish_reason, full, cut, text: event.text };
      }
    } catch (error) {
      if (!this.stopper.signal.aborted) throw error;
      return { tokens: new Array(count), tokensPerSecond: null, reason: "interrupted", full: false, cut: 0 };
    }
    throw new Error("The text was cut off: the connection to the server was lost.");
  }

  // How many tokens each text has, special tokens included.
  async countTokens(texts) {
    const found = await ask("tokenize", { inputs: texts, model: this.model }, this.stopper.signal);
    return found.map((tokens) => tokens.length);
  }

  stop() {
    this.stopper?.abort();
  }
}

async function* readEvents(response) {
  let rest = "";
  for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
  }
}
