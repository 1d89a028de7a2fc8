"""The web page of a model folder: static files, no build step, nothing fetched from elsewhere.

    index.html  sw.js                  the page, and the worker that makes it usable without a connection
    web/app.js client.js engine.js worker.js style.css icon.svg app.webmanifest
    web/page.json                      what the page shows, and the size and SHA-256 of every file that it loads
    web/vendor/                        transformers.js and ONNX Runtime's WebAssembly, with their licences

Every address that the page uses for a file carries that file's hash (or the page's), so a cache cannot mix versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import confine, read_json, sha256, write_bytes, write_json, write_text
from lmworks.export.vendor import FIX

ASSETS = Path(__file__).parent / "web"
SCRIPTS = ("app.js", "client.js", "engine.js", "worker.js", "style.css", "icon.svg")
GRAPHS = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
NEEDED = ("transformers.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")

HEADERS = {  # threads in WebAssembly need the first two; the last says that the page may load nothing from elsewhere
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
}
PRIVATE = ("training",)  # folders that are never served


def write_page(folder: Path, *, title: str, facts: Mapping[str, Any], selftest: Mapping[str, Any]) -> None:
    """Write the page into a model folder that already holds its settings and graphs.

    `facts` are a run's values (`lmworks.summary.make_values`); whatever is missing or None is left out of the page.
    `selftest` is what `record_selftest` returned. Raises InputError when the JavaScript library was never vendored, and
    FormatError when the folder holds no graph.
    """
    vendored = find_vendor()
    graphs = {dtype: name for dtype, name in GRAPHS.items() if (folder / name).is_file()}
    if not graphs:
        raise FormatError("the folder holds no ONNX graph", where=str(folder), expected=", ".join(GRAPHS.values()))
    web = folder / "web"
    shutil.rmtree(web, ignore_errors=True)
    (web / "vendor").mkdir(parents=True)
    for name in SCRIPTS:
        write_bytes(web / name, (ASSETS / name).read_bytes())
    for path in sorted(vendored.iterdir()):
        write_bytes(web / "vendor" / path.name, path.read_bytes())
    write_bytes(folder / "sw.js", (ASSETS / "sw.js").read_bytes())
    write_text(
        web / "app.webmanifest",
        (ASSETS / "app.webmanifest").read_text("utf-8").replace('"{{title}}"', json.dumps(title)),
    )
    write_json(folder / "selftest.json", dict(selftest))
    write_json(web / "page.json", page_data(folder, graphs, facts, selftest))
    shell = (ASSETS / "index.html").read_text("utf-8")
    html = shell.replace("{{version}}", page_version(folder)).replace("{{title}}", escape(title))
    write_text(folder / "index.html", html)


def find_vendor() -> Path:
    """Return the folder of the vendored library; raise InputError with the fix when it is not there."""
    folder = ASSETS / "vendor"
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(
            "the web page's JavaScript library is not installed", where=str(folder), found=f"no {missing[0]}", fix=FIX
        )
    return folder


def page_data(
    folder: Path, graphs: Mapping[str, str], facts: Mapping[str, Any], selftest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return web/page.json: texts and numbers to show, and every file that the page may load."""
    vendored = sorted(path.relative_to(folder).as_posix() for path in (folder / "web" / "vendor").iterdir())
    names = [*(name for name in SETTINGS if (folder / name).is_file()), *graphs.values(), *vendored]
    return {
        "summary": make_summary(facts),
        "rows": make_rows(read_json(folder / "config.json"), facts),
        "bars": {
            "title": "Bits per byte of held-out text",
            "note": "Lower is better: how many bits each byte of text that the model never saw costs it.",
            "rows": make_bars(facts),
        },
        "examples": examples(selftest),
        "dtypes": {dtype: {"file": name, "bytes": (folder / name).stat().st_size} for dtype, name in graphs.items()},
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names},
    }


