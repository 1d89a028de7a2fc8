"""The page as one file: it opens from disk, with no network, and answers as Python does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_browser import DONE, Visit
from playwright.sync_api import Browser, expect
from task_pages import made_page
from tiny_page import PROMPTS, copy_folder, made_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.export import single_file
from lmworks.export.single_file import write_single_file
from lmworks.runtime.predictor import load


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A context without a network."""
    context = browser.new_context()
    context.set_default_timeout(DONE)
    context.set_offline(True)
    yield Visit(context)
    context.close()


@pytest.mark.browser
def test_a_task_opens_from_disk_and_answers(visit: Visit, tmp_path: Path) -> None:
    folder = made_page("image-classification", ("fp32", "int8", "fp16"))
    path = tmp_path / "a page & more.html"
    assert write_single_file(folder, path) == path.stat().st_size < 15e6
    page = visit.open(path.as_uri())
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    given = json.loads(page.get_attribute("html", "data-output") or "")
    known = json.loads((folder / "selftest.json").read_text())["items"][0]["output"]
    assert [label["label"] for label in given] == [label["label"] for label in known]
    assert abs(given[0]["score"] - known[0]["score"]) < 1e-4
    expect(page.locator("#selftest")).to_contain_text("Self-test passed")
    page.check('input[value="int8"]')
    page.click("#load")
    expect(page.locator("#state")).to_contain_text("Ready: int8")
    assert {url.split(":")[0] for url in visit.requests} <= {"file", "blob", "data"}
    assert sum(url.startswith("file:") for url in visit.requests) == 1, "the page itself and nothing beside it"
    assert visit.complaints == []


@pytest.mark.browser
def test_a_model_that_writes_opens_from_disk_and_writes(visit: Visit, tmp_path: Path) -> None:
    page = visit.open(Path(write(tmp_path)).as_uri())
    expect(page.locator("#certificate")).to_contain_text("ONNX Runtime")
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    page.fill("#temperature", "0")
    page.fill("#tokens", "20")
    page.fill("#prompt", PROMPTS[0])
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    with_python = load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=20)
    assert page.locator("#output").text_content() == with_python.text
    page.locator("footer summary").click()
    expect(page.locator("footer pre")).to_contain_text("Apache License")


@pytest.mark.browser
def test_a_damaged_file_is_an_error(visit: Visit, tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text()
    start = text.index('data-file="onnx/model.onnx">') + 2000
    path.write_text(text[:start] + "AAAAAAAAAAAA" + text[start + 12 :])
    page = visit.open(path.as_uri())
    page.click("#run")
    expect(page.locator("#problem")).to_be_visible()
    page.check('input[value="int8"]')
    page.click("#load")
    expect(page.locator("#selftest")).to_contain_text("Self-test passed")


def write(tmp_path: Path) -> Path:
    """Return the tiny model's page as one file."""
    write_single_file(made_folder(), tmp_path / "one.html")
    return tmp_path / "one.html"


def test_the_same_folder_gives_the_same_file(tmp_path: Path) -> None:
    first = write(tmp_path).read_bytes()
    assert write(tmp_path).read_bytes() == first
    assert b"http-equiv" in first
    assert b'src="web/' not in first
    assert b'href="web/' not in first


def test_what_is_too_large_is_refused_with_sizes_and_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = json.loads((made_folder() / "web" / "page.json").read_text())
    total = sum(known["bytes"] for name, known in page["files"].items() if not name.endswith((".txt", "vendor.json")))
    monkeypatch.setattr(single_file, "LARGEST", total - page["dtypes"]["fp32"]["bytes"])
    out = tmp_path / "one.html"
    with pytest.raises(InputError, match="too large for a single file") as caught:
        write_single_file(made_folder(), out)
    assert "fp32" in caught.value.found
    assert "--dtype int8" in caught.value.fix
    assert not out.exists()
    monkeypatch.setattr(single_file, "LARGEST", 1000)
    with pytest.raises(InputError, match="too large") as caught:
        write_single_file(made_folder(), out)
    assert "smaller model" in caught.value.fix


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no page"):
        write_single_file(tmp_path, tmp_path / "one.html")
    folder = copy_folder(tmp_path / "model")
    shell = folder / "index.html"
    shell.write_text(shell.read_text().replace('<link rel="stylesheet"', '<link  rel="stylesheet"'))
    with pytest.raises(FormatError, match="not of this version"):
        write_single_file(folder, tmp_path / "one.html")
    shutil.rmtree(folder)
