"""A page in one file: a web folder with its models, runtime and scripts inside an HTML that opens from disk.

Every file of the folder that the page reads is in a `<script type="text/plain" data-file="NAME">` element, compressed
with gzip and written in base64, in pieces of a few megabytes; `web/single.js` puts them together. The page may fetch
nothing (its Content-Security-Policy says so), and each file is still held to the SHA-256 in page.json.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator
from html import escape
from pathlib import Path

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_text
from lmworks.export.web import ASSETS, SCRIPTS

LARGEST = 500_000_000  # bytes of all files together: a browser reads all of a page before it starts
PIECE = 6 << 20  # compressed bytes in an element; a multiple of 3, as base64 wants
UNUSED = ("vendor.json", "NOTICE.txt")  # of the library's folder
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:; worker-src blob:; "
    "connect-src blob: data:; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def write_single_file(folder: str | Path, out: str | Path) -> int:
    """Write a finished web folder as one HTML file, whole or not at all; return its size in bytes.

    Raises FormatError for a folder without a page, InputError where its files are too large for one.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "web" / "page.json").is_file() or not (folder / "index.html").is_file():
        raise FormatError("the folder holds no page", where=str(folder), fix="export it with --to web")
    page = read_json(folder / "web" / "page.json")
    names = [name for name in page["files"] if not name.endswith((*UNUSED, ".txt"))]
    check_size({name: page["files"][name]["bytes"] for name in names}, page["dtypes"])
    scripts = [f"web/{name}" for name in SCRIPTS if name.endswith(".js")]
    shown = [name for name in ("selftest.json", "certificate.json") if (folder / name).is_file()]
    parts = [piece for name in ("web/page.json", *shown, *scripts, *names) for piece in pack(folder, name)]
    start = f"<script>\n{(ASSETS / 'single.js').read_text('utf-8')}</script>"
    html = make_shell(folder).replace("</body>", "\n".join([*parts, start, "</body>"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)
    return out.stat().st_size


def check_size(sizes: dict[str, int], dtypes: dict[str, dict[str, int]]) -> None:
    """Raise InputError for files that are too many bytes together, with what each dtype takes."""
    total = sum(sizes.values())
    if total <= LARGEST:
        return
    each = ", ".join(f"{dtype} {known['bytes'] / 1e6:,.0f} MB" for dtype, known in dtypes.items())
    rest = total - sum(known["bytes"] for known in dtypes.values())
    fits = [dtype for dtype, known in dtypes.items() if rest + known["bytes"] <= LARGEST]
    raise InputError(
        "the model is too large for a single file", found=f"{total / 1e6:,.0f} MB ({each})",
        expected=f"at most {LARGEST / 1e6:,.0f} MB together",
        fix=f"export one precision: --dtype {min(fits, key=lambda dtype: dtypes[dtype]['bytes'])}" if fits
        else "export a smaller model, or a folder without --single-file",
    )  # fmt: skip


def pack(folder: Path, name: str) -> Iterator[str]:
    """Yield the elements that hold a file."""
    data = gzip.compress((folder / name).read_bytes(), compresslevel=6, mtime=0)
    for at in range(0, len(data), PIECE):
        text = base64.b64encode(data[at : at + PIECE]).decode("ascii")
        yield f'<script type="text/plain" data-file="{escape(name)}">{text}</script>'


def make_shell(folder: Path) -> str:
    """Return index.html with its style and icon inside, and with the licences of what is inside."""
    html = (folder / "index.html").read_text("utf-8")
    icon = base64.b64encode((folder / "web" / "icon.svg").read_bytes()).decode("ascii")
    style = (folder / "web" / "style.css").read_text("utf-8")
    licences = "\n\n".join(path.read_text("utf-8") for path in sorted((folder / "web" / "vendor").glob("*.txt")))
    lines = {  # how a line begins -> what takes its place
        "<meta charset": f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<link rel="icon"': f'<link rel="icon" href="data:image/svg+xml;base64,{icon}">',
        '<link rel="manifest"': "",
        '<link rel="stylesheet"': f"<style>\n{style}</style>",
        '<script type="module"': "",
        '  <p id="links"': '  <p id="links"></p>\n  <details><summary>Licences of the included software</summary>'
        f"<pre>{escape(licences)}</pre></details>",
    }
    found = []
    for line in html.splitlines():
        begins = next((begin for begin in lines if line.startswith(begin)), None)
        found.append(line if begins is None else lines.pop(begins))
    if lines:
        raise FormatError(
            "index.html is not of this version", where=str(folder), expected=next(iter(lines)), fix="export it again"
        )
    return "\n".join(found) + "\n"
