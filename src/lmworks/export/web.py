"""The web page of a model folder: static files, no build step, nothing fetched from elsewhere.

    index.html  sw.js                  the page, and the worker that makes it usable without a connection
    web/*.js style.css icon.svg app.webmanifest
                                       app.js starts the page, view-*.js show a task each, worker.js holds the model
    web/page.json                      what the page shows, and the size and SHA-256 of every file that it loads
    web/vendor/                        transformers.js and ONNX Runtime's WebAssembly, with their licences

Every address that the page uses for a file carries that file's hash (or the page's), so a cache cannot mix versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import confine, read_json, sha256, write_bytes, write_json, write_text
from lmworks.export.vendor import FIX
from lmworks.models.families import read_config
from lmworks.runtime.onnx_runtime import FILES
from lmworks.tokens.chat import special_tokens
from lmworks.tokens.tokenizer import Tokenizer

ASSETS = Path(__file__).parent / "web"
SCRIPTS = (*sorted({path.name for path in ASSETS.glob("*.js")} - {"sw.js", "single.js"}), "style.css", "icon.svg")
GRAPHS = {dtype: f"onnx/{name}" for dtype, name in FILES.items()}
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "preprocessor_config.json", "modules.json", "1_Pooling/config.json", "sentence_*_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
WRITES = "text-generation"
LARGEST = 2_000_000_000  # bytes of a graph with its weights: WebAssembly addresses 4 GB, and loading takes them twice
MODELS = {  # what the page's first sentence calls a model
    WRITES: "A language model",
    "text-classification": "A classifier of texts",
    "token-classification": "A model that finds entities",
    "question-answering": "A model that answers questions about a text",
    "fill-mask": "A model that fills in gaps",
    "feature-extraction": "A model that turns texts into vectors",
    "image-classification": "A classifier of pictures",
}
NAMED, SHORT = 12, 1000  # labels that are listed by name; characters of an example
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

    `facts` are a run's values (`lmworks.verbs.summary.make_values`); what is missing or None is left out of the page.
    `selftest` is what `record_selftest` or `record_task` returned; it says which task the page is for. Raises
    InputError when the JavaScript library was never vendored or a graph is too large for a browser, and FormatError
    when the folder holds no graph.
    """
    vendored = find_vendor()
    graphs = find_graphs(folder)
    if not graphs:
        raise FormatError("the folder holds no ONNX graph", where=str(folder), expected=", ".join(GRAPHS.values()))
    check_sizes({dtype: sum((folder / name).stat().st_size for name in names) for dtype, names in graphs.items()})
    web = folder / "web"
    shutil.rmtree(web, ignore_errors=True)
    (web / "vendor").mkdir(parents=True)
    for name in SCRIPTS:
        write_bytes(web / name, (ASSETS / name).read_bytes())
    for path in sorted(vendored.iterdir()):
        write_bytes(web / "vendor" / path.name, path.read_bytes())
    listed = ", ".join(json.dumps(name) for name in SCRIPTS)
    write_text(folder / "sw.js", (ASSETS / "sw.js").read_text("utf-8").replace('"{{scripts}}"', listed))
    write_text(
        web / "app.webmanifest",
        (ASSETS / "app.webmanifest").read_text("utf-8").replace('"{{title}}"', json.dumps(title)),
    )
    write_json(folder / "selftest.json", dict(selftest))
    data = page_data(folder, graphs, facts, selftest)
    write_json(web / "page.json", data)
    html = (ASSETS / "index.html").read_text("utf-8")
    for name, text in (("version", page_version(folder)), ("title", title), ("summary", data["summary"])):
        html = html.replace("{{" + name + "}}", escape(text))
    write_text(folder / "index.html", html)


