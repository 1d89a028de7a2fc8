// Ask llama.cpp: node run.mjs QUESTIONS.json ANSWERS.json
// {path, texts, prompts: [[id, …]], count, rows: [[id, …]]} -> {ids of each text, ids that follow each prompt by greedy
// choice (until one that ends a text), logits of every token of each row, and what the file says of special tokens}
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const work = JSON.parse(readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: 1,
    logLevel: LlamaLogLevel.warn, logger: (level, message) => console.error(level, message)});
const found = [];
for (const {path, texts = [], prompts = [], count = 0, rows = []} of work) {
    const model = await llama.loadModel({modelPath: path, gpuLayers: 0, useMmap: false});
    const context = await model.createContext({contextSize: Math.min(512, model.trainContextSize), threads: 1,
        flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
    const sequence = context.getSequence();
    const greedy = [];
    for (const prompt of prompts) {
        await sequence.clearHistory();
        const next = [];
        for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
            next.push(token);
            if (next.length >= count || model.isEogToken(token)) break;
        }
        greedy.push(next);
    }
    const logits = [];
    for (const row of rows) {
        await sequence.clearHistory();
        const out = await sequence.controlledEvaluate(row.map((token) => [token, {generateNext: {logits: true}}]));
        logits.push(out.map(({next}) => {
            const numbers = new Float32Array(next.logits.size);
            for (const [token, logit] of next.logits) numbers[token] = logit;
            return Buffer.from(numbers.buffer).toString("base64");
        }));
    }
    const {bos, eos, eot, shouldPrependBosToken} = model.tokens;
    found.push({ids: texts.map((text) => model.tokenize(text, true)), greedy, logits,
        special: {bos, eos, eot, begins: shouldPrependBosToken}, context: model.trainContextSize});
    await context.dispose();
    await model.dispose();
}
writeFileSync(process.argv[3], JSON.stringify(found));
await llama.dispose();
