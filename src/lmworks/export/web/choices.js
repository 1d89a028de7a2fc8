// What can be loaded: the precisions that the page came with, and the devices that this browser has.

const version = new URL(import.meta.url).search;
const { $, element, megabytes, sum } = await import(`./dom.js${version}`);

const LARGE = 100e6; // bytes from which the smaller file is suggested first
const ABOUT = {
  fp32: "32-bit floats: the very answers of the trained model",
  fp16: "16-bit floats: half the size, nearly the same answers",
  int8: "8-bit integers: smaller, nearly the same answers",
  uint8: "8-bit integers without a sign: as int8",
  q4: "4-bit weights: smallest, answers may differ",
  q4f16: "4-bit weights, 16-bit floats: smallest, answers may differ",
  bnb4: "4-bit floats (NF4): smallest, answers may differ",
  wasm: "WebAssembly, in every browser",
  webgpu: "WebGPU, on the graphics card",
};
const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" };
const HALVES = ["fp16", "q4f16"];
const HALF = "needs a graphics card that computes in 16 bits";
export class Choices {
  constructor(page) {
    this.page = page;
    this.half = false; // the graphics card computes in 16 bits
  }

  async offer() {
    const sizes = Object.entries(this.page.dtypes).map(([dtype, { bytes }]) => [dtype, bytes]);
    const known = this.page.dtypes;
    const first = known.fp32?.bytes > LARGE && known.int8 ? "int8" : sizes[0][0];
    for (const [dtype, bytes] of sizes) $("dtypes").append(choice("dtype", dtype, megabytes(bytes), dtype === first));
    const adapter = await findAdapter(this.page.files);
    this.half = adapter?.features.has("shader-f16") ?? false;
    $("devices").append(choice("device", "wasm", "", true));
    if (adapter) $("devices").append(choice("device", "webgpu", "", false));
    $("devices").hidden = !adapter;
    this.fit();
  }

  // Grey out what the chosen device cannot run, and say why.
  fit() {
    const { device } = this.chosen();
    const inputs = [...document.querySelectorAll('input[name="dtype"]')];
    for (const input of inputs) {
      const why = unfit(input.value, device, this.half);
      input.disabled = why !== null;
      input.closest("label").querySelector("small").textContent = why === null ? ABOUT[input.value] : `Not here: ${why}.`;
    }
    const able = inputs.find((input) => !input.disabled);
    if (able && inputs.some((input) => input.checked && input.disabled)) able.checked = true;
  }

  chosen() {
    const value = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
    return { dtype: value("dtype"), device: value("device") };
  }

  select(group, value) {
    document.querySelector(`input[name="${group}"][value="${value}"]`).checked = true;
    this.fit();
  }

  // What is fetched at most, in bytes: the model with its tokenizer, and the WebAssembly build that this browser takes.
  sizes() {
    const size = (name) => this.page.files[name].bytes;
    const names = downloadNames(this.page, this.chosen());
    const runtime = names.filter((name) => name.startsWith("web/"));
    return [sum(names.map(size)) - sum(runtime.map(size)), sum(runtime.map(size))];
  }
}

// The files that a load takes: everything but the graphs of other precisions and other builds of the runtime.
export function downloadNames(page, { dtype, device }) {
  const { file, files = [file] } = page.dtypes[dtype];
  const jspi = "Suspending" in WebAssembly && has(page.files, ".jspi");
  const variant = jspi ? ".jspi" : device === "webgpu" ? ".asyncify" : "";
  const build = `web/vendor/ort-wasm-simd-threaded${variant}.`;
  return Object.keys(page.files).filter((name) => {
    if (name.startsWith("onnx/")) return files.includes(name);
    if (name.startsWith("web/vendor/")) return name.endsWith("/transformers.min.js") || [`${build}mjs`, `${build}wasm`].includes(name);
    return true;
  });
}

// Why a precision cannot run; null where it can. WebAssembly runs them all.
function unfit(dtype, device, half) {
  return device === "webgpu" && HALVES.includes(dtype) && !half ? HALF : null;
}

async function findAdapter(files) {
  const built = ("Suspending" in WebAssembly && has(files, ".jspi")) || has(files, ".asyncify");
  try {
    return built ? ((await navigator.gpu?.requestAdapter()) ?? null) : null;
  } catch {
    return null;
  }
}

function has(files, variant) {
  return `web/vendor/ort-wasm-simd-threaded${variant}.wasm` in files;
}

function choice(group, value, size, checked) {
  const label = element("label", "", { class: "choice" });
  const input = Object.assign(document.createElement("input"), { type: "radio", name: group, value, checked });
  label.append(input, element("b", NAMES[value] ?? value), element("span", size, { class: "size" }), element("small", ABOUT[value]));
  return label;
}
