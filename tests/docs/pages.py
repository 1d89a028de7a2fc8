"""The pages as their reader sees them: which blocks are commands, what they should print, what is said about them.

Blocks in `sh`, `bash` and `python` are run; a `text`, `json` … block right after one is what it prints. Remarks to the
test are comments before a block, which no reader sees:

    <!-- run: no REASON -->       it cannot run here, and why
    <!-- run: file NAME -->       it is the content of a file
    <!-- run: exit N -->          it ends with this exit code, and prints on standard error too
    <!-- run: typed KEYS -->      at a terminal, where each question is answered by the next of these letters; the block
                                  after it is what is seen there
    <!-- run: made NAME -->       it made the folder NAME, which pages share (tests/docs/material.py)
    <!-- run: server -->          it goes on in the background; port 8000 stands for any free one, db.internal for a
                                  PostgreSQL that the test started
    <!-- run: unlike REASON -->   what it prints is not the same each time
    <!-- page: needs NAME … -->   models and files that the page takes for granted (tests/docs/material.py);
                                  MODEL=my_model is one under another name
    <!-- page: slow -->           minutes rather than seconds
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = {"sh", "bash", "python"}
REMARKS = ("", "no", "file", "exit", "typed", "made", "server", "unlike")
SHOWN = {"text", "json", "yaml", "toml", "sql", "html", "javascript", "http", "dockerfile", "diff", "jinja"}


@dataclass
class Block:
    """A block of code: its first line, its language, and what should come of it."""

    line: int
    language: str
    text: str
    remark: str = ""  # one of REMARKS
    value: str = ""
    output: str | None = None
    shown: tuple[int, int] = (0, 0)  # the lines of the output, from one fence to the next


@dataclass
class Page:
    """A page of the site."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    slow: bool = False

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix().removesuffix(".md")


def read_page(path: Path) -> Page:
    """Return a page's blocks in their order."""
    page, remark = Page(path), ("", "")
    before = None  # the command that a block of output would follow
    for token in MarkdownIt().parse(path.read_text("utf-8")):
        if token.type == "html_block":
            for kind, word, value in re.findall(r"<!-- (run|page): (\w+) ?(.*?) ?-->", token.content):
                if kind == "run":
                    remark = (word, value)
                elif word == "needs":
                    page.needs += value.split()
                else:
                    page.slow |= word == "slow"
        elif token.type in ("fence", "code_block"):
            language = token.info.strip()
            if language.startswith("{"):  # a directive of MyST
                continue
            block = Block((token.map or [0])[0] + 1, language, token.content, *remark)
            if before is not None and language in SHOWN and not remark[0]:
                before.output, before.shown = token.content, tuple(token.map or (0, 0))  # type: ignore[assignment]
            elif language in RUN or language not in SHOWN or remark[0]:
                page.blocks.append(block)
            before = block if language in RUN and block.remark not in ("no", "file", "made", "server") else None
            remark = ("", "")
        else:
            before = None
    return page


def all_pages() -> list[Page]:
    """Return every page of the site, and the README."""
    return [read_page(path) for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]]


NUMBER = re.compile(r"\d+\.\d+")


def is_like(printed: str, shown: str) -> bool:
    """Compare line by line: `…` stands for anything, a line of it for any lines, and decimals may differ a little."""
    want, have = ("\n".join(line.rstrip() for line in text.splitlines()).strip("\n") for text in (shown, printed))
    return rest_is_like(have.splitlines(), want.splitlines())


def rest_is_like(have: list[str], want: list[str]) -> bool:
    """Compare what is left of both."""
    if not want:
        return not have
    if want[0].strip() == "…":
        return any(rest_is_like(have[i:], want[1:]) for i in range(len(have) + 1))
    return bool(have) and line_is_like(have[0], want[0]) and rest_is_like(have[1:], want[1:])


def line_is_like(have: str, want: str) -> bool:
    """Compare two lines; a number of another length moves the columns of a table, and its rules."""
    have, want = (re.sub("(  |──)[ ─]*", r"\1", line) for line in (have, want))
    pattern = NUMBER.sub("0.0", want)
    found = re.fullmatch(re.escape(pattern).replace("…", "(.*?)"), NUMBER.sub("0.0", have))
    if not found:
        return False
    if "…" in want:  # which of the numbers are meant cannot be told
        return True
    pairs = zip(NUMBER.findall(have), NUMBER.findall(want), strict=True)
    return all(abs(float(a) - float(b)) <= 0.02 + 0.02 * abs(float(b)) for a, b in pairs)
