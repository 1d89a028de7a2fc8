"""Models side by side as servers: each is started on loopback, asked the same texts, loaded, measured and stopped.

What a deployment report needs: set-up, configuration, response time, scalability under load, resource use, and whether
a smaller model still says the same.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmworks import __version__
from lmworks.base.chart import Chart
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.hub import find_folder
from lmworks.base.report import Report, Table, counted
from lmworks.base.threads import cpu_count, read_memory
from lmworks.runtime.choice import read_processor, read_version
from lmworks.serve.load_client import Connection, Target, read_url
from lmworks.serve.load_report import BUSY
from lmworks.serve.load_requests import CLASSIFY, Plan, make_plan
from lmworks.serve.loadtest import Load, climb
from lmworks.serve.service import describe
from lmworks.text.labelled import read_labelled

STARTED = 120.0  # seconds in which a server must answer
ENDED = 40.0  # and in which it must end
LEAST = 4  # steps of a curve: 1, 2, 4 and 8 clients, so that curves go as far
PACKAGES = ("onnxruntime", "torch", "tokenizers", "uvicorn")
WEIGHTS = (".onnx", ".onnx_data", ".safetensors")
SAID: dict[str, Callable[[Any], Any]] = {  # what must agree of an answer
    "/classify": lambda said: said["answers"][0]["label"],
    "/ner": lambda said: [(one["label"], one["start"], one["end"]) for one in said["answers"][0]["entities"]],
    "/qa": lambda said: said["answers"][0]["text"],
    "/generate": lambda said: said["text"],
}
Values = dict[str, Any]


def compare_load(
    models: Sequence[str], *, load: Load, route: str | None = None, data: Path | None = None, column: str | None = None,
    max_tokens: int = 64,
) -> Report:  # fmt: skip
    """Serve each of some model folders in turn and return what it costs and how it does; the first is the reference.

    Each answers every text once, which warms it up, and then `load.requests` of them (or `load.duration` seconds) from
    `load.clients` clients, twice as many, and so on, until that brings nothing. Raises InputError as `loadtest` does.
    """
    folders = [find_folder(model) for model in models]
    for folder in folders:
        describe(folder)
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(model) for model in models]
    found = []
    for name, folder in zip(names, folders, strict=True):
        with served(folder) as (target, seconds):
            one, said = asyncio.run(measure_one(target, load, route, data, column, max_tokens))
        sizes = [(path.name, path.stat().st_size) for path in folder.rglob("*") if path.is_file()]
        one |= {"name": name, "folder": str(folder), "ready_seconds": seconds, "bytes": sum(size for _, size in sizes)}
        one["weight_bytes"] = sum(size for name, size in sizes if name.endswith(WEIGHTS))
        found.append((one, said))
    reference = found[0][1]
    gold = read_gold(data, column, found[0][0])
    for one, said in found:
        known = said is not None and reference is not None and len(said) == len(reference)
        one["agreement"] = share(said, reference) if known and said and reference else None
        one["accuracy"] = share(said, gold) if said is not None and gold is not None else None
    values = {"setup": describe_setup(), "models": [one for one, _ in found]}
    return make_report(values, labelled=gold is not None)


@contextmanager
def served(folder: Path, *before: str) -> Iterator[tuple[Target, float]]:
    """Start `lmworks serve` on a free loopback port; yield where it is and the seconds until it was ready; stop it.

    The words `before` come before its command.
    """
    started = time.perf_counter()
    with TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        command = [*before, sys.executable, "-m", "lmworks", "serve", str(folder), "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            target = None
            while target is None or asyncio.run(ready(target)) != 200:
                said = Path(log.name).read_text("utf-8", "replace")
                if process.poll() is not None or time.perf_counter() - started > STARTED:
                    raise LmworksError("the server does not answer", where=str(folder), found=said.strip()[-500:])
                address = re.search(r"^Serving .* at (http://\S+?)/ ", said, re.MULTILINE)
                target = read_url(address.group(1)) if address else None
                time.sleep(0.02)
            yield target, time.perf_counter() - started
        finally:
            process.terminate()
            try:
                process.wait(ENDED)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def ready(target: Target) -> int:
    """Return the status of the readiness probe."""
    connection = Connection(target)
    answer = await connection.ask("GET", "/health/ready", seconds=10)
    connection.close()
    return answer.status


async def measure_one(
    target: Target, load: Load, route: str | None, data: Path | None, column: str | None, max_tokens: int
) -> tuple[Values, list[Any] | None]:
    """Return a server's figures, and what it said of each text, None where that cannot be compared."""
    plan = await make_plan(target, route=route, model=None, data=data, column=column, max_tokens=max_tokens)
    connection = Connection(target)
    [info] = (await connection.ask("GET", "/info")).json()["models"]
    said = [await ask(connection, plan, body) for body in plan.bodies]
    connection.close()
    steps = [
        {key: step[key] for key in step if key != "times"} for step in await climb(target, plan, load, least=LEAST)
    ]
    best = max(steps, key=lambda step: float(step["requests_per_second"]))
    used = sum(step["server"]["processor_seconds"] for step in steps)
    facts: Values = {"task": plan.task, "route": plan.route, "texts": len(plan.bodies)}
    facts |= {name: info[name] for name in ("runtime", "dtype", "labels")}
    facts |= {
        "one": steps[0], "best": best, "curve": steps,
        "processor_seconds_a_request": used / max(1, sum(step["succeeded"] for step in steps)),
        "processors_used": best["server"]["processor_seconds"] / best["seconds"],
        "memory_bytes_most": max(step["server"]["memory_bytes_most"] for step in steps),
    }  # fmt: skip
    return facts, said if plan.route in SAID else None


