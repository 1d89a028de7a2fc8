// The loaded model: one worker, ended on a switch of precision or device, on any error and when the page is left. That is
// the only way to give WebAssembly its memory back.

const version = new URL(import.meta.url).search;
const { $, megabytes, plural } = await import(`./dom.js${version}`);
const { Client } = await import(`./client.js${version}`);
const { compare } = await import(`./engine.js${version}`);
const { compareTask } = await import(`./tasks.js${version}`);
const { provide } = await import(`./source.js${version}`);
const { downloadNames } = await import(`./choices.js${version}`);

const WRITES = "text-generation";
const QUICK = { limit: 16, budget: 1500 }; // the self-test on load: tokens a prompt, milliseconds until the last one begins
const UNLOADED = "The model was unloaded.";

export class Session {
  // `choices` says what to load; `onChange` is called whenever what can be done changes.
  constructor(page, selftest, choices, onChange) {
    Object.assign(this, { page, selftest, choices, onChange });
    this.task = page.task ?? WRITES;
    this.client = null;
    this.info = null; // { threads, context, labels, mask, attentions } of the loaded model
  }

  get loaded() {
    return this.info !== null;
  }

  // Load what is chosen and hold it to the record. WebGPU, where it fails or gives other answers, makes way for WebAssembly.
  async load() {
    this.unload("");
    const { device } = this.choices.chosen();
    if (device !== "webgpu") {
      await this.start();
      return;
    }
    let problem = "gave other answers than the record";
    try {
      if (await this.start()) return;
    } catch (error) {
      if (error.message === UNLOADED) throw error;
      problem = `failed (${error.message.split("\n")[0].slice(0, 120)})`;
    }
    this.choices.select("device", "wasm");
    this.unload("");
    await this.start();
    $("state").textContent += ` This browser's WebGPU ${problem}, so the page went back to WebAssembly.`;
  }

  async start() {
    const { dtype, device } = this.choices.chosen();
    $("progress").hidden = false;
    $("progress").value = 0;
    $("state").textContent = "Loading …";
    const client = (this.client = new Client());
    this.onChange();
    const onNote = ({ loaded, total }) => {
      $("progress").value = (100 * loaded) / total;
      $("state").textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)}` : "Starting …";
    };
    let info;
    try {
      const files = await provide(this.page.files, downloadNames(this.page, { dtype, device }));
      info = await client.call("load", { task: this.task, dtype, device, files, threads: null }, onNote);
    } catch (error) {
      client.end(error.message);
      throw error;
    } finally {
      $("progress").hidden = true;
    }
    this.info = info;
    const where = device === "webgpu" ? "WebGPU" : `WebAssembly, ${plural(info.threads, "thread")}`;
    $("state").textContent = `Ready: ${dtype} on ${where}.`;
    document.documentElement.dataset.loaded = `${dtype} ${device}`;
    this.onChange();
    return this.test(QUICK);
  }

  async ready() {
    if (!this.loaded) await this.load();
  }

  async call(type, values, onNote = null) {
    return this.client.call(type, values, onNote);
  }

  async run(input, options) {
    return this.client.call("run", { input, options });
  }

  async attend(input, options, choice) {
    return this.client.call("attend", { input, options, choice });
  }

  // How many tokens each text has, special tokens included.
  async countTokens(texts) {
    const { texts: ids } = await this.client.call("check", { items: [], texts: texts.map((text) => ({ text })) });
    return ids.map((row) => row.length);
  }

  // Compare with what torch recorded when the model was made. fp32 must decide the same; other precisions may differ a little.
  async test(bounds) {
    const { dtype } = this.choices.chosen();
    const line = $("selftest");
    delete line.dataset.verdict;
    line.textContent = "Self-test …";
    $("fulltest").hidden = true;
    const { equal, checked, difference, rms, ids, whole } = await this.compare(bounds);
    const exact = dtype === "fp32";
    const passed = ids === null && (exact ? difference : rms) <= this.selftest.tolerance[dtype] && (!exact || equal === checked);
    const things = this.task === WRITES ? "tokens" : "decisions";
    line.dataset.verdict = passed ? "good" : "bad";
    line.textContent =
      ids !== null
        ? "Self-test failed: the tokenizer gives other tokens than the recorded ones."
        : `Self-test ${passed ? "passed" : "failed"}: ${equal} of ${checked} ${things} as PyTorch recorded them; ` +
          (exact ? `largest difference of a logit ${difference.toExponential(1)}.` : `logits differ by ${rms.toExponential(1)} in root mean square.`);
    $("fulltest").hidden = whole;
    document.documentElement.dataset.selftest = passed ? "passed" : "failed";
    return passed;
  }

  async compare(bounds) {
    const { items, prompts, options } = this.selftest;
    if (this.task === WRITES) {
      const { answers } = await this.client.call("check", { prompts, ...bounds });
      return { ...compare(answers, prompts), whole: !("limit" in bounds) };
    }
    const { answers } = await this.client.call("check", { items, options, budget: bounds.budget });
    return { ...compareTask(this.task, answers, items, options), whole: answers.length === items.length };
  }

  // Ask the worker to stop where it can.
  stop() {
    this.client?.stop();
  }

  unload(message) {
    this.client?.end(UNLOADED);
    this.client = this.info = null;
    delete document.documentElement.dataset.loaded;
    delete document.documentElement.dataset.selftest;
    $("state").textContent = message;
    $("selftest").textContent = "";
    $("fulltest").hidden = true;
    this.onChange();
  }
}
