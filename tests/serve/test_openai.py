"""OpenAI's interface as OpenAI's own client reads it: completions, chat, embeddings, streams, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serving import Running, server
from tiny_page import CONTEXT, PROMPTS, copy_folder, made_folder

from lmworks.runtime.predictor import Predictor, load
from lmworks.serve.guard import MOST_BYTES
from lmworks.tokens.chat import render_chat

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}The{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = copy_folder(tmp_path_factory.mktemp("chat") / "chatty")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def one(chatty: Path, embedder: Path) -> Iterator[Running]:
    """A server of a writer and of vectors."""
    with server(chatty, embedder) as running:
        yield running


@pytest.fixture
def base(one: Running) -> str:
    """Its address."""
    return one.base


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """The same model, called directly."""
    return load(made_folder(), runtime="onnx")


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(base: str, **body: object) -> httpx.Response:
    """POST a body as JSON."""
    return httpx.post(f"{base}/v1/completions", json=body, timeout=30)


# -- completions -----------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_model_writes(client: openai.OpenAI, predictor: Predictor) -> None:
    made = client.completions.create(model="chatty", prompt=PROMPTS[0], max_tokens=20, temperature=0)
    expected = predictor.generate(PROMPTS[0], max_tokens=20)
    assert made.object == "text_completion"
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(predictor.tokenizer.encode(PROMPTS[0]))
    assert made.usage.completion_tokens == 20
    assert made.usage.total_tokens == made.usage.prompt_tokens + 20
    assert made.model == "chatty"


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI, predictor: Predictor) -> None:
    stream = client.completions.create(
        model="chatty",
        prompt=PROMPTS[2],
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == predictor.generate(PROMPTS[2], max_tokens=30).text
    assert len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_is_server_sent_events_that_end_in_done(base: str) -> None:
    body = {"prompt": "Who", "max_tokens": 3, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{base}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert json.loads(line[6:])["object"] == "text_completion"


def test_several_prompts_stop_strings_seeds_and_our_own_settings(client: openai.OpenAI, predictor: Predictor) -> None:
    made = client.completions.create(model="chatty", prompt=list(PROMPTS[:3]), max_tokens=8, temperature=0)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [choice.text for choice in made.choices] == [predictor.generate(p, max_tokens=8).text for p in PROMPTS[:3]]
    chunks = list(
        client.completions.create(model="chatty", prompt=list(PROMPTS[:2]), max_tokens=8, temperature=0, stream=True)
    )
    for index in (0, 1):
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index)
        assert text == made.choices[index].text

    stopped = client.completions.create(
        model="chatty", prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=["river", "."]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "river" not in stopped.choices[0].text and "." not in stopped.choices[0].text

    texts = [
        client.completions.create(model="chatty", prompt="Who", max_tokens=30, temperature=1.5, top_p=0.95, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text != texts[2].choices[0].text
    one = client.completions.create(
        model="chatty", prompt="Who", max_tokens=9, temperature=1.5, extra_body={"top_k": 1}
    )
    assert one.choices[0].text == predictor.generate("Who", max_tokens=9).text


def test_many_clients_at_once_get_what_each_would_get_alone(base: str, predictor: Predictor) -> None:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: ask(base, prompt=p, max_tokens=12, temperature=0).json(), prompts))
    assert [a["choices"][0]["text"] for a in answers] == [predictor.generate(p, max_tokens=12).text for p in prompts]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a" * 300_000}, "prompt"),
        ({"prompt": "The small bird " * 100}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.5}, "top_p"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "stop": ["x"] * 5}, "stop"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": ["a"] * 60, "n": 8}, "n"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt": None}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_value_is_refused_by_name(body: dict[str, object], param: str, base: str) -> None:
    for stream in (False, True):
        answer = ask(base, **{"stream": stream, **body})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert error["message"]


def test_neutral_values_of_what_is_not_supported_are_accepted(base: str) -> None:
    body = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "user": "me", "stop": None, "best_of": 1}
    assert ask(base, prompt="a", max_tokens=1, **body).status_code == 200


def test_null_is_the_default_and_what_asks_for_nothing_is_taken(client: openai.OpenAI, base: str) -> None:
    nothing = {"stream": None, "max_tokens": None, "logprobs": None, "top_p": None, "seed": None, "stop": None}
    assert ask(base, prompt="a", logit_bias={}, suffix="", **nothing).json()["usage"]["completion_tokens"] <= 16
    turns: list[Any] = [{"role": "user", "content": "Who?"}]
    settings: Any = {"model": "chatty", "max_completion_tokens": 2}
    said = client.chat.completions.create(messages=turns, **settings, logprobs=None, tools=[]).choices[0].message
    for back in (said, said.model_dump()):
        assert client.chat.completions.create(messages=[*turns, back, *turns], **settings).usage
    with pytest.raises(openai.BadRequestError, match="tool_calls is not supported"):
        turns.append({**said.model_dump(), "tool_calls": [{"id": "1"}]})
        client.chat.completions.create(messages=turns, **settings)


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("embeddings", {"input": []}, "at least 1 item"),
        ("embeddings", {"input": ["a"] * 2049}, "at most 2048 items"),
        ("embeddings", {"input": "a", "dimensions": 100}, "384 dimensions"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "hue": 1}]}, "unknown parameter: hue"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "needs logprobs"),
    ],
)
def test_what_is_wrong_is_said(path: str, body: dict[str, Any], said: str, base: str) -> None:
    """Not that a list is no text, where a list may stand too."""
    answer = httpx.post(f"{base}/v1/{path}", json=body)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text


def test_the_openai_client_raises_its_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="chatty", prompt="The small bird " * 100)
    assert caught.value.param == "prompt"
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b" " * (MOST_BYTES + 1), "application/json", 413),
    ],
    ids=["cut", "array", "bytes", "deep", "text", "large"],
)
def test_a_bad_body_is_refused(content: bytes, kind: str, status: int, base: str) -> None:
    answer = httpx.post(f"{base}/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_is_bounded_too(base: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * (MOST_BYTES // 10)

    try:
        status = httpx.post(
            f"{base}/v1/completions", content=parts(), headers={"Content-Type": "application/json"}
        ).status_code
    except httpx.TransportError:
        status = 413  # the server hung up before the end
    assert status == 413


def test_unknown_addresses_and_methods_are_errors_in_the_same_shape(base: str) -> None:
    for method, path, status, allowed in (
        ("GET", "/v1/nothing", 404, None), ("POST", "/v1/responses", 404, None),
        ("POST", "/v1/completions/", 404, None), ("GET", "/v1/completions", 405, "POST"),
        ("PUT", "/classify", 405, "POST"), ("POST", "/metrics", 405, "GET, HEAD"), ("DELETE", "/", 405, "GET, HEAD"),
        ("OPTIONS", "/classify", 405, "POST"), ("POST", "/sw.js", 405, "GET, HEAD"),
    ):  # fmt: skip
        answer = httpx.request(method, base + path)
        assert (answer.status_code, answer.headers.get("allow")) == (status, allowed), (method, path)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_head_is_get_without_the_body(base: str) -> None:
    for path in ("/metrics", "/info", "/drift", "/v1/models", "/v1/models/minilm", "/v2/models/minilm", "/playground/",
                 "/predict/a", "/sw.js", "/nothing"):  # fmt: skip
        head, get = httpx.head(base + path), httpx.get(base + path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"], path


# -- more of completions ---------------------------------------------------------------------------------------------


def test_token_ids_are_a_prompt(client: openai.OpenAI, predictor: Predictor) -> None:
    ids = predictor.tokenizer.encode_prompt(PROMPTS[0])
    for prompt in (ids, [ids, ids]):
        made = client.completions.create(model="chatty", prompt=prompt, max_tokens=9, temperature=0)
        expected = predictor.generate(PROMPTS[0], max_tokens=9).text
        assert {choice.text for choice in made.choices} == {expected}


def test_choices_of_one_prompt_have_seeds_of_their_own(client: openai.OpenAI, predictor: Predictor) -> None:
    settings = {"max_tokens": 20, "temperature": 1.3}
    made = client.completions.create(model="chatty", prompt="Who", n=3, seed=5, **settings)  # type: ignore[call-overload]
    alone = [predictor.generate("Who", seed=5 + i, **settings).text for i in range(3)]  # type: ignore[typeddict-item]
    assert [choice.text for choice in made.choices] == alone
    assert made.usage.prompt_tokens == len(predictor.tokenizer.encode_prompt("Who"))
    assert made.usage.completion_tokens <= 60


def test_log_probabilities_are_those_of_the_models_logits(client: openai.OpenAI, predictor: Predictor) -> None:
    made = client.completions.create(model="chatty", prompt="Who", max_tokens=6, temperature=0, logprobs=3)
    noted = made.choices[0].logprobs
    assert noted is not None and noted.token_logprobs is not None and noted.top_logprobs is not None
    ids = predictor.tokenizer.encode_prompt("Who") + predictor.generate("Who", max_tokens=6).tokens
    row = np.array([ids])
    logits = predictor.runtime.run({"input_ids": row, "attention_mask": np.ones_like(row)})["logits"][0].astype(float)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    start = len(ids) - 6
    expected = [logs[start + i - 1, ids[start + i]] for i in range(6)]
    assert noted.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert noted.tokens == [predictor.tokenizer.decode([i]) for i in ids[start:]]
    assert all(max(top.values()) == pytest.approx(p, abs=1e-9) for top, p in
               zip(noted.top_logprobs, noted.token_logprobs, strict=True))  # fmt: skip


def test_a_drawn_token_is_among_the_likeliest_that_are_told(client: openai.OpenAI) -> None:
    settings: Any = {"model": "chatty", "max_tokens": 30, "temperature": 2.0, "seed": 3}
    for count in (0, 2):
        noted = client.completions.create(prompt="Who", logprobs=count, **settings).choices[0].logprobs
        assert noted is not None and noted.tokens and noted.token_logprobs and noted.top_logprobs
        for token, its, top in zip(noted.tokens, noted.token_logprobs, noted.top_logprobs, strict=True):
            assert top[token] == its and len(top) in (count, count + 1)
    turns: Any = [{"role": "user", "content": "Who"}]
    chat = client.chat.completions.create(messages=turns, logprobs=True, top_logprobs=20, **settings).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content
    assert {len(one.top_logprobs) for one in chat.logprobs.content} == {20}


def test_tokens_that_hold_a_part_of_a_character_are_told_by_their_bytes(client: openai.OpenAI) -> None:
    """The bytes of all tokens together are the text; alternatives that would look alike stay apart."""
    settings: Any = {"model": "chatty", "max_tokens": 40, "temperature": 2.0, "seed": 3}
    made = client.completions.create(prompt="Who", logprobs=5, **settings).choices[0]
    assert made.logprobs is not None and made.logprobs.tokens is not None
    parts = [token for token in made.logprobs.tokens if token.startswith("bytes:")]
    assert parts and {len(top) for top in made.logprobs.top_logprobs or ()} <= {5, 6}
    for token, start in zip(made.logprobs.tokens, made.logprobs.text_offset or (), strict=True):
        assert token.startswith("bytes:") or made.text[start:].startswith(token)
    turns: Any = [{"role": "user", "content": "Who"}]
    chat = client.chat.completions.create(messages=turns, logprobs=True, **settings).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    spelled = b"".join(bytes(token.bytes or ()) for token in chat.logprobs.content)
    assert spelled.decode(errors="replace") == chat.message.content


def test_each_part_of_a_stream_brings_the_probabilities_of_its_own_tokens(client: openai.OpenAI) -> None:
    settings = {"model": "chatty", "max_tokens": 20, "temperature": 1.5, "seed": 4}
    asked = {"prompt": [PROMPTS[0], PROMPTS[2]], "logprobs": 2, **settings}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    parts = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]  # type: ignore[call-overload]
    assert all(part.logprobs is not None for part in parts if part.text)
    assert sum(part.logprobs is not None for part in parts) > 20
    for index, choice in enumerate(whole.choices):
        own = [part.logprobs for part in parts if part.index == index and part.logprobs is not None]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for one in own for item in getattr(one, name)] == getattr(choice.logprobs, name)
    turns = {"messages": [{"role": "user", "content": "Who?"}], "logprobs": True, "top_logprobs": 2, **settings}
    answer = client.chat.completions.create(**turns)  # type: ignore[call-overload]
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**turns, stream=True)]  # type: ignore[call-overload]
    assert all(part.logprobs is not None for part in deltas if part.delta.content)
    told = [one for part in deltas if part.logprobs is not None for one in part.logprobs.content]
    assert told == answer.choices[0].logprobs.content


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_answer_follows_the_models_template(client: openai.OpenAI, predictor: Predictor) -> None:
    turns = [{"role": "system", "content": "Birds."}, {"role": "user", "content": "Who?"}]
    prompt = render_chat(TEMPLATE, turns)
    expected = predictor.generate(predictor_ids(predictor, prompt), max_tokens=12).text  # type: ignore[arg-type]
    settings = {"model": "chatty", "messages": turns, "temperature": 0, "max_tokens": 12}
    made = client.chat.completions.create(**settings)  # type: ignore[call-overload]
    assert made.choices[0].message.content == expected
    assert made.choices[0].message.role == "assistant"
    assert made.usage.prompt_tokens == len(predictor.tokenizer.encode(prompt))
    chunks = list(client.chat.completions.create(**settings, stream=True))  # type: ignore[call-overload]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    noted = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
    content = noted.choices[0].logprobs.content
    assert "".join(one.token for one in content) == expected
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in content)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]}]
    again = client.chat.completions.create(model="chatty", messages=[turns[0], *parts], temperature=0, max_tokens=12)  # type: ignore[arg-type]
    assert again.choices[0].message.content == expected


def predictor_ids(predictor: Predictor, prompt: str) -> list[int]:
    """A rendered template has its special tokens already."""
    return predictor.tokenizer.encode(prompt)


def test_a_conversation_that_goes_on_reads_only_what_is_new(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "The small bird sees the river. " * 3}]
    settings = {"model": "chatty", "temperature": 0, "max_tokens": 6}
    first = client.chat.completions.create(messages=turns, **settings)  # type: ignore[call-overload]
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Who?"}]
    second = client.chat.completions.create(messages=turns, **settings)  # type: ignore[call-overload]
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert second.usage.prompt_tokens > second.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://a/b"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}, "chat_template"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_conversation_is_refused_by_name(body: dict[str, object], param: str, one: Running) -> None:
    answer = one.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_model_without_a_template_says_so() -> None:
    with server(made_folder()) as plain:
        answer = plain.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"


# -- vectors and models ----------------------------------------------------------------------------------------------


def test_vectors_are_those_of_sentence_transformers_recipe(client: openai.OpenAI, embedder: Path) -> None:
    texts = ["a cat sat", "tax law", "ein Hund"]
    expected = np.stack(load(embedder)(texts))
    made = client.embeddings.create(model="minilm", input=texts)  # the client asks for base64
    assert np.abs(np.array([row.embedding for row in made.data]) - expected).max() < 1e-5
    plain = client.embeddings.create(model="minilm", input="a cat sat", encoding_format="float")
    assert np.abs(np.array(plain.data[0].embedding) - expected[0]).max() < 1e-5
    assert plain.usage.prompt_tokens == 5


def test_models_are_listed_by_their_folders_names(client: openai.OpenAI, one: Running) -> None:
    assert [model.id for model in client.models.list()] == ["chatty", "minilm"]
    assert client.models.retrieve("minilm").owned_by == "lmworks"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    wrong = one.post("/v1/completions", {"prompt": "a", "model": "minilm"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
