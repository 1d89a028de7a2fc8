"""The page in Chromium, every host but 127.0.0.1 unreachable: it loads, writes, stops, switches, fails, recovers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_browser import DONE, Visit, choose, launch, served, serving, shoot, workers
from playwright.sync_api import Browser, Page, Playwright, expect
from serving import running
from tiny_page import CONTEXT, PROMPTS, copy_folder, made_folder

from lmworks.runtime.decoding import generate
from lmworks.runtime.predictor import load

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Our server over the tiny model."""
    with running(made_folder()) as base:
        yield base


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """A fresh context; no service worker, which would outlive its server."""
    context = browser.new_context(service_workers="block")
    context.set_default_timeout(DONE)
    yield Visit(context)
    context.close()


def write(page: Page, prompt: str, *, temperature: float = 0, tokens: int = 40) -> str:
    """Write with these settings and return the text."""
    page.evaluate("delete document.documentElement.dataset.output")
    page.locator("#settings").evaluate("(details) => { details.open = true; }")
    page.fill("#temperature", str(temperature))
    page.fill("#tokens", str(tokens))
    page.fill("#prompt", prompt)
    page.click("#run")
    page.wait_for_selector("html[data-output]", state="attached")
    return page.locator("#output").text_content() or ""


def written(page: Page) -> dict[str, object]:
    """Return what the worker said about the last text."""
    value: dict[str, object] = json.loads(page.locator("html").get_attribute("data-output") or "{}")
    return value


def test_the_page_writes_what_python_writes(visit: Visit, address: str, tmp_path: Path) -> None:
    """C12: the same model, other text. C15: all requests go to the page's own host."""
    page = visit.open(address)
    expect(page.locator("#run")).to_contain_text("MB")
    assert workers(page, 0) == 0
    page.evaluate(
        """() => {
            window.seen = [];
            const output = document.getElementById("output");
            const watch = () => window.seen.push(output.textContent);
            new MutationObserver(watch).observe(output, { childList: true, subtree: true, characterData: true });
        }"""
    )
    text = write(page, PROMPTS[0])
    with_python = load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=40)
    assert text == with_python.text
    assert written(page)["tokens"] == with_python.tokens
    record = json.loads((made_folder() / "selftest.json").read_text())["prompts"][0]
    assert with_python.tokens[:32] == record["tokens"]
    seen = page.evaluate("window.seen")
    assert len(set(seen)) > 20, "the text arrives piece by piece"
    assert all(text.startswith(part) for part in seen)
    expect(page.locator("#state")).to_contain_text("Ready: fp32 on WebAssembly, ")
    expect(page.locator("#selftest")).to_contain_text("Self-test passed")
    expect(page.locator("#speed")).to_contain_text("tokens a second")
    expect(page.locator("#certificate")).to_contain_text("ONNX Runtime256 of 256 ✓")
    shoot(page, "text-generation", tmp_path)
    assert visit.complaints == []
    assert {url.split("/")[2] for url in visit.requests if not url.startswith("blob:")} == {address.split("/")[2]}


def test_the_whole_self_test_gives_every_token(visit: Visit, address: str) -> None:
    page = visit.open(address)
    page.click("#load")
    page.click("#fulltest")
    expect(page.locator("#selftest")).to_contain_text("Self-test passed: 256 of 256 tokens")


def test_characters_of_several_bytes_arrive_whole(visit: Visit, address: str) -> None:
    page = visit.open(address)
    page.evaluate(
        """() => {
            window.broken = 0;
            const output = document.getElementById("output");
            const watch = () => { window.broken += output.textContent.includes("\\ufffd") ? 1 : 0; };
            new MutationObserver(watch).observe(output, { childList: true, subtree: true, characterData: true });
        }"""
    )
    predictor = load(made_folder(), runtime="onnx")
    for prompt in ("Every café ", "The 🦊 finds two hats "):
        assert write(page, prompt, tokens=60) == predictor.generate(prompt, max_tokens=60).text
    assert page.evaluate("window.broken") == 0


