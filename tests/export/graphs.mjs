// Run graphs as they are, or transformers.js's pipelines over them. One JSON object in on stdin, one out on stdout:
// { modules, library, runs: [{ path, feeds: { name: { type, dims, data } }, outputs }] } -> [{ name: [numbers] }]
// { modules, pipelines: [{ task, folder, dtype, calls: [[arguments]] }] } -> [[answers]]

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";

const work = JSON.parse(await text(process.stdin));
const load = createRequire(join(work.modules, "lmworks.js"));

async function runGraphs() {
  const ort = load(work.library);
  if (work.library === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  const found = [];
  for (const { path, feeds, outputs } of work.runs) {
    const options = { logSeverityLevel: 3, ...(work.library === "onnxruntime-web" ? { executionProviders: ["wasm"] } : {}) };
    const session = await ort.InferenceSession.create(readFileSync(path), options);
    const inputs = {};
    for (const [name, { type, dims, data }] of Object.entries(feeds)) {
      const values = type === "int64" ? BigInt64Array.from(data.map(BigInt)) : Float32Array.from(data);
      inputs[name] = new ort.Tensor(type, values, dims);
    }
    const given = await session.run(inputs, outputs);
    found.push(Object.fromEntries(outputs.map((name) => [name, Array.from(given[name].data)])));
    await session.release();
  }
  return found;
}

async function runPipelines() {
  const library = load("@huggingface/transformers");
  Object.assign(library.env, { allowRemoteModels: false, allowLocalModels: true, useFSCache: false, useWasmCache: false });
  library.env.logLevel = library.LogLevel?.ERROR ?? 40;
  const found = [];
  for (const { task, folder, dtype, calls } of work.pipelines) {
    const session_options = { intraOpNumThreads: 1 };
    const answer = await library.pipeline(task, folder, { dtype, device: "cpu", session_options });
    const answers = [];
    for (const one of calls) {
      const given = await answer(...one);
      answers.push(typeof given?.tolist === "function" ? given.tolist() : given);
    }
    found.push(answers);
    await answer.dispose();
  }
  return found;
}

const result = await (work.runs ? runGraphs() : runPipelines()).catch((error) => ({ error: error?.stack ?? String(error) }));
process.stdout.write(JSON.stringify(result), () => process.exit(0));
