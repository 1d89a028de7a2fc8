// text-classification: the labels with bars, the likeliest first.

const version = new URL(import.meta.url).search;
const { $, bar, element, percent, plural } = await import(`./dom.js${version}`);
const { LONG, View, areaHtml, selectHtml } = await import(`./view.js${version}`);

const MOST = 8; // labels shown before the rest is asked for

export class Classify extends View {
  verb = "Classify";
  fields = areaHtml("text", "Text", { placeholder: "What the model should judge." });
  settings = selectHtml("long", LONG, this.page.options.long);

  show(labels, _, { scores }) {
    showLabels(labels, scores);
  }
}

// Show [{ label, score }, …]; "none" are a model's own numbers, which are no probabilities.
export function showLabels(labels, scores) {
  const most = Math.max(...labels.map(({ score }) => Math.abs(score)), 1e-12);
  const write = (score) => (scores === "none" ? score.toPrecision(4) : percent(score));
  const list = element("ol", "", { class: "labels" });
  labels.forEach(({ label, score }, i) => {
    const row = bar(label, write(score), scores === "none" ? Math.abs(score) / most : score);
    row.hidden = i >= MOST;
    list.append(row);
  });
  $("result").replaceChildren(list);
  if (labels.length > MOST) {
    const all = element("button", `Show all ${labels.length} labels`, { type: "button", class: "link" });
    all.onclick = () => {
      for (const row of list.children) row.hidden = false;
      all.remove();
    };
    $("result").append(all);
  }
  const above = labels.filter(({ score }) => score > 0.5);
  const said = scores === "sigmoid" ? above : labels.slice(0, 1);
  $("spoken").textContent = said.length
    ? said.map(({ label, score }) => `${label}: ${write(score)}`).join(", ")
    : `None of ${plural(labels.length, "label")} is likely.`;
}