def test_threads_are_there(visit: Visit, address: str) -> None:
    """C17: single-threaded WASM. A graph this small is faster on one thread, so two are asked for by hand."""
    page = visit.open(address)
    assert page.evaluate("crossOriginIsolated") is True
    info, tokens = page.evaluate(
        """async (text) => {
            const { Client } = await import("/web/client.js");
            const { files } = await (await fetch("/web/page.json")).json();
            const client = new Client();
            const info = await client.call("load", { dtype: "fp32", device: "wasm", files, threads: 2 });
            const { tokens } = await client.call("generate", { text, options: { tokens: 20 } });
            client.end();
            return [info, tokens];
        }""",
        PROMPTS[0],
    )
    assert info["threads"] == 2
    assert tokens == load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=20).tokens
    page.click("#load")
    expect(page.locator("#state")).to_have_text("Ready: fp32 on WebAssembly, 1 thread.")


def test_stop_stops_at_the_next_token_and_the_model_stays_usable(visit: Visit, address: str) -> None:
    page = visit.open(address)
    page.click("#load")
    page.wait_for_selector("html[data-selftest]", state="attached")
    page.evaluate(
        """() => {
            const output = document.getElementById("output");
            const stop = () => {
                if (!output.textContent) return;
                watch.disconnect();
                document.getElementById("stop").click();
            };
            const watch = new MutationObserver(stop);
            watch.observe(output, { childList: true, subtree: true, characterData: true });
        }"""
    )
    write(page, PROMPTS[0], tokens=CONTEXT)
    assert written(page)["reason"] == "interrupted"
    assert 1 <= len(written(page)["tokens"]) < 60
    expect(page.locator("#ending")).to_have_text("Stopped.")
    expect(page.locator("#stop")).to_be_disabled()
    assert write(page, PROMPTS[0]) == load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=40).text


def test_switching_the_precision_ends_the_worker(visit: Visit, address: str) -> None:
    """C14: memory not freed: only ending the worker gives it back."""
    page = visit.open(address)
    write(page, PROMPTS[0])
    assert workers(page, 1) == 1
    choose(page, "int8")
    assert workers(page, 0) == 0
    expect(page.locator("#run")).to_contain_text("Load")
    int8 = load(made_folder(), runtime="onnx", dtype="int8")
    assert write(page, PROMPTS[0]) == int8.generate(PROMPTS[0], max_tokens=40).text
    expect(page.locator("#state")).to_contain_text("Ready: int8")
    expect(page.locator("#selftest")).to_contain_text("Self-test passed")
    page.click("#unload")
    expect(page.locator("#state")).to_contain_text("Unloaded")
    assert workers(page, 0) == 0


