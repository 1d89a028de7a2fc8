"""A graph in Chromium through a plain transformers.js page: `how` is `graph` (ours or optimum) and dtype (fp32, q8)."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from prepare import python
from race import serve

from lmworks.export.onnx import export_onnx
from lmworks.export.verify_js import CHROMIUM_FLAGS, find_chromium
from lmworks.export.web import find_vendor

HERE = Path(__file__).parent
GRAPHS = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


class Handler(BaseHTTPRequestHandler):
    """The page, the library and one model folder, with the headers that threads need."""

    protocol_version = "HTTP/1.1"
    model: Path

    def do_GET(self) -> None:
        """Send a file."""
        first, _, rest = self.path.lstrip("/").partition("?")[0].partition("/")
        root = {"model": self.model, "library": find_vendor()}.get(first)
        path = HERE / "browser.html" if not first else root / rest if root else None
        found = path is not None and ".." not in rest and path.is_file()
        body = path.read_bytes() if found and path else b""
        self.send_response(200 if found else 404)
        for name, value in {
            "Content-Type": TYPES.get(path.suffix if path else "", "application/octet-stream"),
            "Content-Length": str(len(body)),
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Browser:
    """A Chromium of its own with one page."""

    def __init__(self, setting: dict[str, Any]) -> None:
        folder, dtype = Path(setting["model"]), setting["dtype"]
        Handler.model = (our_graph if setting["graph"] == "ours" else optimum_graph)(folder, dtype)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver = sync_playwright().start()
        flags = [flag for flag in CHROMIUM_FLAGS if flag != "--headless"]
        chromium = driver.chromium.launch(executable_path=str(find_chromium()), args=flags)
        atexit.register(lambda: (chromium.close(), driver.stop()))
        self.page = chromium.new_page()
        self.page.set_default_timeout(600_000)
        self.page.goto(f"http://127.0.0.1:{server.server_port}/")
        self.page.wait_for_function("() => window.start")
        isolated = self.page.evaluate("([dtype, threads]) => start(dtype, threads)", [dtype, setting["threads"]])
        if not isolated:
            raise SystemExit("the page is not isolated: it would run one thread only")

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Write greedily."""
        return self.page.evaluate("([ids, tokens]) => generate(ids, tokens)", [list(ids), tokens])

    def logits(self, ids: Sequence[int]) -> list[float]:
        """Return the prompt's last logits."""
        return self.page.evaluate("(ids) => logits(ids)", list(ids))


def our_graph(folder: Path, dtype: str) -> Path:
    """Return a folder with our graph, as `lmworks export` writes it."""
    made = folder / "browser"
    if not (made / "onnx" / GRAPHS[dtype]).is_file():
        export_onnx(folder, made, dtypes=[dtype])
    return copy_settings(folder, made)


def optimum_graph(folder: Path, dtype: str) -> Path:
    """Return a folder with optimum's graph, made in its own environment, quantized as transformers.js's script does."""
    made = folder / "browser-optimum"
    if not (made / "onnx" / GRAPHS[dtype]).is_file():
        script = str(HERE / "make_optimum.py")
        subprocess.run([str(python("optimum")), script, str(folder), str(made)], check=True, stdout=sys.stderr)
    return copy_settings(folder, made)


def copy_settings(folder: Path, made: Path) -> Path:
    """Put the files that transformers.js reads beside the graph."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, made / name)
    return made


if __name__ == "__main__":
    serve(Browser)
