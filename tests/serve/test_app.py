"""The server, through real sockets: the page's files, completions as the openai package reads them, errors, health."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from serving import running
from tiny_page import CONTEXT, PROMPTS, copy_folder, made_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.predictor import Predictor, load
from lmworks.serve.app import MOST_BYTES, listen, make_app, serve


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """The server over the tiny model."""
    with running(made_folder()) as address:
        yield address


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
    made = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=20, temperature=0)
    expected = predictor.generate(PROMPTS[0], max_tokens=20)
    assert made.object == "text_completion"
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(predictor.tokenizer.encode(PROMPTS[0]))
    assert made.usage.completion_tokens == 20
    assert made.usage.total_tokens == made.usage.prompt_tokens + 20
    assert made.model == made_folder().name


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI, predictor: Predictor) -> None:
    stream = client.completions.create(
        model="tiny",
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
    made = client.completions.create(model="m", prompt=list(PROMPTS[:3]), max_tokens=8, temperature=0)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [choice.text for choice in made.choices] == [predictor.generate(p, max_tokens=8).text for p in PROMPTS[:3]]
    chunks = list(
        client.completions.create(model="m", prompt=list(PROMPTS[:2]), max_tokens=8, temperature=0, stream=True)
    )
    for index in (0, 1):
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index)
        assert text == made.choices[index].text

    stopped = client.completions.create(model="m", prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=["river", "."])
    assert stopped.choices[0].finish_reason == "stop"
    assert "river" not in stopped.choices[0].text and "." not in stopped.choices[0].text

    texts = [
        client.completions.create(model="m", prompt="Who", max_tokens=30, temperature=1.5, top_p=0.95, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text != texts[2].choices[0].text
    one = client.completions.create(model="m", prompt="Who", max_tokens=9, temperature=1.5, extra_body={"top_k": 1})
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
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
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
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "logprobs": 3}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "colour": "red"}, "colour"),
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


def test_the_openai_client_raises_its_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="m", prompt="The small bird " * 100)
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
    for method, path, status in (("GET", "/v1/nothing", 404), ("POST", "/v1/nothing", 405), ("DELETE", "/", 405)):
        answer = httpx.request(method, base + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


# -- the line --------------------------------------------------------------------------------------------------------


class SlowRuntime(OnnxRuntime):
    """The model at a tenth of a second a token; counts its steps, and may wait before it starts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.steps = 0
        self.gate = threading.Event()

    def prefill(self, slots, input_ids):
        self.gate.wait(20)
        return super().prefill(slots, input_ids)

    def step(self, slots, input_ids):
        self.steps += 1
        time.sleep(0.1)
        return super().step(slots, input_ids)


def test_ready_only_once_the_model_has_answered() -> None:
    runtime = SlowRuntime(made_folder())
    with running(made_folder(), runtime, ready=False) as base:
        assert httpx.get(f"{base}/health/live").status_code == 200
        assert httpx.get(f"{base}/health/ready").status_code == 503
        refused = ask(base, prompt="a")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert httpx.get(base).status_code == 200, "the page needs no server-side model"
        runtime.gate.set()
        for _ in range(100):
            if httpx.get(f"{base}/health/ready").status_code == 200:
                break
            time.sleep(0.05)
        assert httpx.get(f"{base}/health/ready").json() == {"status": "ready"}
        assert ask(base, prompt="a", max_tokens=1).status_code == 200


