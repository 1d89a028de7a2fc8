"""Processes that work in turn: each setting in one of its own, so that none profits from another's allocator.

A script calls `serve(step)` in the process of a setting, and `take_turns(script, settings)` in the one that measures.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WARM_UP = 3


@dataclass
class Turns:
    """What one setting needed: seconds of each round, and the most memory that its process ever held, in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def serve(step: Callable[[], object]) -> None:
    """Warm up; then, for every line on standard input, make a step and print its seconds and the peak memory."""
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def take_turns(script: str, settings: Sequence[str], *, rounds: int, options: Sequence[str] = ()) -> dict[str, Turns]:
    """Start `script --work SETTING` for each setting, let them step in turn, return what each needed."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, script, "--work", name, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in settings
    }
    turns = {name: Turns() for name in settings}
    for name, worker in workers.items():
        assert worker.stdout is not None
        if worker.stdout.readline().strip() != "ready":
            raise SystemExit(f"{name} could not start; see above")
    for _ in range(rounds):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            print("step", file=worker.stdin, flush=True)
            seconds, peak = worker.stdout.readline().split()
            turns[name].seconds.append(float(seconds))
            turns[name].peak_bytes = int(peak)
    for worker in workers.values():
        worker.communicate()
    return turns
