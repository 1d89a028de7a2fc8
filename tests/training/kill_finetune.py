"""Kill fine-tuning runs at random instants, resume them, and compare every file that they leave.

    python kill_finetune.py FOLDER KILLS SEED METHOD

METHOD is one of finetune's, "distill", or "tasks": two tasks at once. FOLDER holds `body` (for distill `teacher`),
`train.jsonl`, `validation.jsonl` and, for two tasks, `names.conll`. Prints a JSON object: the kills, the runs they
were spread over, and what differed from a run that nobody killed. Every run is a fork of this process.
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

from lmworks.training.log import TIMES
from lmworks.verbs.distilling import distill
from lmworks.verbs.finetuning import finetune

UNEQUAL = {"report.html", "report.json", "lmworks.json"}  # they hold times


def run(root: Path, out: Path, method: str, resume: bool) -> None:
    """Fine-tune, or resume, to the end, in a child process that never returns."""
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        which: dict[str, Any] = {"layers": 1} if method == "distill" else {"method": method}
        if method == "tasks":
            which = {"also_task": (f"{root}/names.conll=token-classification=0.2",), "epochs": 2}
        (distill if method == "distill" else finetune)(
            root / ("teacher" if method == "distill" else "body"),
            root / "train.jsonl",
            out,
            validation=root / "validation.jsonl",
            task="text-classification",
            **{"epochs": 3, **which},
            lr=2e-3,
            batch_size=8,
            accumulation=2,
            dtype="fp32",
            resume=resume,
        )
        os._exit(0)
    except BaseException:
        sys.stderr = sys.__stderr__
        traceback.print_exc()
        os._exit(1)


def start(root: Path, out: Path, method: str) -> int:
    """Fork a run, a resumed one where there is something to resume; return its process."""
    resume = out.with_name(f"{out.name}.partial").is_dir()
    child = os.fork()
    if child == 0:
        run(root, out, method, resume)
    return child


def result(out: Path) -> dict[str, Any]:
    """Return the hash of every file, and the loss log without its times."""
    found: dict[str, Any] = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in UNEQUAL and path.relative_to(out).parts[0] != "training"
    }
    rows = [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    report = json.loads((out / "report.json").read_text())
    found["report"] = {
        name: report[name] for name in ("metrics", "baselines", "best_step", "validation_loss", "history")
    }
    return found


def main() -> None:
    """Run once undisturbed, then again and again with kills, until enough of them have hit."""
    root, kills, rng, method = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])), sys.argv[4]
    began = time.monotonic()
    _, status = os.waitpid(start(root, root / "whole", method), 0)
    assert status == 0
    duration = time.monotonic() - began
    expected = result(root / "whole")
    done = runs = 0
    different: list[str] = []
    while done < kills:
        runs, over = runs + 1, False
        out = root / f"run{runs}"
        while not over:
            child = start(root, out, method)
            if done < kills:
                time.sleep(rng.uniform(0.1, 0.9) * duration)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            over = out.is_dir()  # it may be killed in the last instant, when all is in place
            done += status == signal.SIGKILL
            assert status in (0, signal.SIGKILL), status
        found = result(out)
        different += [f"run {runs}: {name}" for name in expected if found.get(name) != expected[name]]
        different += [f"run {runs}: also {name}" for name in found if name not in expected]
    print(json.dumps({"kills": done, "runs": runs, "different": different}))


if __name__ == "__main__":
    main()
