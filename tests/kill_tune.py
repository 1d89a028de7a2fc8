"""Start a search again and again, kill it at random moments, and say what it left.

    python kill_tune.py FOLDER TRIALS KILLS SEED WORKERS SPACE…

FOLDER holds `body`, `train.jsonl` and `validation.jsonl`. So many processes run at the same time, all with the same
command; those that are killed are forks of this one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import optuna  # noqa: F401 (imported once, before the forks)

from lmworks.verbs.searching import tune


def start(root: Path, trials: int, space: list[str]) -> int:
    """Fork a process that runs the search to its end; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = (root / "log.txt").open("a")
        tune(
            root / "body", root / "train.jsonl", root / "killed", validation=root / "validation.jsonl",
            storage=root / "killed.jsonl", task="text-classification", trials=trials, dtype="fp32", space=space,
        )  # fmt: skip
        code = 0
    except Exception as error:
        sys.stderr.write(f"{error!r}: {error}\n")
        code = 3 if "already holds a model" in str(error) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Kill one of them so many times, then let them end."""
    root, space = Path(sys.argv[1]), sys.argv[6:]
    trials, kills, seed, workers = map(int, sys.argv[2:6])
    rng, done, running, log = random.Random(seed), 0, list[int](), root / "log.txt"
    log.touch()
    while not (root / "killed").is_dir():
        before = log.stat().st_size
        running += [start(root, trials, space) for _ in range(workers - len(running))]
        if done < kills:
            while done % 4 and log.stat().st_size == before and not (root / "killed").is_dir():
                time.sleep(0.01)  # every fourth is killed at its start, the others once a trial has begun or ended
            time.sleep(rng.uniform(0, 2))
            os.kill(rng.choice(running), signal.SIGKILL)
        child, status = os.wait()
        assert status in (0, signal.SIGKILL, 3 << 8), (status, log.read_text())
        running.remove(child)
        done += status == signal.SIGKILL
    for child in running:
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL, 3 << 8), (status, log.read_text())
    begun = [line for line in log.read_text().splitlines() if ": lr " in line]
    print(json.dumps({"kills": done, "begun_again": len(begun) - len(set(begun))}))


if __name__ == "__main__":
    main()