def make_summary(facts: Mapping[str, Any]) -> str:
    """Return one sentence about the model."""
    parameters, size = facts.get("parameters"), facts.get("train_bytes")
    model = f"A language model of {count(parameters)} parameters" if parameters else "A language model"
    trained = f", trained on {size / 1e6:,.2f} MB of text" if size else ""
    return f"{model}{trained}. It runs in this page, on your machine."


def make_rows(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[list[str]]:
    """Return (name, value) pairs, all of them text."""
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    width = config.get("hidden_size", config.get("n_embd"))
    context = config.get("max_position_embeddings", config.get("n_positions"))
    settings = facts.get("settings") or {}
    perplexity, accuracy = facts.get("perplexity"), facts.get("next_token_accuracy")
    steps, seconds = facts.get("steps"), facts.get("train_seconds")
    rows = [
        ("Architecture", join(config.get("model_type"), suffix(layers, "layers"), suffix(width, "wide"))),
        ("Parameters", f"{facts['parameters']:,}" if facts.get("parameters") else ""),
        ("Context", suffix(context, "tokens")),
        ("Tokenizer", join(settings.get("tokenizer"), suffix(config.get("vocab_size"), "tokens"))),
        ("Training text", f"{facts['train_bytes'] / 1e6:,.2f} MB" if facts.get("train_bytes") else ""),
        ("Training", join(suffix(steps, "steps"), f"{seconds:,.0f} s" if seconds else "", facts.get("dtype"))),
        ("Perplexity per token", f"{perplexity:,.2f}" if perplexity else ""),
        ("Next token right", f"{accuracy:.1%}" if accuracy else ""),
    ]
    return [[name, value] for name, value in rows if value]


def make_bars(facts: Mapping[str, Any]) -> list[list[Any]]:
    """Return (model, bits per byte) for each that is known, this network first."""
    names = (
        ("this network", "bits_per_byte"),
        ("5-gram, Kneser-Ney", "ngram_bits_per_byte"),
        ("both, mixed", "mixture_bits_per_byte"),
        ("exact entropy of the language", "entropy_bits_per_byte"),
    )
    return [[name, facts[key]] for name, key in names if isinstance(facts.get(key), float | int)]


def examples(selftest: Mapping[str, Any], *, most: int = 4) -> list[str]:
    """Return a few different beginnings out of the recorded prompts."""
    texts = [str(prompt["text"]) for prompt in selftest.get("prompts", [])]
    return list(dict.fromkeys(text for text in texts if text.strip()))[:most]


def page_version(folder: Path) -> str:
    """Return a hash of everything that the page is made of."""
    digest = hashlib.sha256()
    for name in ("sw.js", "selftest.json", "web/page.json", *(f"web/{name}" for name in SCRIPTS)):
        digest.update((folder / name).read_bytes())
    digest.update((ASSETS / "index.html").read_bytes())
    return digest.hexdigest()[:16]


def find_served(folder: Path, path: str) -> Path | None:
    """Return the file that a request for `path` (percent-decoded, without its query) may have, or None.

    Hidden files, the training state, folders and everything outside `folder` are never served.
    """
    parts = [part for part in path.split("/") if part]
    if any(part.startswith(".") or "\\" in part or "\0" in part for part in parts) or (parts and parts[0] in PRIVATE):
        return None
    try:
        found = confine(folder, "/".join(parts) or "index.html")
    except FormatError:
        return None
    return found if found.is_file() and not path.endswith("/" if parts else "//") else None


def headers_for(path: Path, *, versioned: bool) -> dict[str, str]:
    """Return the headers of a served file; an address with its hash in it may be kept for ever."""
    kept = "public, max-age=31536000, immutable" if versioned else "no-cache"
    return {**HEADERS, "Content-Type": TYPES.get(path.suffix, "application/octet-stream"), "Cache-Control": kept}


def join(*parts: Any) -> str:
    """Join what is there with commas."""
    return ", ".join(str(part) for part in parts if part)


def suffix(value: Any, word: str) -> str:
    """Return "1,024 tokens" for a number, "" for None."""
    return f"{value:,} {word}" if isinstance(value, int) else ""


def count(number: int) -> str:
    """Print a large number for reading: 3145728 -> "3.1 million"."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
