"""The main text of an HTML page: what a reader came for, without menus, scripts and hidden parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmworks.base.optional import require

NOISE = (
    "script, style, noscript, template, head, nav, footer, aside, button, select, iframe, object, embed, "
    "svg, canvas, audio, video, dialog, [hidden], [aria-hidden=true], [role=navigation], [role=banner], "
    "[role=complementary], [role=contentinfo], [role=search]"
)
UNSEEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
MAIN = ("article", "main, [role=main]")
BLOCK_TAGS = (
    "address article blockquote body caption dd div dl dt fieldset figcaption figure h1 h2 h3 h4 h5 h6 header hr li "
    "main ol p pre section table tbody td tfoot th thead tr ul"
)
BLOCKS = frozenset(BLOCK_TAGS.split())
MENUS = frozenset(("ul", "ol", "div", "table", "section"))
MOST_LINKED = 0.6  # a block of at least three links that hold this share of its text is a menu
SPACES = re.compile(r"[ \t\r\n\f]+")


@dataclass
class Size:
    """How much text a node holds, in characters, and how much of it is links."""

    text: int = 0
    linked: int = 0
    links: int = 0

    def add(self, inner: Size) -> None:
        """Count what a node inside this one holds."""
        self.text, self.linked, self.links = (
            self.text + inner.text,
            self.linked + inner.linked,
            self.links + inner.links,
        )


def main_text(page: str) -> str:
    """Return the main text of a page, with a blank line between paragraphs; needs the [data] extra."""
    tree = require("selectolax.lexbor", extra="data").LexborHTMLParser(page)
    if tree.body is None:
        return ""
    skipped = {node.mem_id for node in tree.css(NOISE)}
    skipped |= {node.mem_id for node in tree.css("[style]") if UNSEEN.search(node.attributes.get("style") or "")}
    sizes = measure(tree.body, skipped)
    skipped |= {id for id, size in sizes.items() if size.links > 2 and size.linked > MOST_LINKED * size.text}
    root = tree.body
    whole = sizes[root.mem_id].text  # ASP.NET's pages are one form: only a small one is noise
    forms = [node.mem_id for node in tree.css("form") if node.mem_id in sizes]
    skipped |= {id for id in forms if 2 * sizes[id].text <= whole}
    for selector in MAIN:  # the longest article, else main, if it has most of the body's text
        found = [node for node in tree.css(selector) if node.mem_id in sizes]
        best = max(found, key=lambda node: sizes[node.mem_id].text, default=None)
        if best is not None and 2 * sizes[best.mem_id].text > sizes[root.mem_id].text:
            root = best
            break
    return layout(root, skipped - {root.mem_id})


def walk(root: Any, skipped: set[int]) -> Iterator[tuple[Any, bool]]:
    """Yield (node, True) on entering and (node, False) on leaving, in the order of the page, however deep it nests."""
    stack = [(root, True)]
    while stack:
        node, entering = stack.pop()
        yield node, entering
        if entering and node.tag != "-text":
            stack.append((node, False))
            children = [child for child in node.iter(include_text=True) if child.mem_id not in skipped]
            stack += [(child, True) for child in reversed(children)]


def measure(body: Any, skipped: set[int]) -> dict[int, Size]:
    """Return the size of the body and of each node that may be a menu or the main part."""
    sizes: dict[int, Size] = {}
    above = [Size()]
    in_link = 0
    for node, entering in walk(body, skipped):
        if node.tag == "-text":
            length = len(node.text(deep=False).strip())
            above[-1].text += length
            above[-1].linked += length if in_link else 0
        elif node.tag == "a":
            in_link += 1 if entering else -1
            above[-1].links += entering
        elif node.tag in MENUS or node.tag in ("body", "article", "main", "form") or "role" in node.attributes:
            if entering:
                above.append(sizes.setdefault(node.mem_id, Size()))
            else:
                above[-2].add(above.pop())
    return sizes


def layout(root: Any, skipped: set[int]) -> str:
    """Return the text with a blank line between blocks and a line end at each `<br>`; `<pre>` keeps its lines."""
    lines = [""]
    preformatted = 0
    for node, entering in walk(root, skipped):
        if node.tag == "-text":
            text = node.text(deep=False)
            if preformatted:
                first, *rest = text.split("\n")
                lines[-1] += first
                lines += rest
            else:
                text = SPACES.sub(" ", text)
                lines[-1] += text if lines[-1] and not lines[-1].endswith(" ") else text.lstrip(" ")
        elif node.tag == "br" and entering:
            lines.append("")
        elif node.tag in BLOCKS:
            lines += ["", ""]
            preformatted += (1 if entering else -1) if node.tag == "pre" else 0
    kept: list[str] = []
    for line in map(str.rstrip, lines):
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")
