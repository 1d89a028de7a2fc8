// The attention panel below an answer: which tokens of the text a token looks at, in a layer and a head, or their means.
// It is there where the graph was exported with its attention; what it shows is fetched only while it is open.

const version = new URL(import.meta.url).search;
const { $, bar, element, percent, plural } = await import(`./dom.js${version}`);
const { selectHtml } = await import(`./view.js${version}`);
const { meanOfHeads } = await import(`./tasks.js${version}`);

const MOST = 6; // tokens in the list
const MEAN = "mean";
const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

export class Attention {
  // `attempt` runs one thing at a time, and shows its error.
  constructor(session, attempt) {
    Object.assign(this, { session, attempt });
    this.asked = null; // the input and options of the answer
    this.found = null; // what the model gave for them, and the choice that it was asked with
    this.token = 0;
    this.panel = $("attention");
    this.panel.insertAdjacentHTML(
      "beforeend",
      `<p class="quiet small">Attention shows where the model looks, not why it answers. Choose a token:</p>
      <div class="selects">${["part", "layer", "head"].map((name) => selectHtml(name, { label: title(name), choices: {} })).join("")}</div>
      <div class="tokens" role="listbox" aria-label="Tokens of the text"></div>
      <h3></h3><ol class="labels"></ol><p class="unseen" role="status"></p>`,
    );
    this.selects = Object.fromEntries(Array.from(this.panel.querySelectorAll("select"), (select) => [select.name, select]));
    [this.tokens, this.list] = [".tokens", ".labels"].map((name) => this.panel.querySelector(name));
    this.panel.ontoggle = () => this.panel.open && this.found === null && this.ask();
    this.selects.layer.onchange = this.selects.part.onchange = () => this.ask();
    this.selects.head.onchange = () => this.draw();
    this.tokens.onclick = ({ target }) => this.choose(this.places().indexOf(target));
    this.tokens.onkeydown = (event) => {
      if (!(event.key in MOVES) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.choose(Math.max(0, Math.min(this.places().length - 1, this.token + MOVES[event.key])));
    };
  }

  hide() {
    this.panel.hidden = true;
    this.asked = this.found = null;
  }

  // Called with what was answered. Raises the model's error where the panel is open.
  async offer(input, options) {
    this.hide();
    const layers = this.session.info?.attentions;
    if (!layers) return;
    this.panel.hidden = false;
    this.asked = { input, options };
    offerNumbers(this.selects.layer, "layers", layers);
    this.selects.part.value = "0";
    if (this.panel.open) await this.look();
  }

  // Look, where nothing else is being done; else, or if it fails, the choice goes back to what is shown.
  async ask() {
    if (this.asked) await this.attempt(() => this.look());
    if (!this.found) this.panel.open = false;
    else for (const name of ["part", "layer"]) this.selects[name].value = this.found[name];
  }

  async look() {
    const [layer, part] = [this.selects.layer.value, this.selects.part.value || "0"];
    const choice = { layer: layer === MEAN ? null : Number(layer), part: Number(part) };
    this.panel.setAttribute("aria-busy", "true");
    try {
      await this.session.ready();
      const found = await this.session.attend(this.asked.input, this.asked.options, choice);
      if (part !== this.found?.part) this.token = null;
      this.found = { ...found, layer, part };
    } finally {
      this.panel.setAttribute("aria-busy", "false");
    }
    const { parts, heads, tokens } = this.found;
    if (!tokens.length) return this.hide();
    this.selects.part.replaceChildren(...parts.map((text, i) => new Option(`${i + 1}: ${text}`, i)));
    this.selects.part.value = part;
    this.selects.part.closest("label").hidden = parts.length < 2;
    offerNumbers(this.selects.head, "heads", heads);
    this.tokens.replaceChildren(
      ...tokens.flatMap(({ text, special, joined }) => {
        const place = element("span", text, { role: "option", class: special ? "special" : joined ? "joined" : "" });
        return joined ? [place] : [" ", place];
      }),
    );
    this.token ??= Math.max(0, tokens.findIndex(({ special }) => !special));
    this.draw();
  }

  places() {
    return [...this.tokens.children];
  }

  choose(place) {
    if (place < 0) return;
    this.token = place;
    this.draw();
    this.tokens.children[place].focus();
  }

  // The weights that the chosen token gives to all.
  weights() {
    const { weights, tokens } = this.found;
    const size = tokens.length;
    const head = this.selects.head.value;
    const whole = head === MEAN ? meanOfHeads(weights, size ** 2) : weights.subarray(Number(head) * size ** 2);
    return Array.from(whole.subarray(this.token * size, (this.token + 1) * size));
  }

  draw() {
    const { tokens } = this.found;
    const weights = this.weights();
    const most = Math.max(...weights);
    this.places().forEach((place, i) => {
      place.style.setProperty("--part", `${45 * Math.sqrt(weights[i] / most)}%`);
      place.title = percent(weights[i]);
      place.tabIndex = i === this.token ? 0 : -1;
      place.setAttribute("aria-selected", i === this.token);
      place.setAttribute("aria-label", `${tokens[i].text}, ${percent(weights[i])}`);
    });
    const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, MOST);
    const { text } = tokens[this.token];
    this.panel.querySelector("h3").textContent = `“${text}” looks at`;
    const name = (i) => (i === this.token ? `${tokens[i].text} (itself)` : tokens[i].text);
    this.list.replaceChildren(...order.map((i) => bar(name(i), percent(weights[i]), weights[i])));
    const said = order.slice(0, 3).map((i) => `${name(i)} ${percent(weights[i])}`);
    this.panel.querySelector("[role=status]").textContent = `${text}, token ${this.token + 1} of ${plural(tokens.length, "token")}, looks at ${said.join(", ")}`;
  }
}

function title(name) {
  return { part: "Text", layer: "Layer", head: "Head" }[name];
}

// The mean of all, then as many numbers; what was chosen stays where it can.
function offerNumbers(select, all, count) {
  if (select.length === count + 1) return;
  const { value } = select;
  select.replaceChildren(new Option(`mean of ${all}`, MEAN), ...Array.from({ length: count }, (_, i) => new Option(i + 1, i)));
  select.value = value !== "" && Number(value) < count ? value : MEAN;
}
