// What the page says about its model: facts, scores beside those of others, and the certificate.

const version = new URL(import.meta.url).search;
const { $, bar, element } = await import(`./dom.js${version}`);
const { readJson, single } = await import(`./source.js${version}`);

const RUNTIMES = {
  torch: "PyTorch",
  onnx: "ONNX Runtime",
  node: "Node.js",
  browser: "Chromium, one thread",
  "browser-2": "Chromium, two threads",
  webgpu: "Chromium, WebGPU",
};
const COUNTED = {
  tokens: "Greedy tokens equal to those that PyTorch computed in 32-bit floats. fp32 has to give every one; a smaller precision has to keep its logits near.",
  decisions: "Decisions equal to those that PyTorch computed in 32-bit floats. fp32 has to give every one; a smaller precision has to keep its logits near.",
};

export function showAbout(page) {
  for (const [name, value] of page.rows) $("facts").append(element("dt", name), element("dd", value));
  showBars(page.bars);
  showCertificate(page).catch(() => {}); // a folder that was never verified has none
}

function showBars({ title, note, rows }) {
  if (rows.length < 2) return;
  $("bars").hidden = false;
  $("bars").querySelector("figcaption").textContent = title;
  $("bars").querySelector("p").textContent = note;
  const most = Math.max(...rows.map(([, value]) => value));
  for (const [name, value] of rows) $("bars").querySelector("ul").append(bar(name, value.toFixed(3), value / most));
}

// The certificate is written after this page, so it is read when the page is opened.
async function showCertificate({ report = false }) {
  const { runtimes } = await readJson("certificate.json");
  const cells = Object.values(runtimes).flatMap((row) => Object.values(row));
  const dtypes = [...new Set(Object.values(runtimes).flatMap((row) => Object.keys(row)))];
  $("certificate").querySelector("p").textContent = COUNTED[cells.some((cell) => cell.decisions_equal) ? "decisions" : "tokens"];
  const head = element("tr");
  head.append(element("th", "runtime", { scope: "col" }), ...dtypes.map((dtype) => element("th", dtype, { scope: "col" })));
  $("certificate").querySelector("thead").append(head);
  for (const [name, row] of Object.entries(runtimes)) {
    const line = element("tr");
    line.append(element("th", RUNTIMES[name] ?? name, { scope: "row" }), ...dtypes.map((dtype) => verdict(row[dtype])));
    $("certificate").querySelector("tbody").append(line);
  }
  $("certificate").hidden = false;
  if (single) return;
  if (report) $("links").append(element("a", "Report", { href: "report.html" }));
  $("links").append(element("a", "Certificate", { href: "certificate.json" }));
}

function verdict(cell) {
  if (!cell) return element("td", "–");
  if (cell.skipped) return element("td", "not checked");
  const equal = cell.tokens_equal ?? cell.decisions_equal;
  return element("td", `${equal.join(" of ")} ${cell.passed ? "✓" : "✗"}`, { "data-verdict": cell.passed ? "good" : "bad" });
}
