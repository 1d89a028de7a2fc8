"""Conversations in JavaScript: prompts as Python renders them, and a page that keeps one going."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from js_engine import ODD, ask, byte_level
from page_browser import DONE, Visit, served, shoot
from playwright.sync_api import Browser, expect
from tiny_page import copy_folder, facts
from tokenizers import processors

from lmworks.export.web import describe_task, write_page
from lmworks.runtime.decoding import generate
from lmworks.runtime.predictor import load
from lmworks.tokens.chat import close_all, render_chat
from lmworks.tokens.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "tokens"))
from test_chat import CHATML, CHATS, LLAMA3, MISTRAL, ZEPHYR, with_template

TEMPLATES = {"llama 3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "zephyr": ZEPHYR}
PLAIN = (  # short: the tiny model reads 96 tokens
    "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
SYSTEM = "Be a bird."
STOP_AT_ONCE = """() => new MutationObserver(() => document.getElementById("stop").click())
    .observe(document.getElementById("page"), { childList: true, subtree: true, characterData: true })"""


@pytest.fixture(scope="module", autouse=True)
def no_child_stays() -> Iterator[None]:
    yield
    close_all()


@pytest.mark.node
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_python(name: str, tmp_path: Path) -> None:
    """The page's own description of the model, the library's Jinja, texts in several scripts."""
    ours, _ = with_template(tmp_path, TEMPLATES[name])
    chat = describe_task(tmp_path, "text-generation")["chat"]
    given = ask({"folder": str(tmp_path), "context": 4000, "chats": [{"messages": m, **chat} for m in CHATS]})
    for messages, found in zip(CHATS, given, strict=True):
        text = render_chat(ours, messages)
        assert found == {"text": text, "ids": ours.encode(text), "dropped": 0}


@pytest.mark.node
def test_a_long_conversation_loses_its_oldest_questions_and_a_template_may_refuse(tmp_path: Path) -> None:
    ours, _ = with_template(tmp_path, MISTRAL)
    chat = describe_task(tmp_path, "text-generation")["chat"]
    said = [{"role": "system", "content": SYSTEM}]
    said += [{"role": role, "content": f"{i} {role} words"} for i in range(3) for role in ("user", "assistant")]
    messages = [*said, {"role": "user", "content": "the last"}]
    short = render_chat(ours, [messages[0], *messages[5:]])
    context = len(ours.encode(short)) + 9
    chats: list[dict[str, Any]] = [{"messages": messages, "room": 10}, {"messages": messages, "room": context}]
    chats += [{"messages": [messages[1], messages[1]]}]
    given = ask({"folder": str(tmp_path), "context": context, "chats": [{**chat, **one} for one in chats]})
    assert (given[0]["ids"], given[0]["dropped"]) == (ours.encode(short), 4)
    assert given[1]["name"] == given[2]["name"] == "InputError"
    assert "too long" in given[1]["error"] and "Roles must alternate" in given[2]["error"]


@pytest.mark.node
def test_a_prompt_begins_as_the_model_expects(data_folder: Path, tmp_path: Path) -> None:
    """Python's ids, with the tokens that a tokenizer puts first (Llama's <s>), which a prompt that is cut keeps."""
    backend = byte_level(data_folder)
    first = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=first)
    tokenizer = Tokenizer(backend, config={"tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer.save(tmp_path)
    texts = ["", " ", "Once upon a time", *ODD]
    given = ask({"folder": str(tmp_path), "context": 400, "prompts": [[text, 8] for text in texts]})
    for text, found in zip(texts, given, strict=True):
        ids = tokenizer.encode_prompt(text)
        assert found == {"ids": ids, "cut": 0, "back": tokenizer.decode(ids)}, text
    long = tokenizer.encode_prompt("one two three four five")
    (cut,) = ask({"folder": str(tmp_path), "context": 8, "prompts": [["one two three four five", 6]]})
    assert (cut["ids"], cut["cut"]) == ([long[0], *long[-2:]], len(long) - 3)


def make_page(folder: Path) -> Path:
    """Return the tiny model with a chat template and its page."""
    copy_folder(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": PLAIN}))
    write_page(folder, title="Birds", facts=facts(), selftest=json.loads((folder / "selftest.json").read_text()))
    return folder


@pytest.mark.browser
def test_the_page_talks_as_python_does(browser: Browser, tmp_path: Path) -> None:
    """Two turns with a system text; a stop; a new conversation."""
    folder = make_page(tmp_path / "model")
    predictor, tokenizer = load(folder, runtime="onnx", dtype="fp32"), Tokenizer.from_pretrained(folder)
    context = browser.new_context(service_workers="block")
    context.set_default_timeout(DONE)
    visit = Visit(context)
    with served(folder) as base:
        page = visit.open(base)
        page.locator("#settings").evaluate("(details) => { details.open = true; }")
        page.fill("#temperature", "0")
        page.fill("#tokens", "12")
        page.locator("#fields details summary").click()
        page.fill("#system", SYSTEM)
        messages = [{"role": "system", "content": SYSTEM}]
        for said in ("Who sees\nthe river?", "A café ☕"):
            messages.append({"role": "user", "content": said})
            page.evaluate("delete document.documentElement.dataset.output")
            page.fill("#message", said)
            page.press("#message", "Enter")
            page.wait_for_selector("html[data-output]", state="attached")
            ids = tokenizer.encode(render_chat(tokenizer, messages))
            stream = generate(predictor.runtime, tokenizer, ids, max_tokens=12, eos_ids=predictor.eos_ids)
            answer = "".join(stream)
            done = json.loads(page.get_attribute("html", "data-output") or "")
            assert (done["tokens"], done["prompt"]) == (stream.result.tokens, len(ids))
            assert page.locator("#page li:last-child p").text_content() == answer
            messages.append({"role": "assistant", "content": answer})
        assert page.locator("#page li p").all_text_contents() == [one["content"] for one in messages[1:]]
        assert page.locator("#page li").first.locator("b").text_content() == "You"
        assert page.input_value("#message") == ""
        shoot(page, "chat", tmp_path)
        page.fill("#message", "x" * 400)
        page.press("#message", "Enter")
        expect(page.locator("#problem")).to_contain_text("too long")
        assert page.input_value("#message") == "x" * 400 and page.locator("#page li").count() == 4
        page.click("#new")
        expect(page.locator("#page li")).to_have_count(0)
        page.evaluate(STOP_AT_ONCE)
        page.evaluate("delete document.documentElement.dataset.output")
        page.fill("#tokens", "60")
        page.fill("#message", "Who")
        page.press("#message", "Enter")
        page.wait_for_selector("html[data-output]", state="attached")
        done = json.loads(page.get_attribute("html", "data-output") or "")
        assert done["reason"] == "interrupted" and len(done["tokens"]) < 60
        assert page.locator("#page li").count() == 2
        assert visit.complaints == []
    context.close()
