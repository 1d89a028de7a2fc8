"""How much a server takes: requests of real texts, and how long each waited.

    closed loop   so many clients, each asks again when it has its answer (and when it may, after a Retry-After)
    open loop     requests arrive at a rate, as by independent people (a Poisson process), whatever the server does
    curve         either, with twice the clients or the rate each time, until the throughput no longer grows

In the open loop a latency counts from the moment the request was due, not from when it could be sent: a server that
stalls is charged for everybody who would have waited (no coordinated omission; Tene, "How not to measure latency").
Percentiles are of the answers that succeeded, nearest rank: the smallest that so many are no slower than.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.report import Report
from lmworks.serve.load_client import Answer, Connection, Target, read_url
from lmworks.serve.load_report import make_report
from lmworks.serve.load_requests import Plan, make_plan

CLIENTS, REQUESTS = 8, 200
MOST_CLIENTS, MOST_OPEN = 1024, 1000  # of a curve; connections of an open loop
GROWTH = 1.05  # a step of a curve that brings less is its last
LONGEST_WAIT = 5.0  # seconds of a Retry-After that a client obeys
GONE = ("connection refused", "connection lost")
PAUSE = 0.5  # seconds after which a client looks for a server that is gone
LOOK = 0.5  # seconds between two looks at the server's own counts
DRAWN = 400  # dots of a chart
PERCENTILES = (50, 90, 95, 99)
COUNT = re.compile(r"^(lmworks_\w+)(?:\{.*\})? ([-+.eE\d]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is asked."""

    clients: int = CLIENTS
    requests: int | None = REQUESTS
    rate: float | None = None  # requests a second; None: a closed loop
    duration: float | None = None  # seconds
    timeout: float = 120.0  # seconds that an answer may take
    seed: int = 0  # of the arrivals


@dataclass
class Watch:
    """What the server told of itself meanwhile: how many requests waited at each look, and its counts."""

    waiting: list[float] = field(default_factory=list)
    memory: float = 0.0  # bytes of all its processes, at most
    first: dict[str, float] | None = None
    last: dict[str, float] | None = None


def loadtest(
    url: str,
    *,
    load: Load,
    curve: bool = False,
    route: str | None = None,
    model: str | None = None,
    data: Path | None = None,
    column: str | None = None,
    max_tokens: int = 64,
    key: str | None = None,
) -> Report:
    """Load a server and tell how it did; the route and the model are found through GET /info where they are not given.

    Raises InputError where there is no such server, route, model or data, for a wrong key, and where nothing was asked.
    """
    target = read_url(url, key)

    async def work() -> Report:
        plan = await make_plan(target, route=route, model=model, data=data, column=column, max_tokens=max_tokens)
        steps = await climb(target, plan, load) if curve else [await measure(target, plan, load)]
        if not steps[0]["requests"]:
            raise InputError("no request was due in this time", found=f"--rate {load.rate}, --duration {load.duration}",
                             fix="give a longer --duration, or a higher --rate")  # fmt: skip
        return make_report(target.url, plan, steps, curve=curve)

    return asyncio.run(work())


