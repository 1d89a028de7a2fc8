"""The page of every task in Chromium: Python's answer, shown in its place, on a phone and a desktop, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_browser import DONE, Visit, served, shoot
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from task_pages import LABELS, made_page

import lmworks

pytestmark = pytest.mark.browser
TEXT = "🙂🙂 In those days Zoë Müller left Paris to join the Bank of Spain."
CONTEXT = "👩‍👩‍👧 Ada Lovelace lives in Paris and works for Nokia."
MASKED = "Ada Lovelace lives in [MASK] and works for [MASK]."
LINES = ["A dog runs in the park.", "The bank raised its rates.", "", "Cats sleep all day 🙂", "A puppy plays outside."]
NAMED = """(() => {
  const { id, name, localName } = document.activeElement;
  return id || name || { a: "link", button: "example" }[localName];
})()"""
WATCH = """
window.shifts = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) window.shifts += entry.value; })
  .observe({ type: "layout-shift", buffered: true });
"""


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A fresh context; no service worker, which would outlive its server."""
    context = browser.new_context(service_workers="block", viewport={"width": 1280, "height": 800})
    context.set_default_timeout(DONE)
    yield Visit(context)
    context.close()


def answer(page: Page) -> Any:
    """Press the button and return what the worker answered."""
    page.evaluate("delete document.documentElement.dataset.output")
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    expect(page.locator("#problem")).to_be_hidden()
    return json.loads(page.get_attribute("html", "data-output") or "null")


def ask_python(task: str, example: Any, **more: Any) -> Any:
    """Return Python's answer with the options that the page begins with."""
    folder = made_page(task)
    options = {**json.loads((folder / "selftest.json").read_text())["options"], **more}
    found = lmworks.load(folder, runtime="onnx", **options)(example)
    return json.loads(json.dumps(found, default=lambda v: v.tolist() if hasattr(v, "tolist") else vars(v)))


def close(given: Any, known: Any) -> bool:
    """Compare answers: numbers within rounding, everything else equal."""
    if isinstance(known, dict):
        return given.keys() == known.keys() and all(close(given[key], known[key]) for key in known)
    if isinstance(known, list):
        return len(given) == len(known) and all(close(a, b) for a, b in zip(given, known, strict=True))
    return abs(given - known) < 1e-4 if isinstance(known, float) else given == known


def marked(page: Page) -> list[str]:
    """Return the marked parts of the text, without their types."""
    script = "marks => marks.map((m) => [...m.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(''))"
    return page.locator("#result mark").evaluate_all(script)


def picture(path: Path) -> Path:
    """Write a picture that is no example of the page."""
    y, x = np.mgrid[0:90, 0:120]
    Image.fromarray(np.stack((2 * x, 255 - 2 * y, (x * y) % 256), -1).astype(np.uint8)).save(path)
    return path


def use_classify(page: Page, _: Path) -> None:
    page.fill("#text", TEXT)
    known = ask_python("text-classification", TEXT)
    assert close(answer(page), known)
    rows = page.locator("#result .bar").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == [label["label"] for label in known]
    assert f"{100 * known[0]['score']:.1f} %" in rows[0]
    page.fill("#text", " ")
    page.click("#run")
    expect(page.locator("#problem")).to_have_text("Write a text first.")
    long = f"{TEXT} " * 60
    page.fill("#text", long)
    assert close(answer(page), ask_python("text-classification", long))
    expect(page.locator("#ending")).to_contain_text("read in overlapping windows")
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    page.select_option("select[name=long]", "truncate")
    assert close(answer(page), ask_python("text-classification", long, long="truncate"))
    expect(page.locator("#ending")).to_contain_text("only the first 512 were read")
    page.select_option("select[name=long]", "error")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("512")
    expect(page.locator("#state")).to_contain_text("Ready")
    page.fill("#text", TEXT)
    assert close(answer(page), known)


def use_entities(page: Page, _: Path) -> None:
    page.fill("#text", TEXT)
    known = ask_python("token-classification", TEXT)
    assert close(answer(page), known)
    assert {"Zoë Müller", "Paris", "the Bank of Spain"} & set(marked(page)), "the head has learned something"
    assert marked(page) == [TEXT[e["start"] : e["end"]] for e in known]
    assert set(page.locator(".legend li").all_inner_texts()) == {
        f"{kind} {sum(e['label'] == kind for e in known)}" for kind in {e["label"] for e in known}
    }
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    page.select_option("select[name=aggregation]", "none")
    assert close(answer(page), ask_python("token-classification", TEXT, aggregation="none"))
    page.select_option("select[name=aggregation]", "first")
    answer(page)


def use_question(page: Page, _: Path) -> None:
    page.fill("#question", "Where was Ada Lovelace?")
    page.fill("#context", CONTEXT)
    known = ask_python("question-answering", ("Where was Ada Lovelace?", CONTEXT))
    assert close(answer(page), known)
    assert marked(page) == [CONTEXT[known["start"] : known["end"]]]
    assert page.inner_text(".answer") == known["text"]
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    page.check("input[name=no_answer]")
    page.fill("input[name=top_k]", "3")
    question = ("Where was Ada Lovelace?", CONTEXT)
    assert close(answer(page), ask_python("question-answering", question, no_answer=True, top_k=3))
    assert page.locator("#result .bar").count() == 3
    page.fill("input[name=top_k]", "0")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("Answers")
    page.fill("input[name=top_k]", "1")
    page.uncheck("input[name=no_answer]")
    answer(page)


