"""The strided definition against one forward pass a token, and the cross-fitted mixture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.types import Batch, Ints
from lmworks.evaluation.perplexity import bits_per_byte, fit_weight, mixture, perplexity, token_logprobs
from lmworks.models.ngram import NgramModel

VOCAB = 11


class Toy:
    """A causal model whose logits depend on every token of the window so far: a running sum of embeddings."""

    name, dtype, vocab_size, max_length = "toy", "fp32", VOCAB, 16
    turn = None

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        ids = batch["input_ids"]
        assert ids.shape[1] <= self.max_length
        assert batch["attention_mask"].all()
        self.shapes.append(ids.shape)
        return {"logits": np.cumsum(self.table[ids], axis=1) * 0.7}

    def prefill(self, slots: Any, input_ids: Any) -> Any:
        raise NotImplementedError

    def step(self, slots: Any, input_ids: Any) -> Any:
        raise NotImplementedError


def slow(model: Toy, stream: Ints, context: int, stride: int) -> tuple[list[float], list[bool]]:
    """Score token by token: the window of token t is the first one, or the first that reaches t."""
    logprobs, correct = [], []
    for t in range(1, len(stream)):
        start = 0 if t <= context else math.ceil((t - context) / stride) * stride
        logits = model.run(
            {"input_ids": stream[None, start:t].astype(np.int64), "attention_mask": np.ones((1, t - start), np.int64)}
        )["logits"][0, -1].astype(np.float64)
        assert t <= context or t - start > context - stride  # enough tokens before it
        logprobs.append(logits[stream[t]] - np.log(np.exp(logits).sum()))
        correct.append(bool(logits.argmax() == stream[t]))
    return logprobs, correct


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 13, 57, 58, 60, 61])
@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 8), (8, 1), (8, 3), (16, 5), (1, None)])
def test_every_token_is_scored_once_with_enough_context(length: int, context: int, stride: int | None) -> None:
    """C29: perplexity values disagree."""
    stream = np.random.default_rng(length).integers(0, VOCAB, length).astype(np.uint16)
    model = Toy()
    scores = token_logprobs(model, stream, context=context, stride=stride, batch_size=3)
    logprobs, correct = slow(model, stream, context, stride or max(1, context // 2))
    np.testing.assert_allclose(scores.logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert scores.correct.tolist() == correct
    if length > 1:
        assert scores.perplexity == pytest.approx(math.exp(-np.mean(logprobs)))
        assert scores.accuracy == np.mean(correct)


def test_memory_is_flat() -> None:
    """C27: evaluation exhausts RAM. The batches stay the same however long the text is."""
    model = Toy()
    token_logprobs(model, np.zeros(5000, np.uint16), context=16, batch_size=4)
    assert len(model.shapes) > 100
    assert max(rows * length for rows, length in model.shapes) == 4 * 16
    model.vocab_size = 1 << 22  # a wide vocabulary: one window at a time
    model.shapes.clear()
    token_logprobs(model, np.zeros(100, np.uint16), context=16)
    assert {rows for rows, _ in model.shapes} == {1}


def test_windows_that_do_not_fit_are_refused() -> None:
    for context, stride in ((17, None), (8, 9), (8, 0), (0, None)):
        with pytest.raises(InputError, match="do not fit"):
            token_logprobs(Toy(), np.zeros(30, np.uint16), context=context, stride=stride)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = Toy()
    model.table[3] = np.nan
    with pytest.raises(LmworksError, match="not finite"):
        token_logprobs(model, np.array([1, 3, 2, 4]), context=8)


def test_bits_per_byte() -> None:
    """C29: the only number that compares across tokenizers."""
    uniform = np.full(300, -math.log(256))
    assert bits_per_byte(uniform, 300) == pytest.approx(8)
    assert bits_per_byte(uniform, 600) == pytest.approx(4)
    assert bits_per_byte(uniform, None) is None
    assert perplexity(uniform) == pytest.approx(256)
    assert perplexity(np.array([-1e6])) == math.inf


def test_the_tokenizer_does_not_change_bits_per_byte_of_the_same_model() -> None:
    """A text in single letters and in pairs of letters, under a uniform distribution over texts of that length."""
    letters, pairs = np.full(1000, math.log(1 / 4)), np.full(500, math.log(1 / 16))
    assert bits_per_byte(letters, 1000) == pytest.approx(bits_per_byte(pairs, 1000))


def test_mixture_is_cross_fitted() -> None:
    rng = np.random.default_rng(1)
    n = 4000
    a, b = (np.log(rng.beta(2, 5, n)) for _ in range(2))
    mixed = mixture(a, b)
    grid = np.linspace(0.001, 0.999, 999)
    for half, other, weight in (
        (slice(0, n // 2), slice(n // 2, n), mixed.weights[0]),
        (slice(n // 2, n), slice(0, n // 2), mixed.weights[1]),
    ):
        likelihood = [np.log(w * np.exp(a[other]) + (1 - w) * np.exp(b[other])).mean() for w in grid]
        assert abs(weight - grid[int(np.argmax(likelihood))]) < 0.002
        np.testing.assert_allclose(
            mixed.logprobs[half], np.log(weight * np.exp(a[half]) + (1 - weight) * np.exp(b[half]))
        )
    assert mixed.weights[0] != mixed.weights[1]
    assert mixed.logprobs.mean() > max(a.mean(), b.mean())
    assert mixed.bits == pytest.approx(-mixed.logprobs.sum() / math.log(2))
    assert mixed.weight == np.mean(mixed.weights)


def test_mixture_at_its_edges() -> None:
    a, b = np.full(100, -1.0), np.full(100, -900.0)
    assert mixture(a, b).weight > 0.99
    assert mixture(b, a).weight < 0.01
    assert fit_weight(a[:0], b[:0]) == 0.5
    assert mixture(a[:1], b[:1]).logprobs.shape == (1,)
    with pytest.raises(InputError, match="different texts"):
        mixture(a, b[:50])


def test_mixing_with_a_worse_ngram_still_helps() -> None:
    stream = np.random.default_rng(2).integers(0, VOCAB, 3000) // 3
    stream[0] = 0
    ngram = NgramModel.train(stream, order=3, vocab_size=VOCAB, eos_id=0)
    toy = token_logprobs(Toy(), stream, context=8)
    ours = ngram.logprobs(stream)
    assert mixture(toy.logprobs, ours).logprobs.mean() >= max(toy.logprobs.mean(), ours.mean()) - 1e-3
