"""The server under load, for longer: many clients, more than it can do, told to end in the middle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Running, server, start
from tiny_page import PROMPTS, made_folder

from lmworks.runtime.predictor import load

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("LMWORKS_LOAD_SECONDS", "60"))


@pytest.fixture(scope="module")
def reviews(data_folder: Path) -> list[str]:
    lines = (data_folder / "sst2" / "dev.tsv").read_text("utf-8").splitlines()
    return [line.rsplit("\t", 1)[0] for line in lines[:200]]


def test_64_clients_and_2000_mixed_requests_are_all_answered_right(
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
        numbers = iter(range(2000))

        async def client_of_its_own() -> None:
            async with httpx.AsyncClient(base_url=served.base, timeout=120) as client:
                for number in numbers:
                    await ask(client, number)

        await asyncio.gather(*(client_of_its_own() for _ in range(64)))

    asyncio.run(main())


def test_four_times_too_much_is_turned_away_in_order(classifier: Path, reviews: list[str]) -> None:
    with server(classifier, most=32) as one:
        statuses: Counter[int] = Counter()
        probes: list[float] = []
        longest = 0

        async def client_of_its_own(end: float) -> None:
            async with httpx.AsyncClient(base_url=one.base, timeout=60) as client:
                while time.monotonic() < end:
                    answer = await client.post("/classify", json={"text": reviews[:8]})
                    statuses[answer.status_code] += 1
                    if answer.status_code != 200:
                        assert answer.headers["retry-after"]
                        await asyncio.sleep(0.05)

        async def probe(end: float) -> None:
            nonlocal longest
            async with httpx.AsyncClient(base_url=one.base, timeout=60) as client:
                while time.monotonic() < end:
                    started = time.monotonic()
                    assert (await client.get("/health/live")).status_code == 200
                    probes.append(time.monotonic() - started)
                    longest = max(longest, len(one.supervisor.tickets))
                    await asyncio.sleep(0.1)

        async def main() -> None:
            end = time.monotonic() + SECONDS
            await asyncio.gather(probe(end), *(client_of_its_own(end) for _ in range(128)))

        asyncio.run(main())
        assert set(statuses) <= {200, 429, 503}
        assert statuses[200] and statuses[429]
        assert longest <= 32
        assert sorted(probes)[len(probes) * 99 // 100] < 0.5, "clients, server and engine share two cores here"
        started = time.monotonic()
        assert one.post("/classify", {"text": "a fine film"}).status_code == 200
        assert time.monotonic() - started < 5


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
