"""What a run says for itself: its facts, its scores beside the referee's, its curve, samples and certificate."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks import __version__
from lmworks.base.chart import Chart
from lmworks.base.report import Cell, Report, Table, counted

if TYPE_CHECKING:
    from lmworks.verbs.run import Trained
    from lmworks.verbs.settings import Settings

ADDRESS = "http://127.0.0.1:8000/"  # where `lmworks serve` listens unless it is told otherwise
PACKAGES = ("torch", "onnx", "onnxruntime", "tokenizers", "safetensors", "numpy")


def make_report(trained: Trained, out: Path, certificate: dict[str, Any] | None = None) -> Report:
    """Return the report of a run, with its certificate if it was published."""
    values = make_values(trained, out)
    tables = [score_table(trained), network_table(trained)]
    notes = make_notes(trained)
    if certificate is not None:
        values["verified"] = certificate["passed"]
        values["certificate"] = certificate["runtimes"]
        tables.append(certificate_table(certificate))
        notes += certificate["problems"]
        notes.append(f"Open the page: lmworks serve {out}, then {ADDRESS}")
    size = trained.corpus.train_bytes / 1e6
    return Report(
        f"{trained.corpus.name}: {trained.parameters:,} parameters from {size:.2f} MB of text",
        values,
        tables=tuple(tables),
        charts=(loss_chart(trained),),
        texts=tuple((f'Sample after "{prompt}"', prompt + text) for prompt, text in trained.samples),
        notes=tuple(notes),
    )


def make_values(trained: Trained, out: Path) -> dict[str, Any]:
    """Return what `--json` prints."""
    scores, result = trained.scores, trained.result
    return {
        "out": str(out),
        "corpus": trained.corpus.name,
        "parameters": trained.parameters,
        "vocab_size": trained.tokenizer.vocab_size,
        "train_bytes": trained.corpus.train_bytes,
        "validation_bytes": trained.corpus.validation_bytes,
        "validation_tokens": scores.validation_tokens,
        "validation_loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        "next_token_accuracy": scores.next_token_accuracy,
        "ngram_perplexity": scores.ngram_perplexity,
        "ngram_bits_per_byte": scores.ngram_bits_per_byte,
        "mixture_bits_per_byte": scores.mixture_bits_per_byte,
        "mixture_weight": scores.mixture_weight,
        "entropy_bits_per_byte": trained.floor,
        "steps": result.steps,
        "best_step": result.best_step,
        "train_seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second),
        "dtype": result.dtype,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in trained.samples],
        "settings": trained.settings.to_dict(),
    }


def facts(trained: Trained) -> dict[str, Any]:
    """Return what the receipt keeps: what the model was made from, and how well it did."""
    values = make_values(trained, Path())
    kept = ("corpus", "parameters", "perplexity", "bits_per_byte", "ngram_bits_per_byte", "steps", "best_step", "dtype")
    return {
        "data_sha256": trained.corpus.sha256,
        "seed": trained.settings.seed,
        "settings": trained.settings.to_dict(),
        "scores": {name: values[name] for name in kept},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that decides the result."""
    found = {"lmworks": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def score_table(trained: Trained) -> Table:
    """Return the network beside the referee, the mixture and the floor."""
    scores = trained.scores
    rows: list[tuple[Cell, ...]] = [
        ("this network", scores.perplexity, scores.bits_per_byte),
        ("modified Kneser-Ney, order 5", scores.ngram_perplexity, scores.ngram_bits_per_byte),
        (
            f"mixture of both ({scores.mixture_weight:.0%} network)",
            scores.mixture_perplexity,
            scores.mixture_bits_per_byte,
        ),
    ]
    if trained.floor is not None:
        rows.append(("exact entropy of the language", None, trained.floor))
    return Table("On held-out text", ("model", "perplexity per token", "bits per byte"), tuple(rows))


def network_table(trained: Trained) -> Table:
    """Return the facts of the network and its training."""
    s, result = trained.settings, trained.result
    rows: list[tuple[Cell, ...]] = [
        ("architecture", describe(s)),
        ("parameters", f"{trained.parameters:,}"),
        ("tokenizer", f"{s.tokenizer}, {trained.tokenizer.vocab_size:,} tokens"),
        (
            "training",
            f"{counted(result.steps, 'step')} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s",
        ),
        ("precision while training", result.dtype),
        ("next-token accuracy", f"{trained.scores.next_token_accuracy:.1%}"),
    ]
    return Table("The network", ("what", "value"), tuple(rows))


def certificate_table(certificate: dict[str, Any]) -> Table:
    """Return one row for each runtime and dtype."""
    rows: list[tuple[Cell, ...]] = []
    for runtime, dtypes in certificate["runtimes"].items():
        for dtype, cell in dtypes.items():
            if "skipped" in cell:
                rows.append((runtime, dtype, *[None] * 4, f"skipped: {cell['skipped']}"))
                continue
            equal, checked = cell["tokens_equal"]
            verdict = "passed" if cell["passed"] else "FAILED"
            gaps = (cell["max_abs_diff"], cell["rms_diff"], cell["tolerance"])
            rows.append((runtime, dtype, f"{equal} of {checked}", *gaps, verdict))
    columns = ("runtime", "dtype", "tokens equal", "largest logit difference", "root mean square", "allowed", "verdict")
    return Table("The same answers as torch fp32", columns, tuple(rows))


def loss_chart(trained: Trained) -> Chart:
    """Return training and validation loss over steps, with the referee as a level line."""
    history = trained.result.history
    train = tuple((float(step), loss) for step, loss in history.train)
    validation = tuple((float(step), loss) for step, loss in history.validation)
    series: list[tuple[str, tuple[tuple[float, float], ...]]] = [("training", train), ("validation", validation)]
    if validation:
        level = trained.scores.ngram_loss
        series.append(("Kneser-Ney", ((0.0, level), (validation[-1][0], level))))
    return Chart("Loss while training", "step", "nats per token", tuple(series))


def make_notes(trained: Trained) -> list[str]:
    """Say in sentences who predicts better and what more training would bring."""
    scores = trained.scores
    ours, theirs, both = scores.bits_per_byte, scores.ngram_bits_per_byte, scores.mixture_bits_per_byte
    notes = []
    if ours is None or theirs is None:
        return ["Bits per byte is not defined: the tokenizer does not know every character of the held-out text."]
    if ours < theirs:
        notes.append(
            f"The network predicts this text better than the 5-gram: {ours:.3f} against {theirs:.3f} bits per byte."
        )
    else:
        notes.append(
            f"The 5-gram predicts this text better than the network: {theirs:.3f} against {ours:.3f} bits per byte. "
            "That is usual for minutes of training on little text."
        )
    if both is not None and both < min(ours, theirs):
        notes.append(f"Mixed, they reach {both:.3f}: each knows something that the other does not.")
    gain = recent_gain(trained)
    if gain is not None and gain > 0.005:
        notes.append(
            f"In the last fifth of training the validation loss still fell by {gain:.3f} nats per token: "
            "more --steps, or a larger --size, would bring it down further."
        )
    elif trained.result.best_step < trained.result.steps:
        notes.append(
            f"The best validation was at step {trained.result.best_step:,}; later steps overfitted and were dropped."
        )
    return notes


def recent_gain(trained: Trained) -> float | None:
    """Return by how much the validation loss fell in the last fifth of the steps."""
    validation = trained.result.history.validation
    early = [loss for step, loss in validation if step <= 0.8 * trained.result.steps]
    return early[-1] - validation[-1][1] if early and trained.result.steps else None


def describe(s: Settings) -> str:
    """Return the network in a few words."""
    size = f"{counted(s.layers or 0, 'layer')}, {s.hidden_size} wide"
    if s.arch == "transformer":
        return f"{s.family}, {size}, {s.heads} heads, context {s.context}"
    return f"{s.arch}, {size}, embedding {s.embedding_size}, context {s.window or s.context}"
