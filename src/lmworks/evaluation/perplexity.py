"""One definition of perplexity for every model, and of bits per byte, which alone compare across tokenizers.

A text is one stream `[eos] doc1 [eos] doc2 [eos] …`, read in windows of `context` tokens that begin every `stride`
tokens. Each token after the first is predicted exactly once: in the first window all of them, in each later window the
last `stride`, so that past the beginning a token always sees at least `context − stride` tokens before it.

    perplexity      exp(− mean of the natural log-probabilities of all tokens, each document's eos included)
    bits per byte   − sum of their base-2 log-probabilities / bytes of the documents in UTF-8

The eos tokens cost bits although no byte stands for them: knowing where a text ends is part of knowing the text. Bits
per byte are undefined (None) where the tokenizer loses something: what is not encoded would come for free.

Shapes: N tokens of a stream, B windows of a batch, T context, S tokens that a window scores, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.types import Floats, Ints
from lmworks.runtime.base import Runtime

Float64 = NDArray[np.float64]
LOGITS_AT_ONCE = 1 << 24  # numbers in the logits of one batch: 64 MB
EM_STEPS = 100


@dataclass(frozen=True)
class TokenScores:
    """What a model thinks of each token of `stream[1:]`: its natural log-probability, and whether it came first.

    `entropy` is what it expected: that of its distribution over all tokens, in nats, where it was asked for.
    """

    logprobs: Float64  # (N-1,)
    correct: NDArray[np.bool_]  # (N-1,)
    entropy: Float64 | None = None  # (N-1,)

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return perplexity(self.logprobs)

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the model's first choice."""
        return float(self.correct.mean())


@dataclass(frozen=True)
class Mixture:
    """Two models, interpolated: w·a + (1−w)·b, with a weight fitted on the other half of the text."""

    logprobs: Float64  # (N-1,)
    weights: tuple[float, float]  # of model a, in the first and in the second half

    @property
    def weight(self) -> float:
        """The average weight of model a."""
        return sum(self.weights) / 2

    @property
    def bits(self) -> float:
        """Bits that the mixture needs for the whole text."""
        return -float(self.logprobs.sum()) / math.log(2)


def token_logprobs(
    runtime: Runtime, stream: Ints, *, context: int, stride: int | None = None, batch_size: int | None = None,
    entropy: bool = False,
) -> TokenScores:  # fmt: skip
    """Score every token of `stream[1:]` in windows of `context`; `stride` is half of that unless given.

    Memory does not grow with the stream, but for its result. Raises InputError for a context that the model does not
    have, and LmworksError for logits that are not finite.
    """
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context <= runtime.max_length:
        raise InputError(
            "these windows do not fit the model",
            found=f"context {context}, stride {stride}",
            expected=f"1 ≤ stride ≤ context ≤ {runtime.max_length}",
        )
    batch_size = batch_size or max(1, LOGITS_AT_ONCE // (context * runtime.vocab_size))
    tokens = np.asarray(stream).astype(np.int64)  # (N,)
    count = len(tokens) - 1
    scores = TokenScores(np.empty(count), np.empty(count, np.bool_), np.empty(count) if entropy else None)
    for starts, length, scored in windows(len(tokens) - 1, context, stride, batch_size):
        rows = tokens[starts[:, None] + np.arange(length)]  # (B, T)
        logits = runtime.run({"input_ids": rows, "attention_mask": np.ones_like(rows)})["logits"]  # (B, T, V)
        places = starts[:, None] + np.arange(length - scored, length)  # (B, S) in the result
        scores.logprobs[places] = log_softmax_at(logits[:, length - scored :], tokens[places + 1])
        scores.correct[places] = logits[:, length - scored :].argmax(-1) == tokens[places + 1]
        if scores.entropy is not None:
            scores.entropy[places] = entropy_of(logits[:, length - scored :])
    if not np.isfinite(scores.logprobs).all():
        raise LmworksError("the model's logits are not finite", fix="train again with a lower learning rate")
    return scores


def windows(count: int, context: int, stride: int, batch_size: int) -> Iterator[tuple[Ints, int, int]]:
    """Yield (starts (B,), window length, tokens scored at its end) so that `count` tokens are scored once each."""
    if count <= context:
        if count > 0:
            yield np.array([0]), count, count
        return
    yield np.array([0]), context, context
    whole = (count - context) // stride
    starts = stride * np.arange(1, whole + 1)
    for i in range(0, whole, batch_size):
        yield starts[i : i + batch_size], context, stride
    rest = count - context - whole * stride
    if rest:
        yield np.array([stride * (whole + 1)]), context - stride + rest, rest


def log_softmax_at(logits: Floats, targets: Ints) -> Float64:
    """Return the log-probabilities of the targets (B, S) under logits (B, S, V)."""
    top = logits.max(-1)  # (B, S)
    total = np.exp(logits - top[..., None]).sum(-1, dtype=np.float64)  # (B, S)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]  # (B, S)
    result: Float64 = (chosen - top) - np.log(total)
    return result


def entropy_of(logits: Floats) -> Float64:
    """Return the entropy (B, S) of softmax(logits (B, S, V)), in nats: log Σ e^z − Σ p z."""
    z = np.maximum(logits - logits.max(-1, keepdims=True), -1e30)  # 0 times -inf has no value
    e = np.exp(z)
    total = e.sum(-1, dtype=np.float64)  # (B, S)
    result: Float64 = np.log(total) - np.einsum("...v,...v->...", e, z, dtype=np.float64) / total
    return result


def perplexity(logprobs: Floats) -> float:
    """Return exp(− mean) of natural log-probabilities; infinite where a float cannot hold it."""
    loss = -float(np.mean(logprobs))
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(logprobs: Floats, n_bytes: int | None) -> float | None:
    """Return the bits that natural log-probabilities cost for each byte; None where the tokenizer lost something."""
    return -float(np.sum(logprobs)) / math.log(2) / n_bytes if n_bytes else None


def mixture(a: Floats, b: Floats) -> Mixture:
    """Interpolate two models' log-probabilities of the same tokens; each half takes the weight fitted on the other."""
    if len(a) != len(b):
        raise InputError("the models scored different texts", found=f"{len(a)} and {len(b)} tokens")
    half = len(a) // 2
    weights = fit_weight(a[half:], b[half:]), fit_weight(a[:half], b[:half])
    w = np.where(np.arange(len(a)) < half, *weights)  # (N-1,)
    return Mixture(np.logaddexp(np.log(w) + a, np.log1p(-w) + b), weights)


def fit_weight(a: Floats, b: Floats) -> float:
    """Return the weight of `a` that makes these tokens likeliest, by expectation maximisation; 0.5 for no tokens."""
    w = 0.5
    for _ in range(EM_STEPS if len(a) else 0):
        odds = np.exp(np.clip(b - a, -600, 600)) * (1 - w) / w
        before, w = w, float(np.clip(np.mean(1 / (1 + odds)), 1e-9, 1 - 1e-9))
        if abs(w - before) < 1e-7:
            break
    return w