async def ask(connection: Connection, plan: Plan, body: Values) -> Any:
    """Return what is compared of an answer; a text is asked for as a whole. Raises LmworksError for a refusal."""
    answer = await connection.ask("POST", plan.route, {**body, "stream": False} if plan.streams else body)
    if answer.error is not None:
        raise LmworksError("the server refuses a text", found=answer.error, where=plan.route)
    return SAID[plan.route](answer.json()) if plan.route in SAID else None


def share(said: Sequence[Any], other: Sequence[Any]) -> float:
    """Return the share that is equal."""
    return sum(bool(one == two) for one, two in zip(said, other, strict=True)) / len(said)


def read_gold(data: Path | None, column: str | None, one: Values) -> list[str] | None:
    """Return the labels of the texts that were asked; None where there are none that the model knows."""
    if data is None or one["task"] != CLASSIFY:
        return None
    try:
        read = read_labelled(data, CLASSIFY, text_column=column, header=not (column or "").isdigit())
    except (InputError, FormatError):
        return None
    pairs = zip(read.examples, read.references, strict=True)
    gold = [str(label) for text, label in pairs if not isinstance(text, str) or text.strip()]
    return gold if set(gold) <= set(one["labels"]) and len(gold) == one["texts"] else None


def describe_setup() -> Values:
    """Return what the figures depend on beside the models."""
    memory = read_memory()
    return {
        "processor": read_processor(), "processors": cpu_count(), "memory_bytes": memory[0] if memory else None,
        "system": platform.platform(), "python": platform.python_version(), "lmworks": __version__,
        **{name: read_version(name) or None for name in PACKAGES}, "load_average": list(os.getloadavg()),
    }  # fmt: skip


