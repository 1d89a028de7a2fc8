"""Decode of one sequence, greedy: our runtimes against transformers eager, as it comes and tuned.

"Tuned" is `torch.set_float32_matmul_precision("medium")`, the peer's best setting on processors with bf16 units.
Throughput is tokens per second without the first token. The runs alternate.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS, PROMPT, TOKENS, THREADS = 3, 16, 48, 2


def peer_speed(model: Any, ids: Any, precision: str) -> float:
    """Return transformers' tokens per second: the time of TOKENS tokens less the time of one."""
    import torch

    torch.set_float32_matmul_precision(precision)

    def run(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    with torch.inference_mode():
        first = run(1)
        speed = (TOKENS - 1) / (run(TOKENS) - first)
    torch.set_float32_matmul_precision("highest")
    return speed


def our_speed(runtime: Any, ids: list[int]) -> float:
    """Return a runtime's tokens per second over its prefill and step calls, without the first token."""
    logits = runtime.prefill([0], [ids])
    start = time.perf_counter()
    for _ in range(TOKENS - 1):
        logits = runtime.step([0], [int(np.argmax(logits[0]))])
    return (TOKENS - 1) / (time.perf_counter() - start)


def main() -> None:
    """Make a Llama of 110 million random weights, alternate all runtimes, print the medians of the paired ratios."""
    import torch
    import transformers

    from lmworks.export.onnx import export_onnx
    from lmworks.runtime.onnx_runtime import OnnxRuntime
    from lmworks.runtime.torch_runtime import TorchRuntime

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=2048, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        peer = transformers.LlamaForCausalLM(config).eval()
        peer.save_pretrained(path)
        export_onnx(path, path, dtypes=("fp32", "int8", "q4"))
        ids = torch.randint(3, 32000, (1, PROMPT))
        prompt = ids[0].tolist()
        runtimes = {
            "torch fp32": TorchRuntime(path),
            "torch bf16": TorchRuntime(path, dtype="bf16"),
            "onnx fp32": OnnxRuntime(path, dtype="fp32", threads=THREADS),
            "onnx int8": OnnxRuntime(path, dtype="int8", threads=THREADS),
            "onnx q4": OnnxRuntime(path, dtype="q4", threads=THREADS),
        }
        speeds: dict[str, list[float]] = {name: [] for name in (*runtimes, "peer", "tuned peer")}
        for i in range(ROUNDS + 1):
            for name, runtime in runtimes.items():
                speeds[name].append(our_speed(runtime, prompt))
            speeds["peer"].append(peer_speed(peer, ids, "highest"))
            speeds["tuned peer"].append(peer_speed(peer, ids, "medium"))
            if i == 0:  # warm-up
                speeds = {name: [] for name in speeds}
    targets = {"torch fp32": 1.7, "onnx fp32": 1.7, "torch bf16": 3.0, "onnx int8": 5.0, "onnx q4": 9.0}
    rows = []
    for name in runtimes:
        for against in ("tuned peer", "peer"):
            ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds[against], strict=True))
            label = "tuned" if against == "tuned peer" else "as it comes"
            rows.append({
                "what": f"decode Llama 110M, {name} (peer: transformers eager fp32, {label})",
                "ours": statistics.median(speeds[name]), "peer": statistics.median(speeds[against]), "unit": "tokens/s",
                "ratio": ratio, "target": targets[name] if against == "tuned peer" else None,
            })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
