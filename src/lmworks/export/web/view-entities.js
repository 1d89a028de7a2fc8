// token-classification: the entities highlighted in the text, a legend of their types, and a table of them.

const version = new URL(import.meta.url).search;
const { $, element, percent, plural } = await import(`./dom.js${version}`);
const { LONG, View, areaHtml, selectHtml } = await import(`./view.js${version}`);

const AGGREGATION = {
  label: "Words",
  choices: {
    first: "whole, by their first token",
    average: "whole, by the mean of tokens",
    max: "whole, by the surest token",
    simple: "may be split",
    none: "each token by itself",
  },
};
const COLOURS = 8; // in style.css

export class Entities extends View {
  verb = "Find entities";
  fields = areaHtml("text", "Text", { rows: 5, placeholder: "A text with names in it." });
  settings =
    selectHtml("aggregation", AGGREGATION, this.page.options.aggregation) + selectHtml("long", LONG, this.page.options.long);

  show(entities, { text }) {
    const kinds = [...new Set((this.page.labels ?? []).filter((label) => label !== "O").map(kindOf))];
    const colour = (label) => `kind-${Math.max(0, kinds.indexOf(kindOf(label))) % COLOURS}`;
    const found = [...new Set(entities.map(({ label }) => kindOf(label)))];
    const legend = element("ul", "", { class: "legend", "aria-label": "Types" });
    for (const kind of found) {
      const count = entities.filter(({ label }) => kindOf(label) === kind).length;
      legend.append(element("li", `${kind} ${count}`, { class: colour(kind) }));
    }
    const body = element("p", "", { class: "marked" });
    body.append(...mark(text, entities, colour));
    $("result").replaceChildren(legend, body);
    if (entities.length) $("result").append(makeTable(entities, text));
    else legend.replaceChildren(element("li", "No entity was found."));
    $("spoken").textContent = entities.length
      ? `${plural(entities.length, "entity", "entities")}: ${entities.map((e) => `${slice(text, e)}, ${e.label}`).join("; ")}`
      : "No entity was found.";
  }
}

// Python counts characters as Unicode code points, JavaScript does not.
export function slice(text, { start, end }) {
  return Array.from(text).slice(start, end).join("");
}

function mark(text, entities, colour) {
  const characters = Array.from(text);
  const parts = [];
  let at = 0;
  for (const { label, start, end, score } of entities) {
    if (start === null || start < at) continue; // a place that is marked already
    parts.push(characters.slice(at, start).join(""));
    const mark = element("mark", characters.slice(start, end).join(""), { class: colour(label), title: `${label}, ${percent(score)}` });
    mark.append(element("small", ` ${kindOf(label)}`));
    parts.push(mark);
    at = end;
  }
  return [...parts, characters.slice(at).join("")];
}

function makeTable(entities, text) {
  const table = element("table", "", { class: "found" });
  const head = element("tr");
  head.append(...["Entity", "Type", "Score", "Characters"].map((name) => element("th", name, { scope: "col" })));
  table.append(head);
  for (const entity of entities) {
    const row = element("tr");
    const place = entity.start === null ? "–" : `${entity.start}–${entity.end}`;
    const said = entity.start === null ? entity.word : slice(text, entity);
    row.append(...[said, entity.label, percent(entity.score), place].map((value) => element("td", value)));
    table.append(row);
  }
  const more = element("details", "", { class: "list" });
  more.append(element("summary", "As a list"), table);
  return more;
}

function kindOf(label) {
  return label.replace(/^[BIESLU]-/, "");
}
