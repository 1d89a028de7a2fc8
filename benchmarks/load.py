"""Load of a local checkpoint plus the first forward of 8 tokens: ours against transformers' from_pretrained.

Each measurement is a process of its own that has already imported its libraries, so that only the load is timed. The
floor is what any loader must pay: to map the weights and to read each number once.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 5
OURS = """
import sys, time, numpy, torch
from lmworks.runtime.torch_runtime import TorchRuntime
torch.set_num_threads(2)
ids = numpy.arange(8)[None]
start = time.perf_counter()
TorchRuntime(sys.argv[1]).run({"input_ids": ids})
print(time.perf_counter() - start)
"""
PEER = """
import sys, time, torch, transformers
cls = getattr(transformers, sys.argv[2])
torch.set_num_threads(2)
ids = torch.arange(8)[None]
start = time.perf_counter()
with torch.inference_mode():
    model = cls.from_pretrained(sys.argv[1]).eval(); model(ids)
print(time.perf_counter() - start)
"""
FLOOR = """
import os, sys, time, torch
path = sys.argv[1] + "/model.safetensors"
torch.set_num_threads(2)
start = time.perf_counter()
torch.from_file(path, size=os.path.getsize(path) // 8, dtype=torch.int64).max()
print(time.perf_counter() - start)
"""


def seconds(code: str, *arguments: str) -> float:
    """Return what a fresh process measured."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def main() -> None:
    """Save a GPT-2 and a BERT of random weights once, then alternate the two loaders and the floor."""
    import torch
    import transformers

    torch.manual_seed(0)
    models = {
        "GPT-2 124M": transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "BERT-base 110M": transformers.BertForSequenceClassification(transformers.BertConfig()),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path, cls = str(Path(folder) / name.partition(" ")[0]), type(model).__name__
            model.save_pretrained(path)
            times = [(seconds(OURS, path), seconds(PEER, path, cls), seconds(FLOOR, path)) for _ in range(ROUNDS + 1)]
            ours, peer, floor = (statistics.median(column) for column in zip(*times[1:], strict=True))
            for against, other, place, target in (
                ("", peer, 1, 8.0),
                (" (peer: each weight read once)", floor, 2, None),
            ):
                ratio = statistics.median(row[place] / row[0] for row in times[1:])
                rows.append({
                    "what": f"load {name} and first forward of 8 tokens{against}", "ours": ours, "peer": other,
                    "unit": "s", "ratio": ratio, "target": target,
                })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
