// question-answering: the answer, and where it stands in the context.

const version = new URL(import.meta.url).search;
const { $, bar, element, percent } = await import(`./dom.js${version}`);
const { View, areaHtml, checkHtml, demand, numberHtml } = await import(`./view.js${version}`);

const WINDOW = 384; // tokens of question and context that are read at once, where the model reads as many

export class Question extends View {
  verb = "Answer";
  fields = `<label for="question">Question</label>
    <input id="question" type="text" autocomplete="off" placeholder="What do you want to know?">
    ${areaHtml("context", "Context", { rows: 6, placeholder: "The text that holds the answer." })}`;
  settings =
    numberHtml("top_k", "Answers", this.page.options.top_k ?? 1, { most: 20 }) +
    numberHtml("max_answer_length", "Longest answer, in tokens", this.page.options.max_answer_length ?? 15) +
    checkHtml("no_answer", "The context may not answer the question", this.page.options.no_answer ?? false);

  describe({ question }) {
    return question;
  }

  fill({ question, context }) {
    $("question").value = question;
    $("context").value = context;
  }

  read() {
    return { question: demand("question", "Ask a question first."), context: demand("context", "Give a context to search.") };
  }

  show(output, { context }) {
    const answers = [output].flat();
    const [best] = answers;
    const none = "The model finds no answer in this context.";
    const line = element("p", best.text || none, { class: best.text ? "answer" : "answer none" });
    const list = element("ol", "", { class: "labels" });
    for (const { text, score } of answers) {
      list.append(bar(answers.length === 1 ? "Score" : text || "no answer", percent(score), score));
    }
    const marked = element("p", "", { class: "marked" });
    marked.append(...markAnswer(context, best));
    $("result").replaceChildren(line, list, marked);
    $("spoken").textContent = best.text ? `${best.text}: ${percent(best.score)}` : none;
    marked.querySelector("mark")?.scrollIntoView({ block: "nearest" });
  }

  async describeLength(session, { question, context }) {
    const room = Math.min(WINDOW, session.info.context);
    if (4 * (question.length + context.length) < room) return "";
    const [q, c] = await session.countTokens([question, context]);
    const count = q + c - 1; // both begin with a special token
    return count > room ? `Question and context have about ${count} tokens: read in overlapping windows of ${room}.` : "";
  }
}

function markAnswer(context, { text, start, end }) {
  const characters = Array.from(context);
  if (!text) return [context];
  const found = element("mark", characters.slice(start, end).join(""), { class: "kind-0" });
  return [characters.slice(0, start).join(""), found, characters.slice(end).join("")];
}
