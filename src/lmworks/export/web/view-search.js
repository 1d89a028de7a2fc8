// feature-extraction: lines of text, ranked by how near they are to a query.

const version = new URL(import.meta.url).search;
const { $, bar, element, plural } = await import(`./dom.js${version}`);
const { LONG, View, areaHtml, demand, selectHtml } = await import(`./view.js${version}`);

const GROUP = 8; // lines that are read before the page says how far it is, and can stop
const MOST = 50; // lines shown

export class Search extends View {
  verb = "Search";
  fields = `<label for="query">Query</label>
    <input id="query" type="search" autocomplete="off" placeholder="What to look for">
    ${areaHtml("lines", "Lines to search, one a line", { rows: 8, placeholder: "Paste lines here." })}`;
  settings = selectHtml("long", LONG, this.page.options.long);
  vectors = new Map(); // of what was read already, until another model is loaded or an option changes
  known = "";
  stopped = false;

  start(examples) {
    const texts = [...new Set(examples.flatMap(({ texts }) => texts))];
    super.start(texts.length ? [{ query: texts.at(-1), lines: texts.slice(0, -1).join("\n") }] : []);
    $("examples").hidden = true; // one example, which is there
  }

  loaded() {
    this.vectors.clear();
  }

  describe({ query }) {
    return query;
  }

  fill({ query, lines }) {
    $("query").value = query;
    $("lines").value = lines;
  }

  read() {
    const query = demand("query", "Write a query first.");
    const lines = demand("lines", "Paste some lines to search.").split(/\r\n|\r|\n/).filter((line) => line.trim() !== "");
    return { texts: [query, ...lines] };
  }

  texts({ texts }) {
    return texts;
  }

  stop() {
    this.stopped = true;
  }

  async act(session) {
    const input = this.read();
    const options = this.options();
    await session.ready();
    if (this.known !== JSON.stringify(options)) this.vectors.clear();
    this.known = JSON.stringify(options);
    const started = performance.now();
    const [query, ...lines] = input.texts;
    const missing = [...new Set(input.texts)].filter((text) => !this.vectors.has(text));
    this.stopped = false;
    for (let at = 0; at < missing.length && !this.stopped; at += GROUP) {
      const group = missing.slice(at, at + GROUP);
      try {
        const { embeddings } = await session.run({ texts: group }, options);
        group.forEach((text, i) => this.vectors.set(text, embeddings[i]));
      } catch (error) {
        if (!this.stopped || !this.vectors.has(query) || session.client?.ended !== null) throw error;
      }
      $("speed").textContent = `${Math.min(at + GROUP, missing.length)} of ${plural(missing.length, "text")}`;
    }
    const read = lines.map((text, place) => ({ text, place })).filter(({ text }) => this.vectors.has(text));
    const ranked = read.map((line) => ({ ...line, score: cosine(this.vectors.get(query), this.vectors.get(line.text)) }));
    ranked.sort((a, b) => b.score - a.score || a.place - b.place);
    this.show(ranked);
    const seconds = ((performance.now() - started) / 1000).toFixed(2);
    $("speed").textContent = `${plural(missing.length, "text")} read · ${seconds} s`;
    const left = lines.length - read.length;
    const cut = left ? `Stopped: ${plural(left, "line")} not read.` : "";
    const long = await this.describeLength(session, input, options);
    $("ending").textContent = [cut, long].filter(Boolean).join(" ");
    document.documentElement.dataset.output = JSON.stringify(ranked);
    await this.attention?.offer({ texts: [query, ...ranked.slice(0, MOST).map(({ text }) => text)] }, options);
  }

  show(ranked) {
    const list = element("ol", "", { class: "labels ranked" });
    for (const { text, score } of ranked.slice(0, MOST)) list.append(bar(text, score.toFixed(3), score));
    $("result").replaceChildren(list);
    if (ranked.length > MOST) $("result").append(element("p", `The best ${MOST} of ${ranked.length} lines.`, { class: "quiet small" }));
    $("spoken").textContent = ranked.length ? `Nearest: ${ranked[0].text}, cosine ${ranked[0].score.toFixed(3)}` : "";
  }
}

function cosine(a, b) {
  let dot = 0, x = 0, y = 0;
  for (let i = 0; i < a.length; i += 1) {
    dot += a[i] * b[i];
    x += a[i] * a[i];
    y += b[i] * b[i];
  }
  return dot / Math.max(Math.sqrt(x * y), 1e-12);
}
