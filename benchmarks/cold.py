"""A cold answer: `lmworks classify MODEL "text"` against a script with transformers' pipeline, each a fresh process.

BERT-base with random weights and a real tokenizer, exported (no torch is loaded) and as it was published. `import
torch` alone, which the pipeline and the published folder must pay, is the peer of a row of its own.
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

from lmworks.export.onnx_folder import export_graphs

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
    """Let the commands take turns and print the medians of the paired ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_bert(Path(folder) / "published")
        export_graphs(path, Path(folder) / "graph", dtypes=["fp32"])
        classify = [sys.executable, "-m", "lmworks", "classify"]
        commands = {
            "graph": [*classify, f"{folder}/graph", TEXT, "--json"],
            "published": [*classify, str(path), TEXT, "--json"],
            "peer": [sys.executable, "-c", PEER, str(path), TEXT],
        }
        known, *others = (best(run(commands[name])[1]) for name in ("peer", "graph", "published"))
        if not all(abs(other - known) <= 1e-5 for other in others):
            raise SystemExit("the answers differ")
        commands["torch"] = [sys.executable, "-c", "import torch"]
        run(commands["torch"])
        times = [{name: run(command)[0] for name, command in commands.items()} for _ in range(ROUNDS)]
    rows = []
    for what, ours, peer, target in (
        ("cold `lmworks classify`, BERT-base, exported (peer: transformers' pipeline)", "graph", "peer", 8.0),
        ("cold `lmworks classify`, BERT-base in torch (peer: transformers' pipeline)", "published", "peer", None),
        ("the same (peer: `import torch` alone, a floor for both)", "published", "torch", None),
    ):
        mine, theirs = (statistics.median(turn[name] for turn in times) for name in (ours, peer))
        ratio = statistics.median(turn[peer] / turn[ours] for turn in times)
        rows.append({"what": what, "ours": mine, "peer": theirs, "unit": "s", "ratio": ratio, "target": target})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