def find_graphs(folder: Path) -> dict[str, list[str]]:
    """Return the files of each dtype: its graph, then the weights beside it."""
    found = {}
    for dtype, name in GRAPHS.items():
        if (folder / name).is_file():
            beside = sorted((folder / "onnx").glob(f"{Path(name).name}_data*"), key=lambda path: (len(path.name), path))
            found[dtype] = [name, *(f"onnx/{path.name}" for path in beside)]
    return found


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise InputError for a dtype whose graph, given in bytes, no browser can hold."""
    large = [f"{dtype} of {size / 1e9:.2f} GB" for dtype, size in sizes.items() if size > LARGEST]
    small = [dtype for dtype, size in sizes.items() if size <= LARGEST]
    if large:
        raise InputError(
            "the model is too large for a browser", found=", ".join(large),
            expected=f"at most {LARGEST / 1e9:g} GB: WebAssembly addresses 4 GB, and loading takes the weights twice",
            fix=f"export with --dtype {','.join(small)}" if small else "export with --dtype q4, or a smaller model",
        )  # fmt: skip


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
    folder: Path, graphs: Mapping[str, Sequence[str]], facts: Mapping[str, Any], selftest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return web/page.json: texts and numbers to show, and every file that the page may load."""
    vendored = sorted(path.relative_to(folder).as_posix() for path in (folder / "web" / "vendor").iterdir())
    settings = [path.relative_to(folder).as_posix() for name in SETTINGS for path in sorted(folder.glob(name))]
    names = [*settings, *(name for files in graphs.values() for name in files), *vendored]
    sizes = {name: (folder / name).stat().st_size for name in names}
    task = selftest.get("task", WRITES)
    return {
        "task": task,
        "options": selftest.get("options", {}),
        **describe_task(folder, task),
        "report": "corpus" in facts,
        "summary": make_summary(facts, task),
        "rows": make_rows(read_json(folder / "config.json"), facts),
        "bars": {
            "title": "Bits per byte of held-out text",
            "note": "Lower is better: how many bits each byte of text that the model never saw costs it.",
            "rows": make_bars(facts),
        },
        "examples": examples(selftest),
        "dtypes": {
            dtype: {"file": names[0], "bytes": sum(sizes[name] for name in names), "files": list(names)}
            for dtype, names in graphs.items()
        },
        "files": {name: {"bytes": size, "sha256": sha256(folder / name)} for name, size in sizes.items()},
    }


def describe_task(folder: Path, task: str) -> dict[str, Any]:
    """Return what a task's view has to know before the model is there: labels, how a mask or a chat is written."""
    if task == WRITES:
        tokenizer = Tokenizer.from_pretrained(folder)
        template = tokenizer.chat_template
        return {"chat": {"template": template, "tokens": special_tokens(tokenizer)}} if template else {}
    if task == "fill-mask":
        tokenizer = Tokenizer.from_pretrained(folder)
        found = tokenizer.find("mask_token", "[MASK]")
        return {"mask": "<mask>" if found is None else tokenizer.token(found)}
    return {"labels": list(read_config(folder).labels)} if task.endswith("classification") else {}


def make_summary(facts: Mapping[str, Any], task: str = WRITES) -> str:
    """Return one sentence about the model."""
    parameters, size = facts.get("parameters"), facts.get("train_bytes")
    model = f"{MODELS[task]}, {count(parameters)} parameters" if parameters else MODELS[task]
    if task == WRITES and parameters:
        model = f"A language model of {count(parameters)} parameters"
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
    labels = config.get("id2label") or {}
    named = [str(name) for name in labels.values()]
    listed = f"{len(named)}: {', '.join(named[:NAMED])}{' …' if len(named) > NAMED else ''}" if named else ""
    image = config.get("image_size")
    rows = [
        ("Architecture", join(config.get("model_type"), suffix(layers, "layers"), suffix(width, "wide"))),
        ("Parameters", f"{facts['parameters']:,}" if facts.get("parameters") else ""),
        ("Labels", listed),
        ("Pictures", f"{image} × {image} pixels" if isinstance(image, int) else ""),
        ("Context", suffix(context, "tokens") if image is None else ""),
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


def examples(selftest: Mapping[str, Any], *, most: int = 4) -> list[dict[str, Any]]:
    """Return a few different inputs out of the self-test, none of them very long."""
    inputs = [{"text": prompt["text"]} for prompt in selftest.get("prompts", ())]
    inputs += [item["input"] for item in selftest.get("items", ())]
    short = [given for given in inputs if "image" in given or 0 < len(str(given)) <= SHORT]
    told = [given for given in short if all(text.strip() for text in given.values() if isinstance(text, str))]
    return [given for i, given in enumerate(told) if given not in told[:i]][:most]


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
