// What the views of all tasks share: fields that are read into an input, options, an output that is shown.

const version = new URL(import.meta.url).search;
const { $, element, plural } = await import(`./dom.js${version}`);

export const LONG = {
  label: "Texts that are longer than the model reads",
  choices: { window: "in overlapping windows", truncate: "only the beginning", error: "are an error" },
};

export class View {
  verb = "Answer";
  fields = ""; // HTML of the inputs
  settings = ""; // HTML of the options

  attention = null; // the panel below the answer (attention.js), where the page has one

  constructor(page) {
    this.page = page;
  }

  // Called once, when the fields are in the page. `examples` are inputs of the self-test.
  start(examples) {
    for (const example of examples) {
      const text = this.describe(example).trim().replace(/\s+/g, " ");
      if (!/\p{L}/u.test(text)) continue;
      const chip = element("button", text, { type: "button", title: text });
      chip.onclick = () => {
        this.fill(example);
        this.clear();
        this.first().focus();
      };
      $("examples").append(chip);
    }
    $("examples").hidden = examples.length === 0;
    if (examples.length) this.fill(examples[0]);
  }

  // Called with what the worker said of itself after each load.
  loaded() {}

  first() {
    return $("fields").querySelector("textarea, input");
  }

  // What an example's button says, and putting it into the fields.
  describe({ text }) {
    return text;
  }

  fill({ text }) {
    $("text").value = text;
  }

  read() {
    return { text: demand("text", "Write a text first.") };
  }

  // The texts of an input whose length the model limits.
  texts({ text }) {
    return [text];
  }

  options() {
    return { ...this.page.options, ...readOptions() };
  }

  // Answer what is in the fields. Loads the model where it is not there.
  async act(session) {
    const input = this.read();
    const options = this.options();
    await session.ready();
    const started = performance.now();
    const output = await session.run(input, options);
    const seconds = (performance.now() - started) / 1000;
    this.show(output, input, options);
    $("speed").textContent = `${seconds.toFixed(seconds < 0.1 ? 3 : 2)} s`;
    $("ending").textContent = await this.describeLength(session, input, options);
    document.documentElement.dataset.output = JSON.stringify(output);
    await this.attention?.offer(input, options);
  }

  show() {}

  clear() {
    $("result").replaceChildren();
    $("ending").textContent = $("speed").textContent = $("spoken").textContent = "";
    delete document.documentElement.dataset.output;
    this.attention?.hide();
  }

  // A text that the model did not read at once says so.
  async describeLength(session, input, options) {
    const { context } = session.info;
    const texts = this.texts(input).filter((text) => 4 * text.length > context - 8); // a character has 4 bytes at most
    if (!context || texts.length === 0) return "";
    const counts = await session.countTokens(texts);
    const longest = Math.max(...counts);
    if (longest <= context) return "";
    const which = counts.length > 1 ? `A text has ${plural(longest, "token")}` : plural(longest, "token");
    if (options.long === "truncate") return `${which}: only the first ${context} were read.`;
    return `${which}, more than the ${context} that the model reads at once: read in overlapping windows.`;
  }
}

// Return a field's value; where it is empty, go there and say what is missing.
export function demand(id, message) {
  const field = $(id);
  if (field.value.trim() !== "") return field.value;
  field.focus();
  throw new Error(message);
}

export function areaHtml(id, label, { rows = 4, placeholder = "" } = {}) {
  return `<label for="${id}">${label}</label>
    <textarea id="${id}" rows="${rows}" spellcheck="false" autocapitalize="off" placeholder="${placeholder}"></textarea>`;
}

export function selectHtml(name, { label, choices }, chosen) {
  const options = Object.entries(choices).map(
    ([value, text]) => `<option value="${value}"${value === chosen ? " selected" : ""}>${text}</option>`,
  );
  return `<label>${label}<select name="${name}">${options.join("")}</select></label>`;
}

export function numberHtml(name, label, value, { most = 1000 } = {}) {
  return `<label>${label}<input name="${name}" type="number" min="1" max="${most}" step="1" value="${value}" required inputmode="numeric"></label>`;
}

export function checkHtml(name, label, checked) {
  return `<label class="check"><input name="${name}" type="checkbox"${checked ? " checked" : ""}> ${label}</label>`;
}

// The options that the page offers, by the names that the tasks know them by. Raises an error for a value that cannot be.
export function readOptions() {
  const found = {};
  for (const field of $("options").querySelectorAll("[name]")) {
    if (!field.checkValidity()) {
      $("settings").open = true;
      field.reportValidity();
      throw new Error(`${field.closest("label").firstChild.textContent.trim()}: ${field.validationMessage}`);
    }
    found[field.name] = field.type === "checkbox" ? field.checked : field.type === "number" ? field.valueAsNumber : field.value;
  }
  return found;
}