def use_blanks(page: Page, _: Path) -> None:
    page.fill("#text", MASKED)
    known = ask_python("fill-mask", MASKED)
    assert close(answer(page), known)
    button = page.locator(".gap").nth(1).locator("button").nth(2)
    assert button.inner_text().split("\n")[0].strip() == known[1][2]["token_str"].strip()
    button.click()
    assert page.input_value("#text") == f"Ada Lovelace lives in [MASK] and works for {known[1][2]['token_str']}."
    assert button.get_attribute("aria-pressed") == "true"
    page.fill("#text", "Nothing is missing.")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("no gap")
    page.fill("#text", MASKED)
    answer(page)


def use_search(page: Page, _: Path) -> None:
    page.fill("#query", "a young dog")
    page.fill("#lines", "\n".join(LINES))
    given = answer(page)
    texts = [line for line in LINES if line]
    vectors = np.array(ask_python("feature-extraction", ["a young dog", *texts]))
    scores = vectors[1:] @ vectors[0]
    assert [row["text"] for row in given] == [texts[i] for i in np.argsort(-scores)]
    assert np.allclose([row["score"] for row in given], np.sort(scores)[::-1], atol=1e-4)
    assert given[0]["text"] == "A puppy plays outside."
    page.fill("#lines", "\n".join(f"Line {n} of a long list, with some words more." for n in range(400)))
    page.evaluate("delete document.documentElement.dataset.output")
    page.click("#run")
    expect(page.locator("#speed")).to_contain_text("of 400 texts")
    page.click("#stop")
    expect(page.locator("#ending")).to_contain_text("Stopped: ")
    assert 0 < len(json.loads(page.get_attribute("html", "data-output") or "")) < 400
    expect(page.locator("#state")).to_contain_text("Ready")
    page.fill("#lines", "\n".join(LINES))
    assert answer(page) == given


def use_picture(page: Page, place: Path) -> None:
    path = picture(place / "photo.png")
    known = ask_python("image-classification", str(path))
    page.set_input_files("#file", path)
    expect(page.locator("#preview")).to_be_visible()
    assert close(answer(page), known)
    assert page.locator("#result .bar span").all_inner_texts() == [label["label"] for label in known]
    assert {label["label"] for label in known} == set(LABELS["image-classification"])
    page.locator(".thumbnail").nth(1).click()
    first = json.loads((made_page("image-classification") / "selftest.json").read_text())["items"][1]["output"]
    assert close(answer(page), first)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#problem")).to_have_text("notes.txt is not a picture.")
    page.set_input_files("#file", path)
    assert close(answer(page), known)


USES = {
    "text-classification": use_classify,
    "token-classification": use_entities,
    "question-answering": use_question,
    "fill-mask": use_blanks,
    "feature-extraction": use_search,
    "image-classification": use_picture,
}


@pytest.mark.parametrize("task", USES)
def test_the_page_of_a_task_gives_pythons_answers_and_shows_them(task: str, visit: Visit, tmp_path: Path) -> None:
    """C12: the same model, other answers. C15: nothing is asked of other hosts, and nothing at all after the load."""
    visit.page.add_init_script(WATCH)
    with served(made_page(task)) as base:
        page = visit.open(base)
        assert page.evaluate("window.shifts") < 0.02, "nothing moves while the page is built"
        page.click("#load")
        expect(page.locator("#selftest")).to_contain_text("Self-test passed")
        page.context.set_offline(True)
        asked = len(visit.requests)
        USES[task](page, tmp_path)
        assert not [url for url in visit.requests[asked:] if not url.startswith(("blob:", "data:"))]
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, select, progress, [role=region]")]
                .filter((e) => !(e.labels?.length || e.getAttribute("aria-label")))
                .filter((e) => !(e.textContent.trim() || e.querySelector("[alt]")))
                .map((e) => e.outerHTML)"""
        )
        assert unnamed == []
        assert page.locator("#spoken").text_content(), "the answer is read out"
        assert page.get_attribute("#spoken", "role") == "status"
        shoot(page, task, tmp_path)
    assert visit.complaints == []
    assert {url.split("/")[2] for url in visit.requests if url.startswith("http")} == {base.split("/")[2]}


def test_everything_is_done_with_the_keyboard(visit: Visit) -> None:
    with served(made_page("image-classification")) as base:
        page = visit.open(base)
        reached = []
        for _ in range(16):
            page.keyboard.press("Tab")
            reached.append(page.evaluate(NAMED))
        order = [reached.index(name) for name in ("link", "file", "example", "run", "dtype", "load")]
        assert order == sorted(order), "the focus follows the eye"
        page.focus("#file")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("html[data-output]", state="attached")
