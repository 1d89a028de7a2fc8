// Answer the recorded prompts with transformers.js in Node. One JSON object in on stdin, one out on stdout:
// { modules, folder, dtype, prompts, texts, threads } -> { answers, texts, versions } | { error }

import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { Engine, answer } from "./web/engine.js";

const { modules, folder, dtype, prompts, texts, threads } = JSON.parse(await text(process.stdin));

async function run() {
  const library = createRequire(join(modules, "lmworks.js"))("@huggingface/transformers");
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, useFSCache: false, useWasmCache: false });
  library.env.logLevel = library.LogLevel?.ERROR ?? 40;
  const session = { intraOpNumThreads: threads, interOpNumThreads: 1 };
  const engine = await Engine.open(library, folder, { dtype, device: "cpu", session });
  const answers = await answer(engine, prompts);
  const versions = { "transformers.js": library.env.version, node: process.versions.node };
  return { answers, texts: texts.map((item) => engine.encode(item.text)), versions };
}

const result = await run().catch((error) => ({ error: error?.message ?? String(error) }));
process.stdout.write(JSON.stringify(result), () => process.exit(0));
