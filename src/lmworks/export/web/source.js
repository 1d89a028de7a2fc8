// Where the page's files are: in the folder around it, or inside it (a single file), where nothing may be fetched.

const version = new URL(import.meta.url).search;
const inside = globalThis.lmworksInside ?? null; // what single.js made: { names, read(name) -> Blob, makeWorker() }

export const single = inside !== null;

export function makeWorker() {
  return single ? inside.makeWorker() : new Worker(new URL(`worker.js${version}`, import.meta.url), { type: "module" });
}

export async function readJson(name) {
  if (single) {
    if (!inside.names.includes(name)) throw new Error(`${name} is not in this page.`);
    return JSON.parse(await (await inside.read(name)).text());
  }
  const response = await fetch(new URL(`../${name}`, import.meta.url), { cache: "no-cache" });
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}.`);
  return response.json();
}

// The files that a load takes, as the worker wants them: with addresses in the folder, or as they are.
export async function provide(files, names) {
  if (!single) return files;
  const pairs = names.map(async (name) => [name, { ...files[name], blob: await inside.read(name) }]);
  return Object.fromEntries(await Promise.all(pairs));
}
