"""Load of a local checkpoint plus the first forward of 8 tokens: ours against transformers' from_pretrained.

Each measurement is a process of its own that has already imported its libraries, so that only the load is timed.
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
import sys, time, torch
from lmworks.models.checkpoint import load_model
torch.set_num_threads(2)
ids = torch.arange(8)[None]
start = time.perf_counter()
with torch.inference_mode():
    model = load_model(sys.argv[1]).eval(); model(ids)
print(time.perf_counter() - start)
"""
PEER = """
import sys, time, torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
torch.set_num_threads(2)
ids = torch.arange(8)[None]
start = time.perf_counter()
with torch.inference_mode():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(); model(ids)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Save a GPT-2 of 124 million random weights once, then alternate the two loaders."""
    import torch
    import transformers

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "gpt2")
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(path)

        def seconds(code: str) -> float:
            done = subprocess.run(
                [sys.executable, "-c", code, path],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            return float(done.stdout.split()[-1])

        seconds(OURS), seconds(PEER)
        pairs = [(seconds(OURS), seconds(PEER)) for _ in range(ROUNDS)]
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    row = {"what": "load GPT-2 124M and first forward of 8 tokens", "ours": ours, "peer": peer, "unit": "s",
           "ratio": ratio, "target": 8.0}  # fmt: skip
    print(json.dumps([row]))


if __name__ == "__main__":
    main()
