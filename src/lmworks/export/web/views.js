// Which view shows what a model does. Each is fetched when it is needed.

const version = new URL(import.meta.url).search;

const VIEWS = {
  chat: async () => (await import(`./view-chat.js${version}`)).Chat,
  "text-generation": async () => (await import(`./view-writing.js${version}`)).Writing,
  "text-classification": async () => (await import(`./view-classify.js${version}`)).Classify,
  "token-classification": async () => (await import(`./view-entities.js${version}`)).Entities,
  "question-answering": async () => (await import(`./view-question.js${version}`)).Question,
  "fill-mask": async () => (await import(`./view-blanks.js${version}`)).Blanks,
  "feature-extraction": async () => (await import(`./view-search.js${version}`)).Search,
  "image-classification": async () => (await import(`./view-picture.js${version}`)).Picture,
};

// Return the view of a page: of its task, or a chat where its model has a template for one.
export async function makeView(page) {
  const View = await VIEWS[page.chat ? "chat" : page.task]();
  return new View(page);
}
