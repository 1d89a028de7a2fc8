"""Start a search again and again, kill it at random moments, and say what it left.

    python kill_tune.py FOLDER TRIALS KILLS SEED

FOLDER holds `body`, `train.jsonl` and `validation.jsonl`. The processes that are killed are forks of this one.
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

from lmworks.searching import tune


def start(root: Path, trials: int) -> int:
    """Fork a process that runs the search to its end; return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        tune(
            root / "body", root / "train.jsonl", root / "killed", validation=root / "validation.jsonl",
            storage=root / "killed.jsonl", task="text-classification", trials=trials, dtype="fp32",
            space=("lr=3e-4..3e-2:log", "batch_size=8,16", "epochs=1..2"),
        )  # fmt: skip
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """Kill it so many times, then let it end."""
    root, trials, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    done = 0
    while not (root / "killed").is_dir():
        child = start(root, trials)
        if done < kills:
            time.sleep(rng.uniform(0.3, 2.5))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), status
        done += status == signal.SIGKILL
    print(json.dumps({"kills": done}))


if __name__ == "__main__":
    main()
