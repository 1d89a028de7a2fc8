// text-generation: the model goes on with a text, piece by piece.

const version = new URL(import.meta.url).search;
const { $ } = await import(`./dom.js${version}`);
const { View, areaHtml } = await import(`./view.js${version}`);

const NUMBERS = ["top-k", "penalty", "tokens", "seed"];

export class Writing extends View {
  verb = "Write";
  result =
    '<div id="page" class="text" role="region" aria-label="The model\'s text" aria-live="polite" aria-busy="false" tabindex="0">' +
    '<span id="given"></span><span id="output"></span></div>';
  fields = areaHtml("prompt", "Begin a text", { rows: 3, placeholder: "The model goes on from here." });
  settings = `
    <label for="temperature">Temperature <output id="temperature-value" for="temperature"></output>
      <input id="temperature" type="range" min="0" max="1.5" step="0.05" value="0.8"></label>
    <p class="quiet small">0 takes the likeliest token each time: always the same text.</p>
    <label>Top k (0: every token) <input id="top-k" type="number" min="0" step="1" value="40" inputmode="numeric"></label>
    <label>Repetition penalty <input id="penalty" type="number" min="0.5" max="3" step="0.05" value="1" inputmode="decimal"></label>
    <label>Longest text, in tokens <input id="tokens" type="number" min="1" step="1" value="128" inputmode="numeric"></label>
    <label>Seed <input id="seed" type="number" min="0" step="1" placeholder="a new one each time" inputmode="numeric"></label>`;

  start(examples) {
    $("result").innerHTML = this.result;
    super.start(examples);
    $("temperature").oninput = () => ($("temperature-value").value = $("temperature").value);
    $("temperature").oninput();
  }

  fill({ text }) {
    $("prompt").value = text;
  }

  clear() {}

  // The text so far, to go on with; "" where there is none.
  get more() {
    return $("output").textContent && $("given").textContent + $("output").textContent;
  }

  async act(session, text = $("prompt").value) {
    const options = settings();
    await session.ready();
    $("given").textContent = text;
    $("output").replaceChildren();
    await this.write(session, { text, options }, $("output").appendChild(document.createTextNode("")));
  }

  // Let the model write into a text node.
  async write(session, asked, body) {
    $("ending").textContent = $("speed").textContent = "";
    $("page").setAttribute("aria-busy", "true");
    try {
      const done = await session.call("generate", asked, ({ piece }) => body.appendData(piece));
      const speed = done.tokensPerSecond ? `${done.tokensPerSecond.toPrecision(3)} tokens a second` : "";
      $("speed").textContent = [`${done.tokens.length} tokens`, speed].filter(Boolean).join(" · ");
      $("ending").textContent = describeEnd(done);
      document.documentElement.dataset.output = JSON.stringify(done);
    } finally {
      $("page").setAttribute("aria-busy", "false");
    }
  }
}

function describeEnd({ reason, full, cut, dropped }) {
  const ends = {
    stop: "The model ended its text here.",
    interrupted: "Stopped.",
    length: full ? "The model's context is full; Go on continues from the last part of the text." : "",
  };
  const cutOff = cut ? `The beginning was too long: the model did not see its first ${cut} tokens.` : "";
  const left = dropped ? `The conversation was too long: the model did not see its first ${dropped} messages.` : "";
  return [ends[reason], cutOff, left].filter(Boolean).join(" ");
}

export function settings() {
  for (const id of NUMBERS) {
    if (!$(id).checkValidity()) {
      $("settings").open = true;
      $(id).reportValidity();
      throw new Error(`${$(id).closest("label").firstChild.textContent.trim()}: ${$(id).validationMessage}`);
    }
  }
  return {
    temperature: $("temperature").valueAsNumber,
    topK: $("top-k").valueAsNumber || 0,
    repetitionPenalty: $("penalty").valueAsNumber || 1,
    tokens: $("tokens").valueAsNumber || 128,
    seed: $("seed").value === "" ? null : $("seed").valueAsNumber,
  };
}
