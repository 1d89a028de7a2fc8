"""The page's attention panel in Chromium: the graph's own weights, by mouse and by keyboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from page_browser import DONE, Visit, served, shoot
from playwright.sync_api import Browser, Page, expect
from task_pages import LABELS, cut_minilm

import lmworks
from lmworks.export.onnx_folder import export_graphs
from lmworks.models.checkpoint import load_model
from lmworks.models.folder import write_folder
from lmworks.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.browser
TEXT = "Ada Lovelace unmistakably lived in Paris."
WORDS = ["[CLS]", "ada", "love", "lace", "un", "mist", "aka", "bly", "lived", "in", "paris", ".", "[SEP]"]
PIECES = ["lace", "mist", "aka", "bly"]
LINES = ["A dog runs in the park.", "A puppy plays outside."]
HEARD = """
window.heard = [];
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (data, ...rest) {
  window.heard.push(data.type);
  return post.call(this, data, ...rest);
};
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of MiniLM's first layers: a classifier with its attention and without, and vectors."""
    place = tmp_path_factory.mktemp("attention")
    (place / "vectors").mkdir()
    cut_minilm(place / "vectors")
    model = load_model(place / "vectors", "SequenceClassification", labels=LABELS["text-classification"], new_head=True)
    (place / "classes").mkdir()
    write_folder(model.eval(), place / "vectors", place / "classes")
    made = {"shown": ("classes", True), "plain": ("classes", False), "search": ("vectors", True)}
    for name, (source, attentions) in made.items():
        export_graphs(place / source, place / name, to="web", dtypes=["fp32"], attentions=attentions)
    return {name: place / name for name in made}


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A fresh context; no service worker, which would outlive its server."""
    context = browser.new_context(service_workers="block", viewport={"width": 1280, "height": 800})
    context.set_default_timeout(DONE)
    context.add_init_script(HEARD)
    yield Visit(context)
    context.close()


def answer(page: Page) -> None:
    """Press the button and wait until everything is done."""
    page.evaluate("delete document.documentElement.dataset.output")
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#problem")).to_be_hidden()


def weights_of(folder: Path, text: str) -> np.ndarray:
    """Return what Python's ONNX Runtime gives for a text alone, (layers, heads, T, T)."""
    session = lmworks.load(folder, threads=1).runtime.session
    ids = np.array([Tokenizer.from_pretrained(folder).encode_inputs([text])[0].ids])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return np.stack(session.run([f"attentions.{i}" for i in range(2)], feed))[:, 0]


def shown(page: Page) -> list[str]:
    """Return the number of every token."""
    return page.locator(".tokens [role=option]").evaluate_all("(tokens) => tokens.map((token) => token.title)")


def assert_shown(page: Page, row: np.ndarray) -> None:
    """Hold what is shown to the weights (T,), digit by digit: only a number between two digits may go either way."""
    numbers = shown(page)
    assert len(numbers) == len(row)
    for text, weight in zip(numbers, 100 * row.astype(np.float64), strict=True):
        near = {f"{weight + shift:.1f} %" if weight + shift >= 0.1 else "< 0.1 %" for shift in (-1e-3, 1e-3)}
        assert text in near
    named = page.locator(".tokens [role=option]").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
    words = page.locator(".tokens [role=option]").all_inner_texts()
    assert named == [f"{word}, {number}" for word, number in zip(words, numbers, strict=True)]


def test_the_weights_are_those_of_the_graph(folders: dict[str, Path], visit: Visit, tmp_path: Path) -> None:
    """Layers, heads and their means; nothing is asked of the graph before the panel is opened."""
    known = weights_of(folders["shown"], TEXT)
    with served(folders["shown"]) as base:
        page = visit.open(base)
        panel = page.locator("#attention")
        expect(panel).to_be_hidden()
        page.fill("#text", TEXT)
        answer(page)
        expect(panel).to_be_visible()
        assert panel.get_attribute("open") is None
        assert page.evaluate("window.heard.includes('attend')") is False, "an ordinary answer fetches no attention"
        panel.locator("summary").click()
        expect(page.locator(".tokens [role=option]")).to_have_text(WORDS)
        assert page.locator(".tokens .joined").all_inner_texts() == PIECES
        expect(panel).to_contain_text("Attention shows where the model looks, not why it answers.")
        assert_shown(page, known.mean((0, 1))[1])
        place = page.locator(".tokens [role=option]")
        for layer, head, token in ((None, 3, 8), (0, None, 0), (1, 7, 10), (0, 11, 12)):
            page.select_option("select[name=layer]", label="mean of layers" if layer is None else str(layer + 1))
            page.select_option("select[name=head]", label="mean of heads" if head is None else str(head + 1))
            expect(page.locator("#run")).to_be_enabled()
            place.nth(token).click()
            chosen = known.mean(0) if layer is None else known[layer]
            row = (chosen.mean(0) if head is None else chosen[head])[token]
            assert_shown(page, row)
            best = panel.locator(".bar span").first.inner_text()
            assert best.removesuffix(" (itself)") == WORDS[int(row.argmax())]
            expect(panel.locator("h3")).to_have_text(f"“{WORDS[token]}” looks at")
        shades = place.evaluate_all("(all) => all.map((one) => parseFloat(one.style.getPropertyValue('--part')))")
        assert np.argsort(shades)[-3:].tolist() == np.argsort(row)[-3:].tolist(), "the more, the darker"
        assert not panel.locator("select[name=part]").is_visible()
        shoot(page, "attention", tmp_path)
        assert page.evaluate("window.heard.filter((type) => type === 'run').length") == 1
    assert visit.complaints == []


