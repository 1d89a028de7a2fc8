"""N-grams, feed-forward, RNN, LSTM, GRU and Transformer on the same tokens, in one table.

    python benchmarks/language_models.py OUT [--steps 1000] [--parameters 1000000] [--vocab 2048] [--tiny]

LMWORKS_DATA names the data. Writes OUT/table.md, OUT/results.json and OUT/samples.md. Trains on WikiText-2's validation
text and scores its test text: every line that is not blank is a document, its end counted, so that all models predict
the same tokens, and bits per byte count a line's end as one byte. The networks have as nearly the same number of
parameters as their width allows, the same batches and steps, and each the rate that serves it best on held-out text.
First of all the LSTM of the book: embedding 50, hidden 100, five sentences, ten epochs.

Shapes: N tokens of a stream, B rows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmworks.base.errors import InputError, TrainingError
from lmworks.base.files import write_json, write_text
from lmworks.base.types import Batch, Ints
from lmworks.evaluation.perplexity import bits_per_byte, perplexity, token_logprobs
from lmworks.models.checkpoint import save_model
from lmworks.models.heads import CausalLM
from lmworks.models.ngram import NgramModel
from lmworks.runtime.decoding import generate
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tokens.batch import make_stream
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer
from lmworks.training.data import TokenWindows
from lmworks.training.objectives import CausalLoss
from lmworks.training.train_config import TrainConfig
from lmworks.training.trainer import Trainer
from lmworks.verbs.run import make_network
from lmworks.verbs.settings import Settings

ARCHS = ("feedforward", "rnn", "lstm", "gru", "transformer")
SMOOTHINGS = ("laplace", "good-turing", "kneser-ney", "modified-kneser-ney")
BOOK = (
    "the cat sat on the mat", "the dog sat on the rug", "the cat chased the dog", "the dog chased the cat",
    "the cat and the dog sat on the rug",
)  # fmt: skip
PROMPTS = ("The first", "In 2005 ,", "He was")
CONTEXT, BATCH, EPOCHS = 128, 16, 10
RATES, START = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 3


class Sentences:
    """Every sentence once an epoch, one a step: labels are the next word, the last the sentence's end."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def batch(self, step: int) -> Batch:
        """Return one sentence: input_ids and labels (1, T)."""
        row = np.array([self.rows[step % len(self.rows)]])
        return {"input_ids": row[:, :-1], "labels": row[:, 1:]}

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Nothing is held out of five sentences."""
        return iter(())

    def fingerprint(self) -> str:
        """Return what decides the batches."""
        return str(self.rows)


def book_lstm(out: Path) -> dict[str, Any]:
    """Train the LSTM of the book; return its perplexity on what it was trained on, token-weighted, per epoch."""
    words = sorted({word for line in BOOK for word in line.split()})
    ids = {word: i + 1 for i, word in enumerate(words)}  # 0 begins and ends
    rows = [[0, *(ids[word] for word in line.split()), 0] for line in BOOK]
    settings = Settings(arch="lstm", hidden_size=100, embedding_size=50, layers=1, context=16)
    model = CausalLM(make_network(settings, vocab_size=len(ids) + 1, eos_token_id=0), seed=0)
    config = TrainConfig(
        steps=EPOCHS * len(rows), lr=1e-2, min_lr=1e-2, warmup=1, schedule="constant", weight_decay=0.0, dtype="fp32",
        eval_every=EPOCHS * len(rows), compile="never", seed=0,
    )  # fmt: skip
    Trainer(model, objective=CausalLoss(), data=Sentences(rows), config=config, folder=out / "book").fit()
    logs = [json.loads(line) for line in (out / "book" / "metrics.jsonl").read_text().splitlines()]
    losses, sizes = [row["loss"] for row in logs if "loss" in row], [len(row) - 1 for row in rows]
    epochs = [
        perplexity(np.array([-np.average(losses[i : i + len(rows)], weights=sizes)]))
        for i in range(0, len(losses), len(rows))
    ]
    runtime, names = TorchRuntime(model), ["</s>", *words]
    logprobs = [token_logprobs(runtime, np.array(row), context=len(row)).logprobs for row in rows]
    logits, said = runtime.prefill([0], [[0, ids["the"]]]), ["the"]
    for _ in range(12):
        token = int(logits[0].argmax())
        if token == 0:
            break
        said.append(names[token])
        logits = runtime.step([0], [token])
    return {"perplexity_by_epoch": epochs, "perplexity": perplexity(np.concatenate(logprobs)), "says": " ".join(said),
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def fit_width(arch: str, vocab_size: int, wanted: int) -> Settings:
    """Return the settings of a network of about so many parameters: the nearest width."""

    def settings(width: int) -> Settings:
        own: dict[str, Any] = {"layers": 3, "heads": max(1, width // 32)}
        if arch != "transformer":
            own = {"layers": 1 if arch == "feedforward" else 2, "embedding_size": width // 2, "window": 8}
        return Settings(arch=arch, hidden_size=width, context=CONTEXT, **own)  # type: ignore[arg-type]

    def size(width: int) -> int:
        network = CausalLM(make_network(settings(width), vocab_size=vocab_size), seed=None)
        return sum(p.numel() for p in network.parameters())

    step = 32 if arch == "transformer" else 4
    return settings(min(range(32, 1024, step), key=lambda width: abs(size(width) - wanted)))


def train_network(
    arch: str, train: Ints, held: Ints, tokenizer: Tokenizer, out: Path, args: Any
) -> tuple[CausalLM, dict[float, float]]:
    """Train one network on the stream; leave the best in OUT/arch, where the command line reads it.

    The rate goes up by half a power of ten while that helps on held-out text, or else down. What is trained already is
    not trained again. Return the best network, and the held-out loss by rate.
    """
    settings = fit_width(arch, tokenizer.vocab_size, args.parameters)
    eos = tokenizer.eos_id
    shape = make_network(
        settings, vocab_size=tokenizer.vocab_size, bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_id
    )
    every, losses = max(1, args.steps // 10), {}
    best = CausalLM(shape, seed=0)

    def improves(lr: float) -> bool:
        nonlocal best
        model = CausalLM(shape, seed=0)
        data = TokenWindows(train, held, context=CONTEXT, batch_size=args.batch, seed=0)
        config = TrainConfig(
            steps=args.steps, lr=lr, min_lr=lr / 10, warmup=min(100, every), eval_every=every, dtype="fp32",
            compile="never", weight_decay=0.1, max_grad_norm=1.0, seed=0,
        )  # fmt: skip
        folder = out / arch / f"rate-{lr:g}"
        trainer = Trainer(model, objective=CausalLoss(), data=data, config=config, folder=folder, stream=sys.stderr)
        before = min(losses.values(), default=float("inf"))
        try:
            losses[lr] = trainer.fit().best_loss
        except TrainingError:  # too fast: its numbers are no longer finite
            return False
        if losses[lr] < before:
            best = model
        return losses[lr] < before

    improves(RATES[START])
    up = START + 1
    while up < len(RATES) and improves(RATES[up]):
        up += 1
    down = START - 1
    while min(losses, key=losses.__getitem__) == min(losses) and down >= 0 and improves(RATES[down]):
        down -= 1
    save_model(best, out / arch)
    tokenizer.save(out / arch, max_length=CONTEXT)
    return best.eval(), losses


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    for name, value in (("steps", 1000), ("parameters", 1_000_000), ("vocab", 2048), ("batch", BATCH)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tiny", action="store_true", help="a few steps on a few lines, to see that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.parameters, args.vocab, args.batch = 3, 60_000, 400, 2
    args.out.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ["LMWORKS_DATA"]) / "wikitext-2"
    train_lines, test_lines = (
        [line.strip() for line in (data / name).read_text("utf-8").split("\n") if line.strip()]
        for name in ("valid.txt", "test.txt")
    )
    if args.tiny:
        train_lines, test_lines = train_lines[:60], test_lines[:10]
    tokenizer = train_tokenizer((f"{line}\n" for line in train_lines), kind="bpe", vocab_size=args.vocab)
    cut = len(train_lines) * 19 // 20  # what comes after chooses the best step of a network
    train, held, test = (make_stream(tokenizer, lines) for lines in (train_lines[:cut], train_lines[cut:], test_lines))
    everything = np.concatenate([train, held[1:]])
    size = sum(len(line.encode()) + 1 for line in test_lines)
    said = {name: str(value) for name, value in vars(args).items()}
    results: dict[str, Any] = {"book": book_lstm(args.out), "rows": [], "arguments": said}
    samples = []

    def note(name: str, parameters: int, logprobs: Any, seconds: float, texts: list[str], **more: Any) -> None:
        row = {"model": name, "parameters": parameters, "perplexity": perplexity(logprobs),
               "bits_per_byte": bits_per_byte(logprobs, size), "seconds": round(seconds, 1), **more}  # fmt: skip
        results["rows"].append(row)
        samples.append(f"## {name}\n\n" + "\n".join(f"- {text!r}" for text in texts))
        write_json(args.out / "results.json", results)

    for order in (1, 2, 3, 5):
        for smoothing in SMOOTHINGS:
            start = time.perf_counter()
            try:
                model = NgramModel.train(everything, order=order, vocab_size=tokenizer.vocab_size,
                                         eos_id=tokenizer.eos_id, smoothing=smoothing)  # type: ignore[arg-type]  # fmt: skip
            except InputError as error:  # Good-Turing of single tokens, which are all frequent here
                results.setdefault("refused", []).append(f"{order}-gram, {smoothing}: {error.what}")
                continue
            logprobs = model.logprobs(test)
            prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
            texts = [tokenizer.decode([*ids, *model.sample(max_tokens=40, prompt=ids, seed=0)]) for ids in prompts]
            numbers = sum(model.counts) + sum(model.counts[:-1])
            note(f"{order}-gram, {smoothing}", numbers, logprobs, time.perf_counter() - start, texts)
    for arch in ARCHS:
        start = time.perf_counter()
        network, losses = train_network(arch, train, held, tokenizer, args.out, args)
        runtime = TorchRuntime(network)
        logprobs = token_logprobs(runtime, test, context=CONTEXT).logprobs
        streams = [generate(runtime, tokenizer, p, sampling=Sampling(seed=0), max_tokens=40) for p in PROMPTS]
        texts = [prompt + "".join(stream) for prompt, stream in zip(PROMPTS, streams, strict=True)]
        note(arch, sum(p.numel() for p in network.parameters()), logprobs, time.perf_counter() - start, texts,
             rate=min(losses, key=losses.__getitem__), held_out=losses)  # fmt: skip
    lines = ["| model | parameters | rate | perplexity per token | bits per byte |", "|--|--:|--|--:|--:|"]
    lines += [f"| {r['model']} | {r['parameters']:,} | {r.get('rate', '')} | {r['perplexity']:.1f} | "
              f"{r['bits_per_byte']:.3f} |" for r in results["rows"]]  # fmt: skip
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    write_text(args.out / "samples.md", "\n\n".join(samples) + "\n")
    sys.stdout.write("\n".join(lines) + f"\n\nthe book's LSTM: {results['book']}\n")


if __name__ == "__main__":
    main()
