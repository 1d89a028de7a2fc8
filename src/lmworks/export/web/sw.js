// The service worker: what was loaded once works without a connection, and where a host does not send the headers that
// WebAssembly threads need (COOP, COEP), they are added here. Files named with ?v=HASH never change and come from the
// cache first; everything else comes from the network first.

const version = self.location.search;
const CACHE = `lmworks${version}`;
const VERSIONED = ["{{scripts}}", "vendor/transformers.min.js"];
const SHELL = ["./", "selftest.json", "web/page.json", ...VERSIONED.map((name) => `web/${name}${version}`)];
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.oninstall = (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(SHELL)).then(() => self.skipWaiting()));
};

self.onactivate = (event) => {
  event.waitUntil(removeOthers().then(() => self.clients.claim()));
};

self.onfetch = (event) => {
  const url = new URL(event.request.url);
  const path = url.pathname.slice(new URL(self.registration.scope).pathname.length);
  const ours = url.href.startsWith(self.registration.scope) && !/^(v1|health)\//.test(path);
  if (event.request.method === "GET" && ours) event.respondWith(serve(event.request, url.searchParams.has("v")));
};

async function serve(request, fixed) {
  const cache = await caches.open(CACHE);
  const held = fixed && request.cache !== "reload" ? await cache.match(request) : null;
  if (held) return isolate(held);
  try {
    const response = await fetch(request);
    if (response.status === 200) await cache.put(request, response.clone()).catch(() => {}); // a full disk is no error
    return isolate(response);
  } catch (error) {
    const old = await cache.match(request);
    if (old) return isolate(old);
    throw error;
  }
}

function isolate(response) {
  if (response.status === 0 || response.type === "opaqueredirect") return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  const body = [101, 204, 205, 304].includes(response.status) ? null : response.body;
  return new Response(body, { status: response.status, statusText: response.statusText, headers });
}

async function removeOthers() {
  const names = await caches.keys();
  await Promise.all(names.filter((name) => name.startsWith("lmworks") && name !== CACHE).map((name) => caches.delete(name)));
}
