"""The playground in Chromium: it shows what the server answers, for every kind of model, with and without a key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_browser import DONE, Visit, shoot
from playwright.sync_api import Browser, Page, expect
from serving import Running, server
from tiny_page import made_folder

from lmworks.serve.guard import digest
from lmworks.serve.playground_files import FILES, PUBLIC

KEY = "a-right-key-of-some-length"
TEXT = "A fine film 🙂, a joy to watch <b>twice</b>."
NAMED = "🙂 Ada Lovelace lived in London & in Paris."


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(service_workers="block", viewport={"width": 1280, "height": 800})
    context.set_default_timeout(DONE)
    yield Visit(context)
    context.close()


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with server(made_folder(), keys=[digest(KEY)], ready=False) as one:
        one.wait()
        yield one


def enter(visit: Visit, base: str, model: str | None = None) -> Page:
    """Open the playground, and choose a model."""
    page = visit.open(f"{base}/playground")
    if model is not None:
        page.select_option("#model", model)
        page.wait_for_selector(f'html[data-model="{model}"]', state="attached")
    return page


def answer(page: Page) -> Any:
    """Press the button; return what the page was answered."""
    page.evaluate("delete document.documentElement.dataset.output")
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    expect(page.locator("#problem")).to_be_hidden()
    return json.loads(page.get_attribute("html", "data-output") or "null")


@pytest.mark.browser
def test_a_classifier_shows_the_servers_labels(served: Running, visit: Visit, tmp_path: Path) -> None:
    page = enter(visit, served.base, "sentiment")
    page.fill("#text", TEXT)
    known = served.post("/classify", {"text": TEXT, "model": "sentiment"}).json()["answers"][0]["labels"]
    assert answer(page) == known
    assert page.locator("#result .bar span").all_inner_texts() == [one["label"] for one in known]
    assert page.locator("#result .bar b").first.inner_text() == f"{100 * known[0]['score']:.1f} %"
    shoot(page, "playground-classify", tmp_path)
    page.fill("#text", "word " * 1000)
    answer(page)
    expect(page.locator("#ending")).to_contain_text("read in overlapping windows")
    page.click("#settings summary")
    page.select_option("[name=long]", "error")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("longer than the model")
    assert [text for text in visit.complaints if "400" not in text] == []


@pytest.mark.browser
def test_a_tagger_marks_the_servers_entities(served: Running, visit: Visit, tmp_path: Path) -> None:
    page = enter(visit, served.base, "names")
    page.fill("#text", NAMED)
    known = served.post("/ner", {"text": NAMED, "model": "names", "long": "window"}).json()["answers"][0]["entities"]
    assert known and answer(page) == known
    script = "marks => marks.map((m) => m.firstChild.data)"
    assert page.locator("#result mark").evaluate_all(script) == [NAMED[one["start"] : one["end"]] for one in known]
    shoot(page, "playground-ner", tmp_path)
    assert visit.complaints == []


@pytest.mark.browser
def test_a_search_ranks_by_the_servers_vectors(served: Running, visit: Visit, tmp_path: Path) -> None:
    lines = ["A dog runs in the park.", "The bank raised its rates.", "A puppy plays outside."]
    page = enter(visit, served.base, "minilm")
    page.fill("#query", "Where can a dog play?")
    page.fill("#lines", "\n".join(lines))
    found = answer(page)
    body = {"inputs": {"source_sentence": "Where can a dog play?", "sentences": lines}}
    known = dict(zip(lines, served.post("/similarity", body).json(), strict=True))
    assert [one["text"] for one in found] == sorted(lines, key=lambda line: -known[line])
    assert all(abs(one["score"] - known[one["text"]]) < 1e-5 for one in found)
    shoot(page, "playground-search", tmp_path)
    assert visit.complaints == []


@pytest.mark.browser
def test_a_writer_streams_can_be_stopped_and_wants_a_key_first(locked: Running, visit: Visit, tmp_path: Path) -> None:
    page = enter(visit, locked.base)
    assert page.url.endswith("/playground/")
    expect(page.locator("#locked")).to_be_visible()
    expect(page.locator("#form")).to_be_hidden()
    shoot(page, "playground-locked", tmp_path)
    page.fill("#key", "a-wrong-key-of-some-length")
    page.keyboard.press("Enter")
    expect(page.locator("#wrong")).to_contain_text("does not know this key")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#form")).to_be_visible()
    page.click("#settings summary")
    page.fill("#temperature", "0")
    page.fill("#tokens", "24")
    page.fill("#prompt", "Who")
    assert answer(page)["tokens"]
    body = {"prompt": "Who", "max_tokens": 24, "temperature": 0, "stream": False}
    known = locked.post("/generate", body, headers={"Authorization": f"Bearer {KEY}"}).json()
    assert page.locator("#output").inner_text() == known["text"]
    expect(page.locator("#speed")).to_contain_text(f"{len(known['tokens'])} tokens")
    shoot(page, "playground-write", tmp_path)
    held = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }, document.cookie, location.href])")
    assert KEY not in held, "the key is kept in memory alone"
    assert [text for text in visit.complaints if "401" not in text] == []


@pytest.mark.browser
def test_stop_ends_the_text_on_the_server_too(locked: Running, visit: Visit) -> None:
    page = enter(visit, locked.base)
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.fill("#prompt", "Who")
    hold = "() => { const read = ReadableStreamDefaultReader.prototype.read; let n = 0; "
    hold += "ReadableStreamDefaultReader.prototype.read = function () { n += 1; "
    hold += "return n > 2 ? new Promise(() => {}) : read.call(this); }; }"
    page.evaluate(hold)  # the third piece never arrives
    page.click("#run")
    expect(page.locator("#output")).not_to_be_empty()
    page.keyboard.press("Escape")
    assert locked.supervisor.tickets == {} or not page.wait_for_timeout(500)
    assert locked.supervisor.tickets == {}


def test_the_playground_is_open_and_strict_and_everything_else_is_not(locked: Running) -> None:
    first = httpx.get(f"{locked.base}/")
    assert (first.status_code, first.headers["location"]) == (307, "playground/")
    page = httpx.get(f"{locked.base}/playground/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert re.findall(r'(?:src|href)="(?!#|[\w./-]+\?v=[0-9a-f]{16}")[^"]*"', page.text) == []
    assert not re.search(r"style=|onclick=|<script>|<style", page.text)
    for name in FILES:
        answered = httpx.get(f"{locked.base}/playground/{name}")
        assert answered.status_code == 200, name
        assert answered.headers["content-type"].startswith(
            {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}[name.rsplit(".", 1)[1]]
        )
    version = re.findall(r"v=([0-9a-f]{16})", page.text)[0]
    assert "immutable" in httpx.get(f"{locked.base}/playground/dom.js?v={version}").headers["cache-control"]
    assert httpx.get(f"{locked.base}/playground/dom.js?v=other").headers["cache-control"] == "no-cache"
    for path in ("index.html", "config.json", "playground", "playground/config.json", "playground/../config.json",
                 "playground/%2e%2e/config.json", "web/dom.js", "info", "metrics"):  # fmt: skip
        assert httpx.get(f"{locked.base}/{path}").status_code == 401, path
    assert all(path == "/" or path.startswith("/playground/") for path in PUBLIC)
    right = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{locked.base}/playground/config.json", headers=right).status_code == 404


def test_without_a_page_of_its_own_a_server_begins_with_the_playground(served: Running) -> None:
    assert httpx.get(f"{served.base}/").headers["location"] == "playground/"
    assert httpx.get(f"{served.base}/info").json()["page"] is False
    with server(made_folder(), ready=False, settings={"warm": False}) as one:
        assert httpx.get(f"{one.base}/").status_code == 200, "its page is the first thing"
        assert httpx.get(f"{one.base}/info").json()["page"] is True
        assert httpx.get(f"{one.base}/playground/").status_code == 200