def test_a_model_that_cannot_be_loaded_is_never_ready(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    (folder / "onnx" / "model.onnx").write_bytes(b"nothing")
    with running(folder, ready=False) as base:
        for _ in range(100):
            reason = httpx.get(f"{base}/health/ready").json()["reason"]
            if "loading" not in reason:
                break
            time.sleep(0.05)
        assert "cannot be used" in reason
        assert httpx.get(f"{base}/health/ready").status_code == 503


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_the_model(stream: bool) -> None:
    runtime = SlowRuntime(made_folder())
    runtime.gate.set()
    with running(made_folder(), runtime) as base:
        body = {"prompt": "The small bird ", "max_tokens": 80, "temperature": 0, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{base}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{base}/v1/completions", json=body, timeout=1)
        started = time.monotonic()
        assert ask(base, prompt="a", max_tokens=1).status_code == 200
        assert time.monotonic() - started < 4, "80 tokens would take 8 seconds"
        assert runtime.steps < 50


def test_pieces_arrive_while_the_model_writes() -> None:
    runtime = SlowRuntime(made_folder())
    runtime.gate.set()
    with running(made_folder(), runtime) as base:
        body = {"prompt": "The small bird ", "max_tokens": 12, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{base}/v1/completions", json=body) as answer:
            times = [time.monotonic() for line in answer.iter_lines() if line]
    assert times[-1] - times[0] > 0.5


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_page_comes_with_what_threads_need(base: str) -> None:
    """C17: threads in WebAssembly need COOP and COEP, on the page and on every script."""
    page = json.loads((made_folder() / "web/page.json").read_text())
    kinds = {
        ".wasm": "application/wasm",
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".json": "application/json",
    }
    for name in ["", "index.html", "sw.js", "web/app.js", "web/worker.js", *page["files"]]:
        answer = httpx.get(f"{base}/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].startswith(kinds.get(Path(name).suffix, "")), name
        assert answer.content == (made_folder() / (name or "index.html")).read_bytes()


def test_caches_ask_again_unless_the_address_has_the_hash(base: str) -> None:
    first = httpx.get(f"{base}/web/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = httpx.get(f"{base}/web/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "immutable" in httpx.get(f"{base}/web/app.js?v=1").headers["cache-control"]
    head = httpx.head(f"{base}/onnx/model.onnx")
    assert int(head.headers["content-length"]) == (made_folder() / "onnx/model.onnx").stat().st_size
    part = httpx.get(f"{base}/onnx/model.onnx", headers={"Range": "bytes=0-9"})
    assert (part.status_code, len(part.content)) == (206, 10)


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/web/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/%2e%2e%2fsecret.txt",
        "/web/%2e%2e/%2e%2e/secret.txt",
        "/..%5csecret.txt",
        "//secret.txt",
        "/training/metrics.jsonl",
        "/%74raining/metrics.jsonl",
        "/web/../training/metrics.jsonl",
        "/training/",
        "/web/",
        "/web",
        "/onnx",
        "/.hidden",
        "/link.txt",
        "/web/page.json%00.txt",
        "/web/page.json%00",
    ],
)
def test_nothing_outside_the_page_is_served(path: str, guarded: str) -> None:
    """Raw requests: a client library would tidy the path first."""
    connection = http.client.HTTPConnection(urlsplit(guarded).netloc, timeout=10)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == 404
    assert error["message"].startswith("there is no file")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with secrets beside, inside and linked from its folder."""
    place = tmp_path_factory.mktemp("escape")
    folder = copy_folder(place / "model")
    (place / "secret.txt").write_text("secret")
    (folder / ".hidden").write_text("secret")
    (folder / "link.txt").symlink_to(place / "secret.txt")
    with running(folder, ready=False) as address:
        yield address


# -- starting --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_an_input_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            serve(made_folder(), port=port)
    assert "--port" in caught.value.fix
    with pytest.raises(InputError, match="port"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(InputError, match="address"):
        listen("no.such.host.invalid", 0)


def test_a_folder_that_cannot_be_served_is_said_before_listening(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        serve(tmp_path / "nothing")
    with pytest.raises(InputError, match="no such model folder"):
        make_app(tmp_path / "nothing")
    with pytest.raises((InputError, FormatError)):
        serve(tmp_path)


def test_it_serves_without_torch_and_ends_on_ctrl_c() -> None:
    """C38: a server of an exported model installs no torch."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from lmworks.serve.app import serve
serve({str(made_folder())!r}, port=0)
assert "torch" not in sys.modules
sys.stderr.write("ended\\n")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "http://127.0.0.1:" in line, line
        base = line.split(" at ")[1].split("/ ")[0].rstrip("/")
        for _ in range(200):
            try:
                if httpx.get(f"{base}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        assert ask(base, prompt="Who", max_tokens=2).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert process.stderr.read() == "ended\n", "no traceback"
    finally:
        process.kill()
        process.communicate()
