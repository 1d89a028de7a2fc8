"""The engine as a process that may die, hang or be left alone; and a server that is asked for too much."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from serving import Running, server
from tiny_page import PROMPTS, made_folder
from transformers import LlamaConfig, LlamaForCausalLM

from lmworks.export.onnx_folder import export_graphs
from lmworks.runtime.predictor import load
from lmworks.serve.service import describe
from lmworks.serve.supervisor import SILENT, STARVED, Down, Supervisor, wants_processor
from lmworks.tokens.tokenizer import Tokenizer

LONG = {"prompt": "Who", "max_tokens": 900, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writer that needs some seconds for a long text."""
    place = tmp_path_factory.mktemp("slow")
    tokenizer = Tokenizer.from_pretrained(made_folder())
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place / "made")
    tokenizer.save(place / "made")
    export_graphs(place / "made", place / "slow", dtypes=["fp32"])
    return place / "slow"


@pytest.fixture
def one(slow: Path) -> Iterator[Running]:
    """A server of its own for each test: these end engines."""
    with server(slow, settings={"slots": 2}) as running:
        yield running


def test_an_engine_that_is_killed_or_frozen_is_replaced() -> None:
    with server(made_folder()) as one:
        expected = one.post("/generate", {"prompt": "Who", "max_tokens": 9, "stream": False}).json()["text"]
        for number in (signal.SIGKILL, signal.SIGSTOP):
            engine = one.supervisor.process.pid
            assert engine is not None
            os.kill(engine, number)
            assert one.wait(ready=False) < 2
            refused = one.post("/generate", {"prompt": "Who"})
            assert refused.status_code == 503 and refused.headers["retry-after"]
            one.wait(ready=True)
            assert one.supervisor.process.pid != engine and not psutil.pid_exists(engine)
            again = one.post("/generate", {"prompt": "Who", "max_tokens": 9, "stream": False})
            assert again.json()["text"] == expected
        metrics = httpx.get(f"{one.base}/metrics").text
        assert "lmworks_engine_restarts_total 2.0" in metrics


def test_a_pipe_is_closed_when_nobody_writes_to_it() -> None:
    """Closed under the writing thread, its number might be another connection's by then."""
    said: list[str] = []

    class Pipe:
        def __init__(self) -> None:
            self.writing = threading.Event()

        def recv(self) -> None:
            self.writing.wait(5)
            raise EOFError

        def send(self, message: tuple[str]) -> None:
            self.writing.set()
            time.sleep(0.2)
            said.append(message[0])

        def close(self) -> None:
            said.append("closed")

    pipe, outbox, one = Pipe(), queue.SimpleQueue[Any](), object.__new__(Supervisor)
    sender = threading.Thread(target=one.send, args=(pipe, outbox))
    sender.start()
    outbox.put(("written",))
    one.listen(pipe, outbox, sender)
    assert said == ["written", "closed"] and not sender.is_alive()


def test_counts_go_on_where_nobody_looked_between_two_engines() -> None:
    """What an engine did before it was replaced counts, also if the next one has done more by the time one looks."""
    with server(made_folder()) as one:

        def written() -> float:
            time.sleep(0.5)  # the engine tells with its next sign of life
            [line] = [line for line in httpx.get(f"{one.base}/metrics").text.splitlines()
                      if line.startswith("lmworks_generated_tokens_total{")]  # fmt: skip
            return float(line.split()[-1])

        began, asked = written(), 0
        for count in (6, 3, 12):
            for _ in range(count):
                text = one.post("/generate", {"prompt": "Who", "max_tokens": 8, "stream": False}).json()
                asked += len(text["tokens"])
            time.sleep(0.5)
            one.supervisor.process.kill()
            one.wait(ready=False)
            one.wait(ready=True)
        assert written() == began + asked


