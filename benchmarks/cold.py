"""A cold answer: `lmworks classify MODEL "text"` against a script with transformers' pipeline, each a fresh process.

BERT-base with random weights and a real tokenizer. Two floors come with it: `import torch` alone, which both must pay,
is the peer of a row of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from encode import save_bert

ROUNDS = 5
TEXT = "a fine film, and a long one"
PEER = """
import json, sys
from transformers import pipeline
print(json.dumps(pipeline("text-classification", model=sys.argv[1], top_k=None)(sys.argv[2])))
"""


def run(arguments: list[str]) -> tuple[float, str]:
    """Return the wall time of one fresh process, and what it wrote."""
    start = time.perf_counter()
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def best(answer: str) -> float:
    """Return the highest score of an answer as JSON, however it is nested."""
    value = json.loads(answer[answer.index("[") :])
    found: list[float] = []

    def walk(item: object) -> None:
        if isinstance(item, dict):
            found.extend(float(item[key]) for key in item if key == "score")
        for child in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            walk(child)

    walk(value)
    return max(found)


def main() -> None:
    """Alternate the three commands and print the medians of the paired ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(save_bert(Path(folder)))
        ours = [sys.executable, "-m", "lmworks", "classify", path, TEXT, "--json"]
        peer = [sys.executable, "-c", PEER, path, TEXT]
        floor = [sys.executable, "-c", "import torch"]
        if not abs(best(run(ours)[1]) - best(run(peer)[1])) <= 1e-5:
            raise SystemExit("the answers differ")
        run(floor)
        times = [tuple(run(command)[0] for command in (ours, peer, floor)) for _ in range(ROUNDS)]
    mine, theirs, torch = (statistics.median(column) for column in zip(*times, strict=True))
    rows = [
        {"what": "cold `lmworks classify`, BERT-base in torch (peer: transformers' pipeline)", "ours": mine,
         "peer": theirs, "unit": "s", "ratio": statistics.median(b / a for a, b, _ in times), "target": 8.0},
        {"what": "the same (peer: `import torch` alone, a floor for both)", "ours": mine, "peer": torch, "unit": "s",
         "ratio": statistics.median(c / a for a, _, c in times), "target": None},
    ]  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
