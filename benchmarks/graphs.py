"""Encoder graphs in ONNX Runtime: one text of 128 tokens and 32 ragged real texts, fp32, int8 and q4.

MiniLM's size, random weights and its real tokenizer. The peer is transformers, as it comes and, for ragged texts,
sorted by length in batches of 32; other peers run in environments of their own (benchmarks/peers). Every row says how
far the answers are from the peer's in float32. The runs alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from encode import Answers, alternate, copy_tokenizer, real_texts

DTYPES = ("fp32", "int8", "q4")
TOKENS, TEXTS, ROUNDS, RAGGED_ROUNDS = 128, 32, 15, 7
TARGETS = {"fp32": 1.0, "int8": 2.0, "q4": None}
CLOSE = 1e-4


def main() -> None:
    """Export once, measure both shapes, print the rows."""
    import torch

    from lmworks.base.threads import cpu_count
    from lmworks.export.onnx import export_onnx

    torch.set_num_threads(cpu_count())
    with tempfile.TemporaryDirectory() as name:
        folder = save_encoder(Path(name))
        export_onnx(folder, folder, dtypes=DTYPES)
        rows = one_text(folder)
        data = os.environ.get("LMWORKS_DATA")
        rows += ragged(folder, real_texts(Path(data), str(folder))[:TEXTS]) if data else []
    print(json.dumps(rows))


def save_encoder(folder: Path) -> Path:
    """Save a classifier of MiniLM's size with a real tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def one_text(folder: Path) -> list[dict[str, Any]]:
    """Measure a forward of one row."""
    import torch
    import transformers

    from lmworks.runtime.onnx_runtime import OnnxRuntime

    ids = np.random.default_rng(0).integers(1000, 30000, (1, TOKENS))
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def run_peer() -> Answers:
        with torch.inference_mode():
            return peer(torch.from_numpy(ids)).logits.numpy()

    ours = {dtype: OnnxRuntime(folder, dtype=dtype) for dtype in DTYPES}
    runs: dict[str, Callable[[], Answers]] = {
        dtype: lambda r=runtime: r.run({"input_ids": ids})["logits"] for dtype, runtime in ours.items()
    }
    return compare(f"graph of MiniLM's size, 1 × {TOKENS} tokens", {**runs, "as it comes": run_peer}, ROUNDS)


def ragged(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Measure the forwards of ragged texts whose tokens are known, each library with its own batches."""
    import torch
    import transformers

    import lmworks
    from lmworks.runtime.batching import run_features
    from lmworks.tasks.base import collate

    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = {dtype: lmworks.load(folder, runtime="onnx", dtype=dtype) for dtype in DTYPES}
    prepared = ours["fp32"].prepared
    assert prepared is not None
    features = prepared.encode(texts)
    order = sorted(range(len(features)), key=lambda row: len(features[row]))

    def run_peer(rows: list[int], size: int) -> Answers:
        found = np.empty((len(rows), 2))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = collate([features[row] for row in part], pad_id=0)
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}
                found[part] = peer(**tensors).logits.numpy()
        return found

    def run_ours(predictor: Any) -> Answers:
        return np.stack(run_features(predictor.runtime, features, output="logits"))

    runs: dict[str, Callable[[], Answers]] = {
        **{dtype: lambda p=predictor: run_ours(p) for dtype, predictor in ours.items()},
        "as it comes": lambda: run_peer(list(range(len(features))), TEXTS),
        "sorted by length, batches of 8": lambda: run_peer(order, 8),
    }  # fmt: skip
    return compare(f"graph of MiniLM's size, {len(features)} ragged real texts", runs, RAGGED_ROUNDS)


def compare(what: str, runs: dict[str, Callable[[], Answers]], rounds: int) -> list[dict[str, Any]]:
    """Return the rows: each dtype against each way of the peer; the target is against the last."""
    times, answers = alternate(runs, rounds, warm_up=3)
    peers = [name for name in runs if name not in DTYPES]
    reference = answers[peers[0]]
    if not np.abs(answers["fp32"] - reference).max() <= CLOSE:
        raise SystemExit(f"{what}: our float32 answers differ from the peer's")
    rows = []
    for dtype in DTYPES:
        apart = np.abs(answers[dtype] - reference).max()
        for peer in peers:
            ratio = statistics.median(b / a for a, b in zip(times[dtype], times[peer], strict=True))
            rows.append({
                "what": f"{what}, {dtype} (peer: transformers fp32, {peer}; from its fp32: {apart:.0e})",
                "ours": statistics.median(times[dtype]), "peer": statistics.median(times[peer]), "unit": "s",
                "ratio": ratio, "target": TARGETS[dtype] if peer == peers[-1] else None,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
