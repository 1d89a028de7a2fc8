"""The server under load, for longer: many clients, more than it can do, told to end in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Running, slack, start
from tiny_page import PROMPTS, made_folder

from lmworks.runtime.predictor import load
from lmworks.serve.loadtest import Load, loadtest

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("LMWORKS_LOAD_SECONDS", "60"))
REQUESTS = int(os.environ.get("LMWORKS_LOAD_REQUESTS", "2000"))


def test_64_clients_with_thousands_of_mixed_requests_are_all_answered_right(
    served: Running, reviews: list[str], classifier: Path, embedder: Path
) -> None:
    writer, labels = load(made_folder(), runtime="onnx"), load(classifier, runtime="onnx")
    texts = [writer.generate(prompt, max_tokens=16).text for prompt in PROMPTS]
    said = [labels(review) for review in reviews]
    vectors = load(embedder, runtime="onnx")(reviews)

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        kind, i = number % 4, number % len(reviews)
        if kind == 0:
            body: dict[str, Any] = {"prompt": PROMPTS[number % 8], "max_tokens": 16, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == texts[number % 8]
        elif kind == 1:
            body = {"prompt": PROMPTS[number % 8], "max_tokens": 16, "temperature": 0}
            async with client.stream("POST", "/generate", json=body) as stream:
                events = [json.loads(line[6:]) async for line in stream.aiter_lines() if line]
            assert events[-1]["text"] == texts[number % 8]
        elif kind == 2:
            one = (await client.post("/classify", json={"text": reviews[i]})).json()["answers"][0]
            assert one["label"] == said[i][0].label
            assert abs(one["score"] - said[i][0].score) < 1e-5
        else:
            found = (await client.post("/embed", json={"inputs": reviews[i]})).json()[0]
            assert abs(vectors[i] - found).max() < 1e-5

    async def main() -> None:
        numbers = iter(range(REQUESTS))  # LMWORKS_LOAD_REQUESTS=20000 is the long one

        async def client_of_its_own() -> None:
            async with httpx.AsyncClient(base_url=served.base, timeout=120) as client:
                for number in numbers:
                    await ask(client, number)

        await asyncio.gather(*(client_of_its_own() for _ in range(64)))

    asyncio.run(main())


def test_200_clients_that_go_away_leave_nothing_behind() -> None:
    process, base = start(str(made_folder()), "--slots", "4")

    client = httpx.Client(timeout=60)

    def counted(name: str) -> float:
        lines = client.get(f"{base}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    async def leave(number: int) -> None:
        body = {"prompt": PROMPTS[number % 8], "max_tokens": 80, "stream": number % 2 == 0}
        host, port = base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body).encode()
        writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(data), data))  # fmt: skip
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.002 * number):
                await reader.readexactly(300)
        writer.close()

    async def crowd() -> None:
        await asyncio.gather(*(leave(number) for number in range(200)))

    try:
        descriptors = psutil.Process(process.pid).num_fds()
        asyncio.run(crowd())
        gone = time.monotonic()
        while counted("lmworks_requests_waiting") or counted("lmworks_slots_used{"):
            assert time.monotonic() - gone < 2.5 * slack(), "slots are free, and the engine's next sign of life says so"
            time.sleep(0.02)
        found = loadtest(base, load=Load(clients=8, requests=16), max_tokens=8).values
        assert (found["succeeded"], found["failed"]) == (16, 0)
        time.sleep(1)
        assert psutil.Process(process.pid).num_fds() <= descriptors + 8
    finally:
        client.close()
        process.kill()
        process.communicate()


WRITE, ASK = {"prompt": "a"}, {"text": "a"}
EXTREMES: list[tuple[str, Any]] = [
    *(("/generate", {**WRITE, "max_tokens": value}) for value in (0, -1, 10**12, 10**400, 1.5, "9", True)),
    *(("/generate", {**WRITE, name: value}) for name, value in (
        ("temperature", 1e308), ("temperature", -1), ("top_p", 0), ("top_k", 2**63), ("seed", 2**70), ("n", 10**6),
        ("repeat_penalty", 0), ("stop", ["a"] * 10_000), ("stop", ["a" * 201]), ("prompt", "a" * 200_001),
        ("model", "a" * 10_000), ("user", "a" * 10_000))),
    *(("/v1/completions", {**WRITE, name: value}) for name, value in (
        ("prompt", [0] * 100_001), ("prompt", [2**31]), ("prompt", []), ("prompt", ["a"] * 65), ("logprobs", 6))),
    ("/v1/completions", {"prompt": ["a"] * 64, "n": 8}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 257}),
    *(("/classify", {"text": value}) for value in ([], ["a"] * 65, "a" * 200_001, {"a": 1}, None, [None], 1e308)),
    *(("/classify", {**ASK, "top_k": value}) for value in (0, 10**9, -1)),
    ("/classify", {"text": ["a", "b"], "pair": ["a"]}),
    *((path, body) for path in ("/classify", "/generate", "/models/sentiment") for body in (
        b'{"text": ' + b"[" * 499_000, b'{"a":' * 190_000, b"[" * 499_000 + b"]" * 499_000, b'{"text": NaN}',
        b'{"text": 1e999}', b'{"text": "\xff\xfe"}', b"", b"null", b"9" * 900_000,
        b'{"top_k": ' + b"9" * 900_000 + b', "text": "a"}', b" " * 1_000_001, b'{"text":"' + b"a" * 2_000_000 + b'"}')),
]  # fmt: skip


def test_extreme_values_are_refused_within_a_tenth_of_a_second(classifier: Path) -> None:
    """Counted in processor time of the server and its engine: how long a busy machine lets them wait is not theirs."""
    process, base = start(str(classifier), str(made_folder()))
    own = psutil.Process(process.pid)
    both = [own, *own.children()]

    def used() -> float:
        return sum(one.cpu_times().user + one.cpu_times().system for one in both)

    try:
        with httpx.Client(base_url=base, timeout=60) as client:
            for path, body in EXTREMES:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                before, began = used(), time.monotonic()
                try:
                    status = client.post(
                        path, content=content, headers={"Content-Type": "application/json"}
                    ).status_code
                except httpx.TransportError:
                    status = 413  # hung up on in the middle of a large body
                spent = min(used() - before, time.monotonic() - began)
                assert 400 <= status < 500, (path, content[:60])
                assert spent < 0.1, (path, content[:60], spent)
        host, port = base.removeprefix("http://").split(":")
        for length in (b"Content-Length: 100000000", b"Transfer-Encoding: chunked"):
            with socket.create_connection((host, int(port)), timeout=10) as wire:
                before = used()
                wire.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + length
                             + b"\r\n\r\n")  # fmt: skip
                with suppress(OSError):
                    for _ in range(100):
                        wire.sendall((b"F4240\r\n" if b"chunked" in length else b"") + b" " * 1_000_000 + b"\r\n")
                with suppress(ConnectionResetError):
                    assert wire.recv(100).startswith(b"HTTP/1.1 413")
                assert used() - before < 0.1
        assert httpx.post(f"{base}/classify", json=ASK, timeout=30).status_code == 200
    finally:
        process.kill()
        process.communicate()


STATES: dict[str, tuple[float, Callable[[int], tuple[str, dict[str, Any]]] | None]] = {
    "loading": (0.0, None),
    "idle": (0.5, None),
    "one text": (0.05, lambda _: ("/v1/completions", {"prompt": "Who", "max_tokens": 80, "temperature": 0})),
    "a stream": (0.05, lambda _: ("/generate", {"prompt": "Who", "max_tokens": 80})),
    "many texts": (0.2, lambda i: ("/v1/completions", {"prompt": PROMPTS[i % 8], "max_tokens": 60, "n": 4})),
    "many streams": (0.2, lambda i: ("/generate", {"prompt": PROMPTS[i % 8], "max_tokens": 60})),
    "one batch": (0.02, lambda _: ("/classify", {"text": ["a fine film"] * 8})),
    "many batches": (0.2, lambda i: ("/classify", {"text": [f"film {i}"] * 8})),
    "all at once": (0.0, lambda i: ("/classify", {"text": f"film {i}"})),
    "mixed": (0.1, lambda i: ("/classify", {"text": "a"}) if i % 2 else ("/generate", {"prompt": "Who"})),
}


@pytest.mark.parametrize("state", STATES)
def test_told_to_end_it_answers_what_was_asked(state: str, classifier: Path) -> None:
    delay, make = STATES[state]
    process, base = start(str(classifier), str(made_folder()), ready=state != "loading")
    try:
        engines = psutil.Process(process.pid).children()
        count = 1 if state.startswith(("one", "a ")) else 24

        async def main() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=base, timeout=60, limits=httpx.Limits(max_connections=64)) as client:
                asked = [] if make is None else [
                    asyncio.create_task(client.post(make(i)[0], json=make(i)[1])) for i in range(count)
                ]  # fmt: skip
                await asyncio.sleep(max(delay, 0.15) if asked else delay)  # until they are connected
                process.send_signal(signal.SIGTERM)
                return list(await asyncio.gather(*asked))

        for answer in asyncio.run(main()):
            assert answer.status_code == 200
            if answer.headers["content-type"].startswith("text/event-stream"):
                assert '"done": true' in answer.text.strip().splitlines()[-1]
        assert process.wait(35) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert psutil.wait_procs(engines, timeout=10)[1] == [], "no engine outlives its server"
    finally:
        process.kill()
        process.communicate()


def test_memory_descriptors_and_threads_stay_flat(served: Running, reviews: list[str]) -> None:
    """A short soak; LMWORKS_LOAD_SECONDS=600 is the long one."""
    server_process, engine = psutil.Process(), psutil.Process(served.supervisor.process.pid)

    async def work(seconds: float) -> int:
        count, end = 0, time.monotonic() + seconds

        async def client_of_its_own(number: int) -> None:
            nonlocal count
            async with httpx.AsyncClient(base_url=served.base, timeout=60) as client:
                while time.monotonic() < end:
                    review = reviews[(count + number) % len(reviews)]
                    assert (await client.post("/classify", json={"text": review})).status_code == 200
                    body = {"prompt": review[:20], "max_tokens": 8}
                    assert (await client.post("/v1/completions", json=body)).status_code == 200
                    count += 2

        await asyncio.gather(*(client_of_its_own(number) for number in range(8)))
        return count

    def held() -> tuple[int, int, int]:
        fds, threads = engine.num_fds() + server_process.num_fds(), engine.num_threads() + server_process.num_threads()
        return engine.memory_info().rss, fds, threads

    asyncio.run(work(SECONDS / 3))  # warm
    before = held()
    assert asyncio.run(work(SECONDS)) > 100
    time.sleep(1)
    after = held()
    assert after[0] - before[0] < 30e6
    assert after[1] <= before[1] + 8
    assert after[2] <= before[2] + 4
