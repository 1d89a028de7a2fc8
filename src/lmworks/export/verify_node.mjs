// Answer a recorded self-test with transformers.js in Node. One JSON object in on stdin, one out on stdout:
// { modules, folder, task, dtype, prompts | items, texts, options, threads } -> { answers, texts, versions } | { error }

import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { Engine, answer } from "./web/engine.js";
import { openTask } from "./web/tasks.js";

const work = JSON.parse(await text(process.stdin));
const { modules, folder, task = "text-generation", dtype, prompts = [], items = [], texts = [], options = {}, threads } = work;

async function run() {
  const library = createRequire(join(modules, "lmworks.js"))("@huggingface/transformers");
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, useFSCache: false, useWasmCache: false });
  library.env.logLevel = library.LogLevel?.ERROR ?? 40;
  const session = { intraOpNumThreads: threads, interOpNumThreads: 1 };
  const settings = { task, dtype, device: "cpu", session };
  const writes = task === "text-generation";
  const engine = writes ? await Engine.open(library, folder, settings) : await openTask(library, folder, settings);
  const answers = writes ? await answer(engine, prompts) : await engine.answer(items, { options });
  const versions = { "transformers.js": library.env.version, node: process.versions.node };
  return { answers, texts: texts.map((item) => engine.encode(item.text)), versions };
}

const result = await run().catch((error) => ({ error: error?.message ?? String(error) }));
process.stdout.write(JSON.stringify(result), () => process.exit(0));