def read_key(path: Path | None) -> str | None:
    """Return the first key of a file, as the server reads it. Raises InputError."""
    if path is None:
        return None
    if not path.is_file():
        raise InputError("there is no such file of keys", where=str(path))
    lines = (line.strip() for line in path.read_text("utf-8-sig").splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None:
        raise InputError("the file holds no key", where=str(path), expected="a key a line")
    return key


async def climb(target: Target, plan: Plan, load: Load, *, least: int = 1) -> list[dict[str, Any]]:
    """Measure with twice as much each time, `least` times and until that brings nothing."""
    steps: list[dict[str, Any]] = []
    best = 0.0
    for power in itertools.count():
        clients = min(load.clients * 2**power, MOST_CLIENTS) if load.rate is None else load.clients
        rate = None if load.rate is None else load.rate * 2**power
        step = Load(clients=clients, requests=load.requests, rate=rate, duration=load.duration, timeout=load.timeout,
                    seed=load.seed + power)  # fmt: skip
        steps.append(await measure(target, plan, step))
        reached = steps[-1]["requests_per_second"]
        if (reached <= GROWTH * best and len(steps) >= least) or (load.rate is None and clients == MOST_CLIENTS):
            break
        best = max(best, reached)
    return steps


async def measure(target: Target, plan: Plan, load: Load) -> dict[str, Any]:
    """Run one load and return its figures."""
    watch = Watch()
    over = asyncio.Event()
    watching = asyncio.create_task(look(target, watch, over)) if plan.own else None
    started, used = time.perf_counter(), time.process_time()
    answers = await (closed(target, plan, load) if load.rate is None else opened(target, plan, load, started))
    used = time.process_time() - used
    seconds = max((answer.ended for answer in answers), default=started) - started
    over.set()
    if watching is not None:
        await watching
    late = [answer.sent - answer.due for answer in answers]
    return {
        "mode": "closed" if load.rate is None else "open", "clients": load.clients, "rate": load.rate,
        **summarise(answers, seconds),
        "server": tell(watch),
        "client": {"processor_share": used / seconds if seconds else 0.0, "send_delay": percentiles(late)},
    }  # fmt: skip


async def closed(target: Target, plan: Plan, load: Load) -> list[Answer]:
    """Let every client ask until there have been enough requests, or the time is over."""
    numbers = itertools.count() if load.requests is None else iter(range(load.requests))
    end = math.inf if load.duration is None else time.perf_counter() + load.duration
    answers: list[Answer] = []

    async def client() -> None:
        connection = Connection(target)
        for number in numbers:
            if time.perf_counter() >= end:
                break
            answer = await ask(connection, plan, number, load)
            answers.append(answer)
            if answer.error is not None:
                wait = PAUSE if answer.error in GONE else answer.wait
                await asyncio.sleep(min(wait, LONGEST_WAIT, max(0.0, end - time.perf_counter())))
        connection.close()

    await asyncio.gather(*(client() for _ in range(load.clients)))
    return answers


async def opened(target: Target, plan: Plan, load: Load, started: float) -> list[Answer]:
    """Send each request when it is due, on a connection that is free; a new one where none is and there may be more."""
    draw = random.Random(load.seed)
    rate = load.rate or 1.0
    free: list[Connection] = []
    room = asyncio.Semaphore(load.clients)
    answers: list[Answer] = []

    async def one(number: int, due: float) -> None:
        async with room:
            connection = free.pop() if free else Connection(target)
            answers.append(await ask(connection, plan, number, load, due))
            free.append(connection)

    tasks: set[asyncio.Task[None]] = set()
    due = started
    for number in itertools.count() if load.requests is None else range(load.requests):
        due += draw.expovariate(rate)
        if load.duration is not None and due - started > load.duration:
            break
        await asyncio.sleep(due - time.perf_counter())  # 0 and less give the others their turn
        task = asyncio.create_task(one(number, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return answers


async def ask(connection: Connection, plan: Plan, number: int, load: Load, due: float | None = None) -> Answer:
    """Send a request of the plan; of the answer only what counts is kept."""
    body = plan.bodies[number % len(plan.bodies)]
    answer = await connection.ask("POST", plan.route, body, due=due, seconds=load.timeout)
    answer.body = b""
    return answer


async def look(target: Target, watch: Watch, over: asyncio.Event) -> None:
    """Read the server's own counts now and again, and once more at the end."""
    connection = Connection(target)
    while not over.is_set():
        await count(connection, watch)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK):
                await over.wait()
    await asyncio.sleep(LOOK)  # the engine tells its counts with its next sign of life
    await count(connection, watch)
    connection.close()


async def count(connection: Connection, watch: Watch) -> None:
    """Read the server's own counts once; where it does not tell them, nothing is counted."""
    answer = await connection.ask("GET", "/metrics")
    if answer.error is not None:
        return
    found: dict[str, float] = {}
    for name, value in COUNT.findall(answer.body.decode("utf-8", "replace")):
        found[name] = found.get(name, 0.0) + float(value)  # over all models
    watch.waiting.append(found.get("lmworks_requests_waiting", 0.0))
    watch.memory = max(watch.memory, found.get("lmworks_memory_bytes", 0.0))
    watch.first, watch.last = watch.first or found, found


def tell(watch: Watch) -> dict[str, Any] | None:
    """Return what the server told of itself; None where it told nothing."""
    if watch.first is None or watch.last is None:
        return None
    grown = {name: watch.last[name] - watch.first.get(name, 0.0) for name in watch.last}
    batches = grown.get("lmworks_batches_total", 0.0)
    return {
        "waiting_mean": sum(watch.waiting) / len(watch.waiting), "waiting_most": max(watch.waiting),
        "memory_bytes_most": watch.memory, "processor_seconds": grown.get("lmworks_processor_seconds_total", 0.0),
        "engine_restarts": grown.get("lmworks_engine_restarts_total", 0.0),
        "rows_a_batch": grown.get("lmworks_batch_rows_total", 0.0) / batches if batches else None,
        "prompt_tokens": grown.get("lmworks_prompt_tokens_total"),
        "prompt_tokens_reused": grown.get("lmworks_prompt_tokens_reused_total"),
    }  # fmt: skip


def summarise(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Return the figures of some answers that took `seconds` in all."""
    good = [answer for answer in answers if answer.error is None]
    begun = [answer for answer in good if answer.first is not None]
    tokens = sum(answer.tokens for answer in good)
    began = min((answer.due for answer in answers), default=0.0)  # they stand in the order in which they ended
    gaps = [(one.ended - one.first) / (one.tokens - 1) for one in begun if one.first is not None and one.tokens > 1]
    return {
        "seconds": seconds, "requests": len(answers), "succeeded": len(good), "failed": len(answers) - len(good),
        "requests_per_second": len(good) / seconds if seconds else 0.0,
        "latency": percentiles([answer.latency for answer in good]),
        "first_token": percentiles([one.first - one.due for one in begun if one.first is not None]),
        "per_token": percentiles(gaps), "tokens": tokens or None,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "statuses": {str(status): n for status, n in sorted(Counter(one.status for one in answers).items()) if status},
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None).most_common()),
        "times": [[round(one.due - began, 4), round(one.latency, 5)] for one in thin(good)],
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return the nearest-rank percentiles, the mean and the largest, in seconds; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    found = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}
    return {**found, "max": ordered[-1], "mean": sum(ordered) / len(ordered)}


def thin(answers: Sequence[Answer]) -> Sequence[Answer]:
    """Return a few hundred of the answers at most, evenly, for the chart."""
    return answers[:: max(1, len(answers) // DRAWN)]
