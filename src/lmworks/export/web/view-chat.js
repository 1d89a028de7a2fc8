// text-generation with a chat template: a conversation, the model's turn written piece by piece.

const version = new URL(import.meta.url).search;
const { $, element } = await import(`./dom.js${version}`);
const { areaHtml, demand } = await import(`./view.js${version}`);
const { Writing, settings } = await import(`./view-writing.js${version}`);

const NAMES = { user: "You", assistant: "Model" };

export class Chat extends Writing {
  verb = "Send";
  result = '<ol id="page" class="turns" aria-label="Conversation" aria-live="polite" aria-busy="false"></ol>';
  fields = `${areaHtml("message", "Message", { rows: 2, placeholder: "Enter sends, Shift and Enter begin a new line." })}
    <div class="aside"><button id="new" type="button">New conversation</button></div>
    <details><summary>System text</summary>${areaHtml("system", "What the model is told first", { rows: 2 })}</details>`;

  turns = []; // messages of what was said: { role, content }

  start(examples) {
    super.start(examples);
    $("message").value = "";
    $("message").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
      event.preventDefault();
      $("form").requestSubmit();
    };
    $("new").onclick = () => {
      if ($("page").getAttribute("aria-busy") === "true") return;
      this.turns = [];
      $("page").replaceChildren();
      $("ending").textContent = $("speed").textContent = "";
      this.first().focus();
    };
  }

  fill({ text }) {
    $("message").value = text;
  }

  get more() {
    return "";
  }

  async act(session) {
    const said = demand("message", "Write a message first.");
    const system = $("system").value.trim();
    const options = settings();
    await session.ready();
    const asked = { role: "user", content: said };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.turns, asked];
    const shown = [asked, { role: "assistant", content: "" }].map(show);
    $("page").append(...shown);
    $("message").value = "";
    const body = shown[1].lastChild.appendChild(document.createTextNode(""));
    try {
      await this.write(session, { messages, chat: this.page.chat, options }, body);
    } catch (error) {
      for (const turn of shown) turn.remove(); // what was not answered can be sent again
      $("message").value = said;
      throw error;
    }
    this.turns.push(asked, { role: "assistant", content: body.data });
  }
}

function show({ role, content }) {
  const turn = element("li", "", { class: role });
  turn.append(element("b", NAMES[role]), element("p", content));
  return turn;
}
