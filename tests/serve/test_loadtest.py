"""`lmworks loadtest` against a stub whose delays are known, and against the real server."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from serving import Running, server
from tiny_page import made_folder

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.serve.app import listen
from lmworks.serve.guard import digest
from lmworks.serve.load_client import Answer, read_url
from lmworks.serve.load_requests import Plan, make_plan
from lmworks.serve.loadtest import COUNT, GROWTH, Load, closed, loadtest, percentiles, summarise

KEY = "a-right-key-of-some-length"
Send = Callable[[Any], Any]


async def say(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Answer with a whole body."""
    given = [(b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def stub(answer: Callable[[int, Send], Any], **options: Any) -> Iterator[str]:
    """Yield the address of a server that lets `answer(number, send)` answer each POST, the first (a trial) as 0."""
    count = 0

    async def app(scope: Any, receive: Any, send: Send) -> None:
        nonlocal count
        await receive()
        if scope["method"] == "GET":
            await say(send, 404, b"{}")
            return
        number, count = count, count + 1
        await answer(number, send)

    listening = listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", **options))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)
        listening.close()


def run(url: str, *, route: str = "/classify", curve: bool = False, **load: Any) -> dict[str, Any]:
    return loadtest(url, load=Load(**load), route=route, curve=curve).values


# -- what is measured ------------------------------------------------------------------------------------------------


def test_percentiles_are_the_nearest_rank() -> None:
    for count in (1, 2, 99, 100, 101, 1000):
        values = np.random.default_rng(count).exponential(size=count).tolist()
        found = percentiles(values)
        assert found is not None
        for p in (50, 90, 95, 99):
            assert found[f"p{p}"] == np.percentile(values, p, method="inverted_cdf")
        assert found["max"] == max(values)
    assert percentiles([]) is None


def test_answers_are_drawn_from_when_the_first_was_due() -> None:
    """The first that ended may have been due later than another."""
    answers = [Answer(due=11.0, ended=11.2, status=200), Answer(due=10.5, ended=12.5, status=200)]
    assert summarise(answers, 2.0)["times"] == [[0.5, 0.2], [0.0, 2.0]]


def test_known_delays_give_known_percentiles() -> None:
    """Held against the stub's own clock: a busy machine makes its delays longer."""
    delays = [0.0, *[0.005] * 90, *[0.08] * 9, 0.25]
    random.Random(0).shuffle(delays)
    took = []

    async def answer(number: int, send: Send) -> None:
        began = time.perf_counter()
        await asyncio.sleep(delays[number])
        took.append(time.perf_counter() - began)
        await say(send, 200, b"{}")

    with stub(answer) as url:
        found = run(url, clients=4, requests=100)
    latency, known = found["latency"], percentiles(took[1:])
    assert known is not None
    for name in ("p50", "p90", "p95", "p99", "max"):
        assert known[name] <= latency[name] < known[name] + 0.5, name
    assert (found["succeeded"], found["failed"], found["statuses"]) == (100, 0, {"200": 100})
    assert found["requests_per_second"] == pytest.approx(100 / found["seconds"])
    assert found["first_token"] is None and found["tokens"] is None


def test_an_open_loop_charges_a_stall_to_everybody_who_would_have_waited() -> None:
    """No coordinated omission: against Lindley's recursion for one server with these arrivals and this one stall."""
    rate, count, service, stall, seed = 100.0, 100, 0.002, 0.4, 3
    server_is_one = asyncio.Lock()

    async def answer(number: int, send: Send) -> None:
        async with server_is_one:
            await asyncio.sleep(stall if number == 21 else service)
        await say(send, 200, b"{}")

    with stub(answer) as url:
        found = run(url, rate=rate, requests=count, seed=seed, clients=1)
    draw, at, free, expected = random.Random(seed), 0.0, 0.0, []
    for number in range(count):
        at += draw.expovariate(rate)
        free = max(free, at) + (stall if number == 20 else service)
        expected.append(free - at)
    waited = np.percentile(expected, 90, method="inverted_cdf")
    assert waited > stall / 3, "many requests were due while the server stood still"
    assert found["latency"]["p90"] >= waited
    assert found["latency"]["max"] >= max(expected)
    assert found["latency"]["p50"] < 20 * stall
    with stub(answer) as url:
        alone = run(url, clients=1, requests=count)
    assert alone["latency"]["p90"] < found["latency"]["p90"], "a closed loop sees one slow answer"


def test_a_rate_is_kept_whatever_the_server_does() -> None:
    async def answer(number: int, send: Send) -> None:
        await asyncio.sleep(0.3)
        await say(send, 200, b"{}")

    with stub(answer) as url:
        found = run(url, rate=200.0, requests=None, duration=1.0, clients=500)
    assert found["mode"] == "open"
    assert 150 <= found["requests"] <= 250
    assert 0.3 <= found["latency"]["p50"] < 1
    with stub(answer) as url, pytest.raises(InputError, match="no request was due"):
        run(url, rate=0.01, requests=None, duration=0.1)


def test_streams_tell_the_first_token_and_the_speed() -> None:
    """Pieces 10 ms apart after 60 ms; the usage at the end counts tokens, which pieces do not."""

    async def answer(number: int, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        texts = [{"choices": [{"text": text}]} for text in ("", "a", "b", "c", "d", "e")]
        ended = {"choices": [{"text": "", "finish_reason": "stop"}] if number == 4 else []}
        for i, event in enumerate([*texts, {**ended, "usage": {"completion_tokens": 11}}]):
            await asyncio.sleep(0.06 if i == 1 else 0.01)
            line = f"data: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": line[:9], "more_body": True})
            await send({"type": "http.response.body", "body": line[9:], "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if number not in (3, 4) else b""})

    with stub(answer) as url:
        found = run(url, route="/v1/completions", clients=1, requests=6)
    assert found["errors"] == {"cut off": 1}
    assert found["tokens"] == 55
    assert found["tokens_per_second"] == pytest.approx(55 / found["seconds"])
    assert 0.06 <= found["first_token"]["p50"] < found["latency"]["p50"]
    assert found["per_token"]["p50"] >= 0.05 / 10


def test_failures_are_counted_by_kind_and_retry_after_is_obeyed() -> None:
    times: list[float] = []

    async def answer(number: int, send: Send) -> None:
        times.append(time.monotonic())
        if number == 1:
            body = b'{"error": {"message": "x", "code": "busy"}}'
            await say(send, 429, body, (b"retry-after", b"1"), (b"content-type", b"application/json"))
        elif number == 2:
            await say(send, 500, b"oh")
        elif number == 3:
            await asyncio.sleep(1.5)
        elif number == 4:
            headers = [(b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            raise RuntimeError
        else:
            await say(send, 200, b"{}")

    with stub(answer) as url:
        found = run(url, clients=1, requests=6, timeout=0.5)
    assert found["errors"] == {"429 busy": 1, "500": 1, "timeout": 1, "cut off": 1}
    assert (found["succeeded"], found["failed"]) == (2, 4)
    assert times[2] - times[1] >= 1


def test_a_connection_that_the_server_closed_between_two_requests_is_made_anew() -> None:
    async def answer(number: int, send: Send) -> None:
        await say(send, 200, b"{}")

    async def work(url: str) -> list[str | None]:
        from lmworks.serve.load_client import Connection

        connection = Connection(read_url(url))
        found = [(await connection.ask("POST", "/x", {})).error]
        await asyncio.sleep(1.5)  # the server hangs up after a second
        found.append((await connection.ask("POST", "/x", {})).error)
        connection.close()
        return found

    with stub(answer, timeout_keep_alive=1) as url:
        assert asyncio.run(work(url)) == [None, None]


@pytest.mark.parametrize("how", [{"clients": 1}, {"rate": 20.0, "clients": 200}])
def test_a_curve_ends_where_the_throughput_does(how: dict[str, Any]) -> None:
    """Four at once and 25 ms each: 160 a second."""
    places = asyncio.Semaphore(4)

    async def answer(number: int, send: Send) -> None:
        async with places:
            await asyncio.sleep(0.025)
        await say(send, 200, b"{}")

    with stub(answer) as url:
        found = run(url, curve=True, requests=None, duration=0.8, **how)
    reached = [step["requests_per_second"] for step in found["curve"]]
    assert 3 <= len(reached) <= 7
    assert reached[-1] < GROWTH * max(reached[:-1])
    assert 1.5 * reached[0] < max(reached) < 165
    assert found["requests_per_second"] == max(reached)
    key = "clients" if found["mode"] == "closed" else "rate"
    assert [step[key] for step in found["curve"]] == [how[key] * 2**i for i in range(len(reached))]


@pytest.mark.parametrize("how", [{"clients": 1}, {"rate": 20.0, "clients": 200}])
def test_a_curve_ends_where_nothing_is_answered(how: dict[str, Any]) -> None:
    async def answer(number: int, send: Send) -> None:
        await say(send, 500 if number else 200, b"{}")

    with stub(answer) as url:
        found = run(url, curve=True, requests=None, duration=0.3, **how)
    assert [step["succeeded"] for step in found["curve"]] == [0]


def test_a_server_that_is_gone_is_not_asked_without_a_pause() -> None:
    async def work() -> int:
        plan = Plan("/classify", None, None, [{"text": "a"}], own=False)
        return len(await closed(read_url("http://127.0.0.1:9"), plan, Load(clients=2, requests=None, duration=0.8)))

    assert asyncio.run(work()) == 4


def test_a_models_name_may_hold_braces() -> None:
    assert COUNT.findall('lmworks_batches_total{model="a}b"} 5.0') == [("lmworks_batches_total", "5.0")]


# -- the real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> Iterator[Running]:
    with server(made_folder(), most=16, keys=[digest(KEY)], ready=False) as one:
        one.wait()
        yield one


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# mine\n{KEY}\n", "utf-8-sig")
    return path


def test_the_command_tells_about_a_writer(
    writer: Running, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["loadtest", writer.base, "--clients", "4", "--requests", "12", "--max-tokens", "8", "--api-key-file",
             str(key_file), "--html", str(page), "--json"]  # fmt: skip
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["route"], found["model"], found["task"]) == ("/generate", made_folder().name, "text-generation")
    assert (found["succeeded"], found["failed"]) == (12, 0)
    assert 12 <= found["tokens"] <= 96
    assert found["first_token"]["p50"] < found["latency"]["p50"]
    assert found["server"]["prompt_tokens"] >= 12
    assert found["server"]["memory_bytes_most"] > 1e7
    assert 0 <= found["server"]["waiting_most"] <= 4
    assert "<svg" in page.read_text() and "first token" in page.read_text()
    assert main([*words[:-1], "--route", "/v1/completions"]) == 0
    shown = capsys.readouterr().out
    assert "requests a second" in shown and "p99" in shown


def test_failures_end_in_exit_code_1_unless_they_are_allowed(
    writer: Running, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["loadtest", writer.base, "--rate", "2000", "--requests", "150", "--max-tokens", "60", "--api-key-file",
             str(key_file), "--json"]  # fmt: skip
    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"].keys() == {"429 busy"}
    assert found["statuses"].keys() == {"200", "429"}
    assert found["server"]["waiting_most"] <= 16
    assert main([*words, "--allow-failed", "1"]) == 0


def test_every_task_is_asked_by_its_own_route(served: Running) -> None:
    for model, route in (("sentiment", "/classify"), ("names", "/ner"), ("minilm", "/embed")):
        found = loadtest(served.base, load=Load(clients=2, requests=4), model=model).values
        assert (found["route"], found["failed"]) == (route, 0)
        assert found["server"]["rows_a_batch"] >= 1
    for route in ("/similarity", "/rerank", "/tokenize", "/predict", "/v1/embeddings"):
        found = loadtest(served.base, load=Load(clients=2, requests=4), route=route).values
        assert found["failed"] == 0, route


def bodies(url: str, data: Path, **how: Any) -> list[dict[str, Any]]:
    wanted = {"route": None, "model": None, "column": None, "max_tokens": 4, **how}
    return asyncio.run(make_plan(read_url(url), data=data, **wanted)).bodies


def test_texts_come_from_files_of_every_kind(served: Running, tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    def texts(path: Path, **how: Any) -> list[Any]:
        return [body["text"] for body in bodies(served.base, path, **how)]

    assert texts(write("a.csv", "text,label\ngood,1\nbad,0\n")) == ["good", "bad"]
    assert texts(write("a.jsonl", '{"text": "good"}\n{"text": "bad"}\n')) == ["good", "bad"]
    assert texts(write("a.txt", "good\n\nbad\n")) == ["good", "bad"]
    assert texts(write("b.csv", "body,n\ngood,1\n"), column="body") == ["good"]
    pairs = bodies(served.base, write("c.csv", "sentence1,sentence2,label\na,b,1\n"))
    assert pairs == [{"text": "a", "pair": "b", "model": "sentiment"}]
    assert texts(write("a.conll", "Ada\tB-person\nsings\tO\n\nNo\tO\n"), model="names") == ["Ada sings", "No"]
    prompts = bodies(served.base, write("p.jsonl", '{"prompt": "Who", "completion": "me"}\n'), route="/generate")
    assert prompts[0]["prompt"] == "Who" and prompts[0]["max_tokens"] == 4
    with pytest.raises(InputError):
        bodies(served.base, tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["http://127.0.0.1:9"], "no server at this address"),
        (["ftp://127.0.0.1"], "no address of a server"),
        (["http://127.0.0.1:99999"], "no address of a server"),
        (["{}", "--clients", "0"], "--clients is out of range"),
        (["{}", "--rate", "-1"], "--rate is out of range"),
        (["{}"], "refuses the key"),
        (["{}", "--api-key-file", "wrong"], "refuses the key"),
        (["{}", "--api-key-file", "none"], "no such file of keys"),
        (["{}", "--api-key-file", "right", "--model", "birds"], "has no such model"),
        (["{}", "--api-key-file", "right", "--route", "/generat"], 'did you mean "/generate"'),
        (["{}", "--api-key-file", "right", "--route", "/classify"], "no model here answers /classify"),
        (["{}", "--api-key-file", "right", "--route", "/v1/chat/completions"], "has no chat template"),
        (["{}", "--api-key-file", "right", "--data", "missing.csv"], "missing.csv"),
    ],
)
def test_a_bad_request_ends_in_one_message(
    words: list[str], message: str, writer: Running, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").write_text("another-key-of-that-length\n")
    files = {"right": str(key_file), "wrong": str(tmp_path / "wrong"), "{}": writer.base}
    assert main(["loadtest", *(files.get(word, word) for word in words), "--requests", "1"]) == 2
    said = capsys.readouterr()
    assert message in " ".join(said.err.split()) and "Traceback" not in said.err
    assert said.out == ""


def test_a_load_test_needs_no_model_libraries() -> None:
    code = (
        "import sys, lmworks.serve.loadtest, lmworks.cli.loadtest\n"
        "print([m for m in ('torch', 'onnxruntime', 'tokenizers', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
