// llama.cpp through node-llama-cpp, whose package holds builds for every generation of processors and picks one:
// `how` is `type`, a tensor type of GGUF (F32 F16 BF16 Q8_0 Q4_0). The protocol is race.py's.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, renameSync } from "node:fs";
import { createInterface } from "node:readline";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const WARM_UP = 2;
const CONTEXT = 256;

function makeFile({ model, type, environment }) {
  const path = join(model, "llama.cpp", `${type}.gguf`);
  if (!existsSync(path)) {
    mkdirSync(dirname(path), { recursive: true });
    const script = join(dirname(fileURLToPath(import.meta.url)), "gguf_file.py");
    const staged = `${path}.partial`;
    execFileSync(join(environment, "bin", "python"), [script, model, staged, type], { stdio: ["ignore", 2, 2] });
    renameSync(staged, path);
  }
  return path;
}

async function open(setting) {
  const { getLlama } = await import(join(setting.environment, "node_modules/node-llama-cpp/dist/index.js"));
  const logger = (level, message) => console.error(level, message);
  const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logger, maxThreads: setting.threads });
  const model = await llama.loadModel({ modelPath: makeFile(setting) });
  const kind = setting.type === "F32" ? "F32" : "F16";
  const context = await model.createContext({
    contextSize: CONTEXT, threads: setting.threads, flashAttention: true,
    experimentalKvCacheKeyType: kind, experimentalKvCacheValueType: kind,
  });
  const sequence = context.getSequence();
  return {
    async logits(ids) {
      await sequence.clearHistory();
      const last = [ids.at(-1), { generateNext: { logits: true, token: true, options: { temperature: 0 } } }];
      const found = (await sequence.controlledEvaluate([...ids.slice(0, -1), last])).at(-1).next.logits;
      return Float32Array.from({ length: found.size }, (_, id) => found.get(id));
    },
    async generate(ids, tokens) {
      await sequence.clearHistory();
      const written = [];
      for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
        written.push(token);
        if (written.length === tokens) break;
      }
      return written;
    },
  };
}

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
let turn = null;
for await (const line of createInterface({ input: process.stdin })) {
  if (turn) {
    say(await turn());
    continue;
  }
  const setting = JSON.parse(line);
  const { prompt, tokens } = setting;
  const model = await open(setting);
  const logits = Buffer.from((await model.logits(prompt)).buffer).toString("base64");
  const answer = { logits, tokens: await model.generate(prompt, tokens) };
  turn = async () => {
    const times = [];
    for (const count of [1, tokens]) {
      const start = performance.now();
      await model.generate(prompt, count);
      times.push((performance.now() - start) / 1000);
    }
    return times[1] > times[0] ? (tokens - 1) / (times[1] - times[0]) : turn(); // disturbed: once more
  };
  for (let i = 0; i < WARM_UP; i += 1) await turn();
  say(answer);
}
process.exit(0);
