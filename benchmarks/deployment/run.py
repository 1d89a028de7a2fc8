"""One classifier on the premises, in a pod, on an edge device, as a function: writes docs/deployment-results.md.

    python benchmarks/deployment/run.py CHECKPOINT TEXTS        a fine-tuned classifier, a file of plain lines

A pod's limits are those of the kernel: a control group (version 1, which needs root) with a CFS quota and a memory
limit, made below the one that this process is in; the load comes from outside of it. A pod sees its quota and takes as
many threads; here the group is not seen, so LMWORKS_THREADS says it. Everything else is `lmworks serve` as it is.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.export.onnx_folder import export_graphs
from lmworks.serve.loadtest import Load, percentiles
from lmworks.verbs.deploying import deploy_serverless
from lmworks.verbs.load_comparing import describe_setup, measure_one, served

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deployment-results.md"
REQUESTS, ROUNDS = 100, 2
GROUPS = Path("/sys/fs/cgroup")
COLUMNS = ("where", "numbers", "weights, MB", "ready after, s", "p50, ms", "p99, ms", "answers a second", "memory, MB")


@dataclass(frozen=True)
class Place:
    """Where a model is served: at most so many processors, threads and MiB; None: all that there are."""

    name: str
    dtype: str
    processors: float | None = None
    threads: int | None = None
    memory: int | None = None


PLACES = (
    Place("on the premises: the whole machine", "fp32"),
    Place("on the premises: the whole machine", "int8"),
    Place("pod: 1 processor, 800 MiB", "fp32", 1, 1, 800),
    Place("pod: 1 processor, 600 MiB", "int8", 1, 1, 600),
    Place("pod: half a processor, 600 MiB", "int8", 0.5, 1, 600),
    Place("edge: a quarter of a processor, 256 MiB", "int8", 0.25, 1, 256),
)


@contextmanager
def limited(place: Place) -> Iterator[list[str]]:
    """Yield the words that put a command within the limits; the groups are removed afterwards."""
    made: list[Path] = []
    for controller, file, value in (
        ("cpu", "cpu.cfs_quota_us", -1 if place.processors is None else int(place.processors * 100_000)),
        ("memory", "memory.limit_in_bytes", None if place.memory is None else place.memory * 2**20),
    ):
        if value is not None:
            own = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
                       if controller in line.split(":")[1].split(","))  # fmt: skip
            group = GROUPS / controller / own.lstrip("/") / f"lmworks-{os.getpid()}"
            group.mkdir()
            (group / file).write_text(str(value))
            made.append(group)
    enter = "".join(f"echo $$ > {group}/cgroup.procs; " for group in made)
    threads = [] if place.threads is None else ["env", f"LMWORKS_THREADS={place.threads}"]
    try:
        yield ["sh", "-c", f'{enter}exec "$@"', "sh", *threads]
    finally:
        for group in made:
            until = time.monotonic() + 30  # the last of its processes may still be ending
            while group.exists():
                try:
                    group.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)


def serve_one(place: Place, folder: Path, texts: Path) -> tuple[Any, ...]:
    """Measure one server."""
    with limited(place) as words, served(folder, *words) as (target, seconds):
        one, _ = asyncio.run(measure_one(target, Load(clients=1, requests=REQUESTS), None, texts, None, 64))
    assert one["one"]["failed"] == 0
    times = one["one"]["latency"]
    return (place.name, place.dtype, weights(folder), seconds, 1000 * times["p50"], 1000 * times["p99"],
            one["best"]["requests_per_second"], one["memory_bytes_most"] / 1e6)  # fmt: skip


EVENTS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import handler
texts, times, first = json.load(open(sys.argv[2])), [], None
for text in texts:
    began = time.perf_counter()
    handler.handler({"httpMethod": "POST", "body": json.dumps({"input_text": text})}, None)
    times.append(time.perf_counter() - began)
    first = first or time.time()
held = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([first, times[1:], int(held.split()[1]) * 1024]))
"""


def call(dtype: str, folder: Path, texts: list[str], work: Path) -> tuple[Any, ...]:
    """Measure a function: a process that is started and asked, one thread as in a small instance."""
    work.mkdir()
    deploy_serverless(folder, work / f"function-{dtype}")
    (work / "texts.json").write_text(json.dumps(texts))
    place = Place("function: 1 processor, started by its first event", dtype, 1, 1, 600)
    with limited(place) as words:
        command = [*words, sys.executable, "-c", EVENTS, str(work / f"function-{dtype}"), str(work / "texts.json")]
        before = datetime.datetime.now().timestamp()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    first, times, memory = json.loads(done.stdout)
    found = percentiles(times)
    assert found is not None
    return (place.name, dtype, weights(folder), first - before, 1000 * found["p50"], 1000 * found["p99"],
            len(times) / sum(times), memory / 1e6)  # fmt: skip


