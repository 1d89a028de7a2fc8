// Ask the page's engine (web/tasks.js) in Node. One JSON object in on stdin, one out on stdout:
// { modules, jobs: [{ folder, task, dtype, calls: [{ input, options, choice }] }] } -> [[answer | { error, name }]]; with a
// `choice` the answer is where the tokens look
// { modules, folder, layers: [heads, …] } -> what a graph is asked, and made of it, whose n-th layer gives n + 1 everywhere
// { modules, folders: [{ folder, texts, pairs, windows: [[before, text, length, overlap]] }] } -> [{ texts, pairs, windows, decoded }]
// { modules, pictures: [{ image, steps }] } -> [[number of pixel_values]]
// { modules, comparisons: [[task, answers, items, options]] } -> [what compareTask says]
// { modules, folder, context, prompts: [[text, room]] } -> [{ ids, cut, back }]: where writing starts, and the ids as text again
// { modules, folder, chats: [{ messages, template, tokens, room }] } -> [{ text, ids, dropped } | { error, name }]

import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";

const work = JSON.parse(await text(process.stdin));
const web = new URL("../../src/lmworks/export/web/", import.meta.url);
const load = (name) => import(new URL(`${name}.js`, web));
const library = createRequire(join(work.modules, "lmworks.js"))("@huggingface/transformers");
Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, useFSCache: false, useWasmCache: false });
library.env.logLevel = library.LogLevel?.ERROR ?? 40;

async function tryTo(make) {
  try {
    return await make();
  } catch (error) {
    return { error: error.message, name: error.name };
  }
}

async function runJobs() {
  const { openTask } = await load("tasks");
  const found = [];
  for (const { folder, task, dtype, calls } of work.jobs) {
    const session = { intraOpNumThreads: 1, interOpNumThreads: 1 };
    const model = await openTask(library, folder, { task, dtype, device: "cpu", session });
    const answers = [];
    for (const { input, options, choice } of calls) {
      answers.push(await tryTo(() => (choice ? attend(model, input, options, choice) : model.run(input, options))));
    }
    found.push(answers);
  }
  return found;
}

async function attend(model, ...asked) {
  const found = await model.attend(...asked);
  return { ...found, weights: Array.from(found.weights) };
}

// A graph that only says how often, and for what, it is asked.
async function attendLayers() {
  const { openTask } = await load("tasks");
  const groups = [];
  const session = {
    inputNames: ["input_ids"],
    outputNames: ["last_hidden_state", ...work.layers.map((_, i) => `attentions.${i}`)],
    async run({ input_ids }, names) {
      const size = input_ids.dims[1];
      if (names.join() === "last_hidden_state") return { last_hidden_state: { dims: [1, size, 1], getData: async () => new Float32Array(size) } };
      groups.push(names.length);
      const make = (name) => {
        const i = Number(name.split(".")[1]);
        const dims = [1, work.layers[i], size, size];
        return { dims, getData: async () => new Float32Array(work.layers[i] * size * size).fill(i + 1) };
      };
      return Object.fromEntries(names.map((name) => [name, make(name)]));
    },
  };
  const fake = { ...library, PreTrainedModel: { from_pretrained: async () => ({ sessions: { model: session } }) } };
  const model = await openTask(fake, work.folder, { task: "feature-extraction", dtype: "fp32", device: "cpu" });
  await model.run({ texts: ["a"] });
  const { heads, weights, tokens } = await model.attend({ texts: ["a ".repeat(2000)] }, { long: "truncate" });
  return { groups, heads, tokens: tokens.length, weights: [...new Set(weights)], length: weights.length };
}

async function encode() {
  const { Encoder } = await load("encoding");
  const show = (tokens) => tokens.map((one) => [one.id, one.token, one.start, one.end, one.word, one.type, one.sequence, one.special]);
  const found = [];
  for (const { folder, texts, pairs, windows } of work.folders) {
    const encoder = new Encoder(await library.AutoTokenizer.from_pretrained(folder));
    found.push({
      texts: texts.map((one) => show(encoder.encode(one))),
      pairs: pairs.map(([one, two]) => show(encoder.encode(one, two))),
      windows: windows.map(([before, one, length, overlap]) => encoder.windows(one, { before, length, overlap }).map(show)),
      decoded: texts.map((one) => encoder.decode(encoder.encode(one).map((token) => token.id), { skip: false })),
    });
  }
  return found;
}

async function preparePictures() {
  const { prepare, readPicture, readSteps } = await load("pictures");
  return Promise.all(work.pictures.map(({ image, steps }) =>
    tryTo(async () => Array.from(prepare(await readPicture(image, library), readSteps(steps)).data))));
}

async function compareAll() {
  const { compareTask } = await load("tasks");
  return work.comparisons.map((one) => compareTask(...one));
}

async function converse() {
  const { Engine, renderChat } = await load("engine");
  const tokenizer = await library.AutoTokenizer.from_pretrained(work.folder);
  const engine = new Engine(library, tokenizer, { config: { max_position_embeddings: work.context, eos_token_id: 0 } });
  return Promise.all(work.chats.map(({ messages, ...how }) =>
    tryTo(() => ({ text: renderChat(tokenizer, messages, how), ...engine.converse(messages, how) }))));
}

async function begin() {
  const { Engine } = await load("engine");
  const tokenizer = await library.AutoTokenizer.from_pretrained(work.folder);
  const engine = new Engine(library, tokenizer, { config: { max_position_embeddings: work.context, eos_token_id: 0 } });
  return work.prompts.map(([one, room]) => ({ ...engine.prompt(one, { room }), back: engine.decode(engine.encode(one)) }));
}

const run = work.prompts ? begin : work.chats ? converse : work.layers ? attendLayers : work.jobs ? runJobs : work.folders ? encode : work.pictures ? preparePictures : compareAll;
const result = await run().catch((error) => ({ error: error?.stack ?? String(error) }));
process.stdout.write(JSON.stringify(result), () => process.exit(0));
