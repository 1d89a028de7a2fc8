// fill-mask: the likeliest tokens for each mask; a click puts one in.

const version = new URL(import.meta.url).search;
const { $, bar, element, percent } = await import(`./dom.js${version}`);
const { LONG, View, areaHtml, numberHtml, selectHtml } = await import(`./view.js${version}`);

export class Blanks extends View {
  verb = "Fill in";
  mask = this.page.mask ?? "[MASK]";
  fields = `${areaHtml("text", "Text with a gap", { placeholder: "Put a gap where the model should find a word." })}
    <p class="aside"><button id="gap" type="button">Insert a gap</button> <span class="quiet small"></span></p>`;
  settings =
    numberHtml("top_k", "Tokens for each gap", this.page.options.top_k ?? 5, { most: 100 }) +
    selectHtml("long", LONG, this.page.options.long);

  start(examples) {
    super.start(examples);
    $("fields").querySelector(".aside span").textContent = `A gap is written ${this.mask}`;
    $("gap").onclick = () => {
      const { selectionStart, selectionEnd } = $("text");
      $("text").setRangeText(this.mask, selectionStart, selectionEnd, "end");
      $("text").focus();
    };
  }

  describe({ text }) {
    return text.replaceAll(this.mask, "…");
  }

  read() {
    const input = super.read();
    if (input.text.includes(this.mask)) return input;
    $("gap").focus();
    throw new Error(`There is no gap in the text: put ${this.mask} where a word is missing.`);
  }

  show(output, { text }) {
    const masks = Array.isArray(output[0]) ? output : [output];
    const groups = masks.map((fills, place) => this.makeGroup(fills, place, masks.length, text));
    $("result").replaceChildren(...groups);
    const said = masks.map((fills) => `${fills[0].token_str.trim()}, ${percent(fills[0].score)}`);
    $("spoken").textContent = said.join("; ");
  }

  makeGroup(fills, place, count, text) {
    const group = element("section", "", { class: "gap" });
    const name = count === 1 ? "Best tokens" : `Best tokens for gap ${place + 1}`;
    const list = element("ol", "", { class: "labels", "aria-label": name });
    for (const fill of fills) {
      const button = bar(fill.token_str, percent(fill.score), fill.score, "button");
      button.type = "button";
      button.title = "Put it in";
      button.onclick = () => {
        $("text").value = putIn(text, this.mask, place, fill.token_str);
        $("spoken").textContent = `Put in: ${fill.token_str.trim()}`;
        for (const other of list.querySelectorAll("button")) other.removeAttribute("aria-pressed");
        button.setAttribute("aria-pressed", "true");
        sentence.replaceChildren(...showIn(text, this.mask, place, fill.token_str));
      };
      const row = element("li");
      row.append(button);
      list.append(row);
    }
    const sentence = element("p", "", { class: "marked" });
    sentence.append(...showIn(text, this.mask, place, fills[0].token_str));
    group.append(element("h3", name), sentence, list);
    return group;
  }
}

// Split a text around its n-th mask; "##ing" goes on with the word before, " word" brings its own space.
function around(text, mask, place, token) {
  const pieces = text.split(mask);
  let before = pieces.slice(0, place + 1).join(mask);
  let word = token;
  if (word.startsWith("##")) {
    before = before.replace(/\s+$/, "");
    word = word.slice(2);
  } else if (/^\s/.test(word) && (before === "" || /\s$/.test(before))) {
    word = word.trimStart();
  }
  return [before, word, pieces.slice(place + 1).join(mask)];
}

function putIn(text, mask, place, token) {
  return around(text, mask, place, token).join("");
}

function showIn(text, mask, place, token) {
  const [before, word, after] = around(text, mask, place, token);
  const gaps = (part) => part.replaceAll(mask, "…");
  return [gaps(before), element("mark", word, { class: "kind-0" }), gaps(after)];
}
