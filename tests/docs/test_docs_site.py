"""The site: it is built without a warning, loads nothing from elsewhere, and no link in it is dead."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from pages import DOCS, ROOT

OUTSIDE = re.compile(r"^(https?:)?//|^(data|mailto|javascript):")
PLACE = re.compile(r"^(?:tests|benchmarks|src|docs|lmworks)/[\w./-]+$")  # a file of the repository, named in a text
BESIDE = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "benchmarks/RESULTS.md")


class Reader(HTMLParser):
    """What a page of HTML asks for, links to, and can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(found["href"])
        elif "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: a warning is an error."""
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "-W", "--keep-going", "-d", str(place / "trees"), str(DOCS),
         str(place / "html")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return place / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Reader]:
    """Every page of the site."""
    return {path: Reader(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_make_docs_builds_as_the_test_does() -> None:
    assert "sphinx --quiet -W --keep-going docs build/docs" in (ROOT / "Makefile").read_text()


def test_every_page_is_in_the_contents(site: Path, pages: dict[Path, Reader]) -> None:
    """The site has each of them, and the sidebar of the first page leads there."""
    index = set(pages[site / "index.html"].links)
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).with_suffix(".html")
        assert site / name in pages and (name.as_posix() in index or name.stem == "index"), name


def test_it_is_read_without_a_network(site: Path, pages: dict[Path, Reader]) -> None:
    """No script, style, font or picture comes from elsewhere."""
    for path, page in pages.items():
        assert not [address for address in page.loads if OUTSIDE.match(address) and not address.startswith("data:")]
        for address in page.loads:
            where = site if address.startswith("/") else path.parent
            assert address.startswith("data:") or (where / unquote(urlsplit(address).path)).is_file(), (path, address)
    for path in site.rglob("*.css"):
        assert not re.search(r"""@import|url\(\s*['"]?(https?:)?//""", path.read_text("utf-8")), path


def test_no_link_is_dead(pages: dict[Path, Reader]) -> None:
    """Pages, their headings, and files that the site hands out."""
    dead = []
    for path, page in pages.items():
        for link in page.links:
            if OUTSIDE.match(link):
                continue
            parts = urlsplit(link)
            to = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not to.is_file() or (parts.fragment and to in pages and parts.fragment not in pages[to].places):
                dead.append(f"{path.name}: {link}")
    assert not dead, dead


def slugs(path: Path) -> set[str]:
    """Return what GitHub calls a page's headings."""
    tokens = MarkdownIt().parse(path.read_text("utf-8"))
    titles = [tokens[i + 1].children or [] for i, token in enumerate(tokens) if token.type == "heading_open"]
    plain = ["".join(part.content for part in title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", [*BESIDE, *(p.relative_to(ROOT).as_posix() for p in sorted(DOCS.rglob("*.md")))])
def test_links_work_in_the_repository_too(name: str) -> None:
    """The same pages are read on a code host: files, and GitHub's anchors."""
    path = ROOT / name
    tokens = MarkdownIt().parse(path.read_text("utf-8"))
    inside = [part for token in tokens for part in token.children or []]
    for link in [str(part.attrs["href"]) for part in inside if part.type == "link_open"]:
        if OUTSIDE.match(link):
            continue
        to, _, anchor = link.partition("#")
        target = (path.parent / unquote(to)).resolve() if to else path
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in slugs(target), f"{name}: {link} is none of {sorted(slugs(target))}"
    if name.startswith("docs/log") or name == "CHANGELOG.md":  # what they name may have gone since
        return
    for code in [part.content for part in inside if part.type == "code_inline" and PLACE.match(part.content)]:
        place = f"src/{code}" if code.startswith("lmworks/") else code
        assert (ROOT / place).exists(), f"{name} names {code}"


def test_the_readme_is_one_screen() -> None:
    """Essentials; everything else has a page."""
    shown = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if not line.startswith("<!--")]
    assert len(shown) <= 70 and "make test" in "\n".join(shown)
