// The start of a single-file page. The files of a model's folder are in script[data-file], gzip in base64, cut into pieces.
// Modules become blob: addresses, each after those that it imports; everything else is unpacked when it is asked for.
//
// In a page from disk a worker cannot read the blob: addresses of its page, nor be a module: it is given the text of its
// modules and the files themselves, and makes addresses of its own.
(async () => {
  const SCRIPT = "text/javascript";
  const pieces = Map.groupBy(document.querySelectorAll("script[data-file]"), (piece) => piece.dataset.file);

  // The first is many times as fast, and newer.
  const decode = (text) => Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  async function read(name) {
    const parts = pieces.get(name).map((piece) => decode(piece.textContent));
    const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream, { headers: { "Content-Type": name.endsWith("js") ? SCRIPT : "" } }).blob();
  }

  // Return a function that gives a module's address; `texts` holds the modules by name.
  function linker(texts) {
    const known = {};
    return function address(name) {
      if (known[name]) return known[name];
      const text = texts[name].replace(/import\(`\.\/([\w./-]+)\$\{version\}`\)/g, (_, path) => `import("${address(`web/${path}`)}")`);
      return (known[name] = URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
    };
  }

  // What a worker does first: its messages wait until the module that answers them is there.
  function startWorker(address) {
    const waiting = [];
    self.onmessage = (event) => waiting.push(event);
    const refuse = (error) => {
      for (const { data } of waiting) self.postMessage({ id: data.id, error: `The page's worker could not be started: ${error.message}` });
    };
    import(address("web/worker.js")).then(() => {
      const answer = self.onmessage;
      self.onmessage = (event) => {
        for (const file of Object.values(event.data.files ?? {})) file.url = URL.createObjectURL(file.blob);
        answer(event);
      };
      waiting.forEach(self.onmessage);
    }, refuse);
  }

  const modules = [...pieces.keys()].filter((name) => name.startsWith("web/") && name.endsWith(".js"));
  const texts = Object.fromEntries(await Promise.all(modules.map(async (name) => [name, await (await read(name)).text()])));
  const program = `(${startWorker})((${linker})(${JSON.stringify(texts)}))`;
  const worker = URL.createObjectURL(new Blob([program], { type: SCRIPT }));
  globalThis.lmworksInside = { names: [...pieces.keys()], read, makeWorker: () => new Worker(worker) };
  await import(linker(texts)("web/app.js"));
})().catch((error) => {
  const text = `This page could not start: ${error.message}`;
  document.querySelector("header").append(Object.assign(document.createElement("p"), { className: "problem", textContent: text }));
});