def test_where_no_engine_can_be_started_it_is_tried_again() -> None:
    """As where no file can be opened any more: who waits is told, and the watch goes on."""

    async def live() -> None:
        supervisor = Supervisor([replace(describe(made_folder()), warm=False)])
        await supervisor.start()
        engine, limits = supervisor.process.pid, resource.getrlimit(resource.RLIMIT_NOFILE)

        async def until(true: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not true():
                    await asyncio.sleep(0.02)

        assert engine is not None
        await until(lambda: supervisor.ready)
        os.kill(engine, signal.SIGSTOP)
        model = supervisor.find(None, ())
        waiting = asyncio.create_task(supervisor.get(model, "tokenize", {"texts": ["Who"]}))
        await until(lambda: bool(supervisor.tickets))
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(Down, match="no engine can be started"):
                async with asyncio.timeout(20):
                    await waiting
            await asyncio.sleep(0.3)
            assert not supervisor.ready and "replaced" in supervisor.problem
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await until(lambda: supervisor.ready)
        assert await supervisor.get(model, "tokenize", {"texts": ["Who"]})
        assert supervisor.process.pid != engine
        await supervisor.close()
        assert not supervisor.process.is_alive()

    asyncio.run(live())


def test_a_request_in_the_engine_that_dies_is_asked_again_and_a_stream_ends_in_an_error(one: Running) -> None:
    lines: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        with httpx.stream("POST", f"{one.base}/v1/completions", json=LONG, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    whole = {**LONG, "stream": False, "max_tokens": 60}
    expected = one.post("/v1/completions", whole).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(stream)
        begun.wait(20)
        asked = pool.submit(one.post, "/v1/completions", whole)
        while len(one.supervisor.tickets) < 2:
            time.sleep(0.005)
        one.supervisor.process.kill()
        assert asked.result().json()["choices"][0]["text"] == expected
        streaming.result()
    last = json.loads([line for line in lines if line][-1][6:])
    assert last["error"]["code"] == "not_ready"
    assert one.supervisor.tickets == {}


def test_an_engine_that_waits_for_a_processor_is_not_taken_for_a_hung_one() -> None:
    """As on a machine that others overload. Stopped, sleeping and gone are what they look like."""
    supervisor = Supervisor([describe(made_folder())])
    spinning, sleeping = (
        subprocess.Popen([sys.executable, "-c", code]) for code in ("while True: pass", "import time; time.sleep(99)")
    )
    try:
        while not wants_processor(spinning.pid) or wants_processor(sleeping.pid):
            time.sleep(0.1)
        for process, silent, alive in (
            (spinning, SILENT + 1, True), (spinning, STARVED + 1, False), (sleeping, SILENT + 1, False),
            (sleeping, 0, True),
        ):  # fmt: skip
            supervisor.process, supervisor.heard = SimpleNamespace(pid=process.pid), time.monotonic() - silent
            assert supervisor.alive is alive
        spinning.send_signal(signal.SIGSTOP)
        while wants_processor(spinning.pid):
            time.sleep(0.01)
    finally:
        for process in (spinning, sleeping):
            process.kill()
            process.wait()
    assert not wants_processor(spinning.pid), "it is gone"


def test_no_engine_outlives_its_server() -> None:
    with server(made_folder()) as one:
        engine = psutil.Process(one.supervisor.process.pid)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_clients_that_go_away_free_their_slots(stream: bool, one: Running) -> None:
    def leave(_: int) -> None:
        body = {**LONG, "stream": stream}
        try:
            with httpx.stream("POST", f"{one.base}/v1/completions", json=body, timeout=1) as answer:
                next(answer.iter_lines())
        except httpx.TransportError:
            pass

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(40)))
    gone = time.monotonic()
    while one.supervisor.tickets:
        assert time.monotonic() - gone < 2, "their requests are still there"
        time.sleep(0.02)
    time.sleep(0.5)  # the engine's next sign of life
    counts = one.supervisor.models["slow"].counts
    assert (counts["active"], counts["waiting"]) == (0, 0)
    assert one.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 3}).status_code == 200


def test_pieces_arrive_while_the_model_writes(one: Running) -> None:
    body = {**LONG, "max_tokens": 200}
    with httpx.stream("POST", f"{one.base}/v1/completions", json=body, timeout=60) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line]
    assert times[-1] - times[0] > 3 * (times[1] - times[0])
    assert len(times) > 20


def test_more_than_may_wait_is_told_to_come_back(slow: Path) -> None:
    with server(slow, settings={"slots": 1}, most=3) as one, ThreadPoolExecutor(12) as pool:
        body = {**LONG, "stream": False, "max_tokens": 60}
        answers = [pool.submit(one.post, "/v1/completions", body) for _ in range(12)]
        asked = time.monotonic()
        assert httpx.get(f"{one.base}/health/live").status_code == 200
        assert time.monotonic() - asked < 1
        found = [answer.result() for answer in answers]
    assert {answer.status_code for answer in found} == {200, 429}
    assert len({answer.text for answer in found if answer.status_code == 200}) >= 1
    assert all(answer.headers["retry-after"] for answer in found if answer.status_code == 429)
    texts = {answer.json()["choices"][0]["text"] for answer in found if answer.status_code == 200}
    assert len(texts) == 1


def test_a_request_that_takes_too_long_ends(slow: Path) -> None:
    with server(slow, seconds=0.5) as one:
        answer = one.post("/v1/completions", {**LONG, "stream": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_long_text_does_not_hold_up_a_short_one(one: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(one.post, "/v1/completions", {**LONG, "stream": False, "max_tokens": 300})
        while not one.supervisor.models["slow"].counts.get("active"):
            time.sleep(0.02)
        assert one.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 3}).status_code == 200
        assert not long.done()
        assert long.result().status_code == 200


def test_many_clients_with_mixed_questions_get_what_each_would_get_alone(served: Running, data_folder: Path) -> None:
    reviews = [line.rsplit("\t", 1)[0] for line in (data_folder / "sst2/dev.tsv").read_text("utf-8").splitlines()[:24]]
    writer = load(made_folder(), runtime="onnx")
    texts = [writer.generate(prompt, max_tokens=12).text for prompt in PROMPTS]
    alone = [served.post("/classify", {"text": text}).json()["answers"][0] for text in reviews]

    def ask(number: int) -> bool:
        text, prompt = reviews[number % 24], PROMPTS[number % 8]
        if number % 3 == 0:
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
            said: str = served.post("/v1/completions", body).json()["choices"][0]["text"]
            return said == texts[number % 8]
        if number % 3 == 1:
            return len(served.post("/embed", {"inputs": text}).json()[0]) == 384
        found, expected = served.post("/classify", {"text": text}).json()["answers"][0], alone[number % 24]
        return found["label"] == expected["label"] and abs(found["score"] - expected["score"]) < 1e-5

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(120)))