def make_report(values: Values, *, labelled: bool) -> Report:
    """Return the report: a table for each question, a row for each model."""
    models, setup = values["models"], values["setup"]
    shown: list[tuple[str, Any]] = [
        ("processor", f"{setup['processor']}, {counted(setup['processors'], 'thread')} used"),
        ("memory", f"{(setup['memory_bytes'] or 0) / 2**30:.1f} GiB"), ("system", setup["system"]),
        ("software", ", ".join(f"{name} {setup[name]}" for name in ("python", "lmworks", *PACKAGES) if setup[name])),
        ("load", "clients on the same machine, each asking again when answered"),
    ]  # fmt: skip

    def rows(*cells: Callable[[Values], Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple((one["name"], *(cell(one) for cell in cells)) for one in models)

    def ms(key: str) -> Callable[[Values], Any]:
        return lambda one: 1000 * one["one"]["latency"][key] if one["one"]["latency"] else None

    p99 = [[(float(step["clients"]), 1000 * step["latency"]["p99"]) for step in one["curve"] if step["latency"]]
           for one in models]  # fmt: skip
    done = [[(float(step["clients"]), float(step["requests_per_second"])) for step in one["curve"]] for one in models]
    charts = tuple(
        Chart(
            title, "clients", unit, tuple((one["name"], tuple(line)) for one, line in zip(models, lines, strict=True))
        )
        for title, unit, lines in (("Throughput", "answered a second", done), ("Slowest of a hundred", "p99, ms", p99))
    )
    curve = tuple(
        (one["name"], step["clients"], step["requests_per_second"],
         *((1000 * step["latency"][key] for key in ("p50", "p99")) if step["latency"] else (None, None)),
         step["failed"])
        for one in models for step in one["curve"]
    )  # fmt: skip
    tables = (
        Table("Set-up", ("what", "which"), tuple(shown)),
        Table("Configuration", ("model", "route", "runtime", "numbers", "weights, MB", "folder, MB", "texts"),
              rows(*(lambda one, key=key: one[key] for key in ("route", "runtime", "dtype")),
                   lambda one: one["weight_bytes"] / 1e6, lambda one: one["bytes"] / 1e6, lambda one: one["texts"])),
        Table("Response time of one client, ms", ("model", "p50", "p90", "p95", "p99", "max"),
              rows(*map(ms, ("p50", "p90", "p95", "p99", "max")))),
        Table("Scalability under load", ("model", "clients", "answered a second", "p50 ms", "p99 ms", "failed"), curve),
        Table("Resource use", ("model", "ready after, s", "memory at most, MB", "processor ms a request",
                               "processors used, busiest"),
              rows(lambda one: one["ready_seconds"], lambda one: one["memory_bytes_most"] / 1e6,
                   lambda one: 1000 * one["processor_seconds_a_request"], lambda one: one["processors_used"])),
        Table("Answers", ("model", "same as the first", *(("accuracy",) if labelled else ())),
              rows(lambda one: one["agreement"], *((lambda one: one["accuracy"],) if labelled else ()))),
    )  # fmt: skip
    title = f"{' and '.join(one['name'] for one in models)}, served"
    return Report(title, values, tables=tables, charts=charts, notes=tuple(notes(models)))


def notes(models: Sequence[Values]) -> Iterator[str]:
    """Yield what each model costs beside the first, and what a reader should know."""
    first, *others = models
    for one in others:
        faster = one["best"]["requests_per_second"] / max(1e-9, first["best"]["requests_per_second"])
        smaller, lighter = (one[key] / max(1, first[key]) for key in ("weight_bytes", "memory_bytes_most"))
        same = "" if one["agreement"] is None else f"; {one['agreement']:.1%} of the answers stay what they were"
        kept = "" if one["accuracy"] is None else f", accuracy {one['accuracy']:.1%} after {first['accuracy']:.1%}"
        yield (f"{one['name']} against {first['name']}: {faster:.2f} times the answers a second, {smaller:.2f} times "
               f"the weights, {lighter:.2f} times the memory{same}{kept}.")  # fmt: skip
    yield "Each was served alone, one after the other; trust what they are to each other more than the figures."
    if any(step["client"]["processor_share"] > BUSY for one in models for step in one["curve"]):
        yield "The load test itself used a whole processor: the servers may be able to do more."
    if any(step["failed"] for one in models for step in one["curve"]):
        yield "Some requests failed: see the counts under scalability."