def test_the_panel_by_keyboard_and_from_answer_to_answer(folders: dict[str, Path], visit: Visit) -> None:
    with served(folders["shown"]) as base:
        page = visit.open(base)
        page.fill("#text", TEXT)
        answer(page)
        page.focus("#attention summary")
        page.keyboard.press("Enter")
        options = page.locator(".tokens [role=option]")
        expect(options).to_have_count(len(WORDS))
        for _ in range(3):  # layer, head, the one token that the Tab key reaches
            page.keyboard.press("Tab")
        chosen = "[aria-selected=true][tabindex='0']:focus"
        for key, word in (("ArrowRight", "love"), ("End", "[SEP]"), ("ArrowRight", "[SEP]"), ("ArrowLeft", "."),
                          ("Home", "[CLS]"), ("ArrowDown", "ada")):  # fmt: skip
            page.keyboard.press(key)
            expect(page.locator(f".tokens {chosen}")).to_have_text(word)
        assert page.locator(".tokens [tabindex='0']").count() == 1
        row = weights_of(folders["shown"], TEXT).mean((0, 1))[1]
        assert_shown(page, row)
        status = page.locator("#attention [role=status]").inner_text()
        assert status.startswith("ada, token 2 of 13 tokens, looks at ")
        assert status.count(" %") == 3
        unnamed = page.locator("#attention select, #attention [role=listbox]").evaluate_all(
            "(all) => all.filter((one) => !one.labels?.length && !one.ariaLabel).length"
        )
        assert unnamed == 0
        page.fill("#text", "Cats sleep.")
        answer(page)
        expect(options).to_have_text(["[CLS]", "cats", "sleep", ".", "[SEP]"])
        assert_shown(page, weights_of(folders["shown"], "Cats sleep.").mean((0, 1))[1])
        page.click("#unload")  # what is chosen later loads the model again
        page.select_option("select[name=layer]", label="2")
        expect(page.locator("#state")).to_contain_text("Ready")
        expect(page.locator("#run")).to_be_enabled()
        assert_shown(page, weights_of(folders["shown"], "Cats sleep.")[1].mean(0)[1])
        page.locator("#examples button").first.click()
        expect(page.locator("#attention")).to_be_hidden()
    assert visit.complaints == []


def test_a_graph_without_attention_has_no_panel(folders: dict[str, Path], visit: Visit) -> None:
    assert "attentions" not in json.loads((folders["plain"] / "lmworks.json").read_text())["export"]
    with served(folders["plain"]) as base:
        page = visit.open(base)
        page.fill("#text", TEXT)
        answer(page)
        expect(page.locator("#attention")).to_be_hidden()
    assert visit.complaints == []


def test_each_text_of_a_search_can_be_looked_at(folders: dict[str, Path], visit: Visit, tmp_path: Path) -> None:
    with served(folders["search"]) as base:
        page = visit.open(base)
        page.fill("#query", "a young dog")
        page.fill("#lines", "\n".join(LINES))
        answer(page)
        page.click("#attention summary")
        expect(page.locator(".tokens [role=option]")).to_have_text(["[CLS]", "a", "young", "dog", "[SEP]"])
        ranked = [row["text"] for row in json.loads(page.get_attribute("html", "data-output") or "")]
        parts = page.locator("select[name=part] option").all_inner_texts()
        assert parts == [f"{i + 1}: {text.lower()}" for i, text in enumerate(["a young dog", *ranked])]
        page.select_option("select[name=part]", index=2)
        expect(page.locator(".tokens [role=option]").nth(2)).to_have_text(ranked[1].split()[1])
        assert_shown(page, weights_of(folders["search"], ranked[1]).mean((0, 1))[1])
        shoot(page, "attention-search", tmp_path)
    assert visit.complaints == []