def better(one: tuple[Any, ...], two: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the least of each figure of two rounds, but the most answers a second."""
    rest = (min(a, b) for a, b in zip(one[2:6], two[2:6], strict=True))
    return (*one[:2], *rest, max(one[6], two[6]), max(one[7], two[7]))


def weights(folder: Path) -> float:
    """Return the megabytes of graphs."""
    return sum(path.stat().st_size for path in (folder / "onnx").iterdir()) / 1e6


def main() -> None:
    """Measure every place in turn, and write the page."""
    checkpoint, texts = map(Path, sys.argv[1:])
    lines = [line for line in texts.read_text("utf-8").splitlines() if line.strip()]
    rows: list[tuple[Any, ...]] = []
    places: tuple[Place | str, ...] = (*PLACES, "fp32", "int8")
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        for dtype in ("fp32", "int8"):
            export_graphs(checkpoint, work / dtype, dtypes=[dtype])
        for turn in range(ROUNDS):  # in turns: what others take of the machine meets everybody
            for number, place in enumerate(places):
                if isinstance(place, Place):
                    row = serve_one(place, work / place.dtype, texts)
                else:
                    row = call(place, work / place, lines[: REQUESTS + 1], work / f"{turn}-{place}")
                rows[number : number + 1] = [row if not turn else better(rows[number], row)]
                sys.stderr.write(f"{row}\n")
    setup = describe_setup()
    reference = rows[0]
    table = ["| " + " | ".join((*COLUMNS, "answers a second, times the first")) + " |", "|--" * 9 + "|"]
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in (*row, row[6] / reference[6])]
        table.append("| " + " | ".join(cells) + " |")
    PAGE.write_text(TEXT.format(
        day=datetime.date.today(), processor=f"{setup['processor']}, {setup['processors']} processors",
        load=setup["load_average"][0], table="\n".join(table), requests=REQUESTS, rounds=ROUNDS, texts=len(lines),
        onnxruntime=setup["onnxruntime"],
    ))  # fmt: skip


TEXT = """# One model in four places

A fine-tuned MiniLM (6 layers, 22.7 million numbers, two labels) on {day}: {processor},
onnxruntime {onnxruntime}, load average {load:.1f} before the start: **compare rows with each other, not with your
machine**. Made by `python benchmarks/deployment/run.py CHECKPOINT TEXTS`.

{table}

- Times are those of one client that asks `POST /classify` {requests} times for {texts} reviews; answers a second are
  the most that 1, 2, 4, 8 … clients got; memory is the resident memory of the server's processes at most. The clients
  are on the same machine and outside of the limits. Each place was measured {rounds} times, in turns; the best of each
  figure counts.
- *On the premises* is `lmworks serve` with all processors, as the unit for systemd of `lmworks pack` runs it.
- *Pod* and *edge* are the same server in a control group of the kernel (version 1: `cpu.cfs_quota_us`,
  `memory.limit_in_bytes`) with one thread, as a kubelet sets it up for `resources.limits`; no cluster and no device
  were there. The others have a group without a limit, so that beside other work all get the same share. A real edge
  processor is another one: measure there with `lmworks loadtest`.
- *Function* is `handler.py` of `lmworks deploy serverless` in a process, without the service around it: *ready after*
  is from the start of the process to its first answer, the times are those of the events that follow, one by one.
- The browser is not in this table: there the visitor's machine computes ([playground](playground.md)).

Mind the first two rows where the load average is above the number of processors: two threads that wait for each other
then lose to one thread, and to a function that is asked by nobody else; run it again on a quiet machine before you
choose a number of threads by it.

What to make of it: int8 wants a quarter of the disk and answers sooner wherever processors are scarce; memory is mostly
that of the server itself, not of the graph. A quota costs about its share of the answers, and lengthens the start; a
request that meets its end waits for the next period of 100 ms. A function starts sooner than a server, as nothing is
listening yet, but each cold one pays that start for somebody's question.
"""

if __name__ == "__main__":
    main()
