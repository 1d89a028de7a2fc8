"""Kill training runs at random instants, a third of the time inside a save, resume them, and compare every bit.

    python kill_runs.py FOLDER KILLS SEED

Prints a JSON object: the kills, how many of them left a save half done, the runs they were spread over, and what
differed from a run that nobody killed. Every run is a fork of this process, so that a kill costs no import.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from small import make_data, make_trainer

from lmworks.training.log import TIMES

STEPS = 36


def run(folder: Path, *, slow_saves: bool = False) -> None:
    """Train or resume to the end, in a child process that never returns."""
    if slow_saves:
        for name in ("fsync", "rename", "write"):
            widen(name)
    try:
        trainer = make_trainer(
            folder, dropout=0.1, accumulation=2, steps=STEPS, eval_every=4, data=make_data(batch_size=4)
        )
        trainer.fit()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def widen(name: str) -> None:
    """Make a system call wait first."""
    call = getattr(os, name)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.0005)
        return call(*arguments)

    setattr(os, name, slow)


def start(folder: Path, **options: Any) -> int:
    """Fork a run; return its process."""
    child = os.fork()
    if child == 0:
        run(folder, **options)
    return child


def is_over(child: int) -> bool:
    """Tell whether the child has ended by itself; a failure ends everything."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        raise SystemExit(f"a resumed run failed with status {status}")
    return pid != 0


def saving(folder: Path) -> bool:
    """Tell whether a save, or a removal, is half done."""
    return folder.is_dir() and any(path.name.endswith(".staged") for path in folder.iterdir())


def result(folder: Path) -> dict[str, Any]:
    """Return everything that a finished run left, but for times."""
    found: dict[str, Any] = {"files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))}
    for path in folder.rglob("*.safetensors"):
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    state = json.loads((folder / f"last.{STEPS}" / "state.json").read_text())
    found["state"] = {name: value for name, value in state.items() if name not in {*TIMES, "metrics_bytes"}}
    return found


def main() -> None:
    """Run once undisturbed, then again and again with kills, until enough of them have hit."""
    root, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.monotonic()
    _, status = os.waitpid(start(root / "whole"), 0)
    assert status == 0
    duration = time.monotonic() - began
    expected = result(root / "whole")
    done = inside = runs = 0
    different: list[str] = []
    while done < kills:
        runs += 1
        folder = root / f"run{runs}"
        over = False
        while not over:
            aimed = done % 3 == 2
            if done >= kills:
                over = os.waitpid(start(folder), 0)[1] == 0
                assert over
                break
            child = start(folder, slow_saves=aimed)
            if aimed:
                while not (over := is_over(child)) and not saving(folder):
                    time.sleep(0.0002)
                delay = rng.uniform(0, 0.03)
            else:
                delay = rng.uniform(0, duration / 2)
            until = time.monotonic() + delay
            while not over and time.monotonic() < until and not (over := is_over(child)):
                time.sleep(0.0005)
            if not over:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                over = status == 0  # it ended in the last instant
                done += not over
                inside += not over and saving(folder)
        found = result(folder)
        different += [f"run {runs}: {name}" for name in expected if found.get(name) != expected[name]]
    print(json.dumps({"kills": done, "inside": inside, "runs": runs, "different": different}))


if __name__ == "__main__":
    main()