@pytest.mark.parametrize("known", [False, True], ids=["damaged on the way", "damaged before the page was made"])
def test_a_damaged_model_is_an_error_and_the_other_precision_still_loads(
    known: bool, visit: Visit, tmp_path: Path
) -> None:
    """After a failed load everything fails in the same worker, so the page takes a fresh one."""
    folder = copy_folder(tmp_path / "model")
    path = folder / "onnx" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    if known:
        listed = json.loads((folder / "web/page.json").read_text())
        listed["files"]["onnx/model.onnx"]["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "web/page.json").write_text(json.dumps(listed))
    with served(folder) as base:
        page = visit.open(base)
        page.click("#run")
        problem = page.locator("#problem")
        expect(problem).to_be_visible(timeout=DONE)
        if not known:
            expect(problem).to_contain_text("onnx/model.onnx is damaged")
        assert problem.inner_text().strip()
        assert workers(page, 0) == 0
        choose(page, "int8")
        text = write(page, PROMPTS[0])
        assert text == load(folder, runtime="onnx", dtype="int8").generate(PROMPTS[0], max_tokens=40).text
        expect(problem).to_be_hidden()


def test_a_model_that_gives_other_answers_says_so(visit: Visit, tmp_path: Path) -> None:
    """C13: silently wrong: the self-test on load compares with what torch recorded."""
    folder = copy_folder(tmp_path / "model")
    selftest = json.loads((folder / "selftest.json").read_text())
    for prompt in selftest["prompts"]:
        prompt["tokens"][1] += 1
    (folder / "selftest.json").write_text(json.dumps(selftest))
    with running(folder) as base:
        page = visit.open(base)
        page.click("#load")
        page.wait_for_selector('html[data-selftest="failed"]', state="attached")
        expect(page.locator("#selftest")).to_contain_text("Self-test failed")
        choose(page, "int8")
        page.click("#load")
        expect(page.locator("#selftest")).to_contain_text(
            "Self-test passed", timeout=DONE
        )  # int8 is held to its logits


def test_the_same_seed_writes_the_same_text(visit: Visit, address: str) -> None:
    page = visit.open(address)
    texts = []
    for seed in ("7", "7", "8"):
        page.locator("#settings").evaluate("(details) => { details.open = true; }")
        page.fill("#seed", seed)
        texts.append(write(page, PROMPTS[0], temperature=1.5))
    assert texts[0] == texts[1] != texts[2]
    page.fill("#top-k", "1")
    assert write(page, PROMPTS[0], temperature=1.5) == write(page, PROMPTS[0], temperature=0), "k = 1 leaves no choice"
    page.fill("#top-k", "-1")
    page.click("#run")
    expect(page.locator("#problem")).to_contain_text("Top k")


def test_a_long_text_is_cut_and_a_full_context_goes_on(visit: Visit, address: str) -> None:
    page = visit.open(address)
    predictor = load(made_folder(), runtime="onnx")
    long = "The small bird sees the river. " * 40
    ids = predictor.tokenizer.encode(long)
    seen = ids[-(CONTEXT - 20 + 1) :]  # room for 20 tokens, the last of which is never read
    text = write(page, long, tokens=20)
    expected = generate(predictor.runtime, predictor.tokenizer, seen, max_tokens=20)
    assert text == "".join(expected)
    assert written(page)["cut"] == len(ids) - len(seen)
    assert written(page)["tokens"] == expected.result.tokens
    expect(page.locator("#ending")).to_contain_text("did not see its first")
    first = write(page, PROMPTS[0], tokens=500)
    expect(page.locator("#ending")).to_contain_text("context is full")
    page.evaluate("delete document.documentElement.dataset.output")
    page.click("#more")
    page.wait_for_selector("html[data-output]", state="attached")
    assert page.locator("#given").text_content() == PROMPTS[0] + first
    assert page.locator("#output").text_content()
    assert write(page, "", tokens=5), "an empty text begins a new one"


def test_keyboard_names_and_small_screens(visit: Visit, address: str) -> None:
    page = visit.open(address)
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, progress, [role=region]")]
            .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
            .map((e) => e.id)"""
    )
    assert unnamed == []
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("html[data-output]", state="attached")
    assert page.get_attribute("#page", "aria-live") == "polite"
    assert page.get_attribute("#page", "aria-busy") == "false"
    reached = set()
    page.focus("#prompt")
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"run", "more", "dtype", "unload"} <= reached


def test_it_works_without_a_connection_and_with_threads_on_any_host(browser: Browser) -> None:
    """C15, C17: after one visit nothing is needed; the service worker adds COOP and COEP where a host sends none."""
    context = browser.new_context()
    context.set_default_timeout(DONE)
    visit = Visit(context)
    with serving(made_folder(), headers=False) as (base, server):
        page = visit.open(base)
        page.wait_for_function("() => crossOriginIsolated && navigator.serviceWorker.controller")
        page.wait_for_selector("html[data-ready]", state="attached")
        text = write(page, PROMPTS[0])
        server.shutdown()
        server.server_close()
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert write(page, PROMPTS[0]) == text
        expect(page.locator("#selftest")).to_contain_text("Self-test passed")
    context.close()


@pytest.mark.slow
def test_webgpu_gives_the_same_text_or_goes_back_to_webassembly(playwright: Playwright, tmp_path: Path) -> None:
    """C13: WebGPU silently wrong: here a software adapter is right, and with a changed record the page goes back."""
    chromium = launch(playwright, "--enable-unsafe-webgpu", without=("--disable-gpu",))
    context = chromium.new_context(service_workers="block")
    context.set_default_timeout(240_000)
    with running(made_folder()) as base:
        page = Visit(context).open(base)
        choose(page, "webgpu")
        text = write(page, PROMPTS[0], tokens=4)
        expect(page.locator("#state")).to_have_text("Ready: fp32 on WebGPU.")
        expect(page.locator("#selftest")).to_contain_text("Self-test passed")
        assert text == load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=4).text
    folder = copy_folder(tmp_path / "model")
    selftest = json.loads((folder / "selftest.json").read_text())
    selftest["prompts"][0]["tokens"][1] += 1
    (folder / "selftest.json").write_text(json.dumps(selftest))
    with running(folder) as base:
        page = Visit(context).open(base)
        choose(page, "webgpu")
        page.click("#load")
        expect(page.locator("#state")).to_contain_text("went back to WebAssembly", timeout=240_000)
        assert page.locator('input[value="wasm"]').is_checked()
    chromium.close()
