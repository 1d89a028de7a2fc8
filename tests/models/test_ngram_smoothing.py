"""Every smoothing against NLTK, a hand-computed example, and the axioms of probability."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from nltk.lm import MLE, KneserNeyInterpolated, Laplace
from nltk.lm.preprocessing import pad_both_ends
from nltk.probability import FreqDist, SimpleGoodTuringProbDist
from nltk.util import everygrams

from lmworks.base.errors import InputError
from lmworks.base.types import Ints
from lmworks.models.ngram import NgramModel
from lmworks.models.ngram_prune import keep, prune
from lmworks.models.ngram_smoothing import good_turing

EOS, V = 0, 14


def make_stream(seed: int, documents: int) -> Ints:
    """Random sentences of skewed tokens in which each token depends on the one before; id 1 never occurs."""
    rng = np.random.default_rng(seed)
    tokens = [EOS]
    for _ in range(documents):
        for _ in range(rng.integers(1, 10)):
            tokens.append(2 + (tokens[-1] + int(rng.geometric(0.4))) % (V - 2))
        tokens.append(EOS)
    return np.array(tokens)


def sentences(stream: Ints) -> list[list[str]]:
    ends = np.flatnonzero(stream == EOS).tolist()
    return [[str(t) for t in stream[a + 1 : b]] for a, b in pairwise(ends)]


def nltk_scores(model: object, order: int, train: Ints, held_out: Ints, *, right: int) -> list[float]:
    """NLTK's probability of every token and every end, after sentences padded as its own pipeline pads them.

    Its vocabulary is what can be predicted: <s> would make V one too many, so it is left to be <UNK>, as a context.
    """
    padded = [[*list(pad_both_ends(s, n=order))[: order - 1 + len(s)], *["</s>"] * right] for s in sentences(train)]
    vocabulary = [str(t) for t in range(2, V)] * 2 + ["</s>"] * 2
    model.fit([everygrams(s, max_len=order) for s in padded], vocabulary_text=vocabulary)  # type: ignore[attr-defined]
    found = []
    for words in sentences(held_out):
        row = [*["<s>"] * (order - 1), *words, "</s>"]
        found += [model.score(row[i], row[i - order + 1 : i]) for i in range(order - 1, len(row))]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("smoothing", "theirs"), [("mle", MLE), ("laplace", Laplace)])
def test_counts_are_nltks(smoothing: str, theirs: type, order: int) -> None:
    train, held_out = make_stream(0, 60), make_stream(1, 40)
    model = NgramModel.train(train, order=order, vocab_size=V, eos_id=EOS, smoothing=smoothing)  # type: ignore[arg-type]
    expected = nltk_scores(theirs(order), order, train, held_out, right=max(1, order - 1))
    if order == 1:  # NLTK counts every end that it padded with, ours one a sentence
        expected = nltk_scores(theirs(order), order, train, held_out, right=1)
    found = np.exp(model.logprobs(held_out))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-300)
    assert order == 1 or (np.array(expected) == 0).any() == (smoothing == "mle")


def test_interpolated_kneser_ney_is_nltks() -> None:
    train, held_out = make_stream(2, 80), make_stream(3, 40)
    model = NgramModel.train(train, order=2, vocab_size=V, eos_id=EOS, smoothing="kneser-ney", discount=0.1)
    expected = nltk_scores(KneserNeyInterpolated(2), 2, train, held_out, right=1)
    np.testing.assert_allclose(np.exp(model.logprobs(held_out)), expected, rtol=1e-10)
    own = NgramModel.train(train, order=2, vocab_size=V, eos_id=EOS, smoothing="kneser-ney")
    assert np.exp(own.unigrams[1]) > 0  # of the unknown word, which NLTK gives nothing
    counts = np.unique(train[:-1] * V + train[1:], return_counts=True)[1]
    n1, n2 = (counts == 1).sum(), (counts == 2).sum()
    assert own.discounts[1][0] == pytest.approx(n1 / (n1 + 2 * n2), rel=1e-12)


def test_good_turing_by_hand() -> None:
    """120 once, 40 twice, 24 three times, 13 four times, 3 seven times: r* = (r + 1) n_{r+1} / n_r to the switch."""
    counts = np.repeat([1, 2, 3, 4, 7], [120, 40, 24, 13, 3])
    r, adjusted = good_turing(counts)
    assert r.tolist() == [1, 2, 3, 4, 7]
    assert adjusted[0] == pytest.approx(2 * 40 / 120)  # Turing's own, 0.667; the line says 0.44 and is too far off
    assert adjusted[-1] < 7  # n_8 = 0: the line alone says something
    rows = np.array([[1, 120.0], [2, 40.0], [3, 24.0], [4, 13 * 2 / (7 - 3)], [7, 3 * 2 / (10 - 4)]])  # Z_r
    slope = np.polyfit(np.log(rows[:, 0]), np.log(rows[:, 1]), 1)[0]
    assert adjusted[-1] == pytest.approx(8 * (8 / 7) ** slope, rel=1e-9)


def test_good_turing_is_nltks() -> None:
    rng = np.random.default_rng(0)
    for exponent in (1.7, 2.0, 2.6):
        counts = rng.zipf(exponent, 1500).clip(max=3000)
        theirs = SimpleGoodTuringProbDist(FreqDist({str(i): int(c) for i, c in enumerate(counts)}), bins=2000)
        r, adjusted = good_turing(counts)
        expected = [theirs._prob_measure(int(count)) * counts.sum() for count in r]
        np.testing.assert_allclose(adjusted, expected, rtol=1e-9)
        words = np.concatenate([[EOS], rng.permutation(np.repeat(np.arange(1, 1501), counts)), [EOS]])
        model = NgramModel.train(words, order=1, vocab_size=2001, eos_id=EOS, smoothing="good-turing")
        with_end = SimpleGoodTuringProbDist(FreqDist({str(i): int(c) for i, c in enumerate([*counts, 1])}), bins=2001)
        some = [int(counts.argmax()), int(counts.argmin()), 5]
        found = np.exp(model.unigrams[[1 + i for i in some]])
        np.testing.assert_allclose(found, [with_end.prob(str(i)) for i in some], rtol=1e-9)
        assert np.exp(model.unigrams[2000]) == pytest.approx(with_end.prob("never"), rel=1e-9)


def katz_stream() -> Ints:
    rng = np.random.default_rng(4)
    tokens = [EOS]
    for _ in range(500):
        tokens += [*(2 + rng.zipf(1.5, rng.integers(2, 9)).clip(max=396)).tolist(), EOS]
    return np.array(tokens)


@pytest.mark.parametrize("smoothing", ["mle", "laplace", "good-turing", "kneser-ney", "modified-kneser-ney"])
def test_probabilities_sum_to_one_and_are_those_that_score(smoothing: str) -> None:
    stream = katz_stream()
    model = NgramModel.train(stream, order=3, vocab_size=400, eos_id=EOS, smoothing=smoothing)  # type: ignore[arg-type]
    for history in ([EOS], [EOS, 3], [3, 4], [7, 3], [399, 3], [3, 399], stream[40:42].tolist()):
        p = model.distribution(history)
        known = model.smoothing != "mle" or 399 not in history
        assert p.sum() == pytest.approx(1 if known else 0, abs=1e-9)
        for token in (0, 3, 4, 17, 399):
            with np.errstate(divide="ignore"):
                assert model.logprobs(np.array([*history, token]))[-1] == pytest.approx(np.log(p[token]), rel=1e-9)


def test_katz_keeps_what_good_turing_leaves_and_passes_the_rest_on() -> None:
    stream = katz_stream()
    model = NgramModel.train(stream, order=2, vocab_size=400, eos_id=EOS, smoothing="good-turing")
    pairs = stream[:-1] * 400 + stream[1:]
    keys, counts = np.unique(pairs, return_counts=True)
    r, adjusted = good_turing(counts)
    shares = {int(a): b / a for a, b in zip(r, adjusted, strict=True)}
    after = {int(k) % 400: int(c) for k, c in zip(keys, counts, strict=True) if k // 400 == 5}
    total = sum(after.values())
    p = model.distribution([5])
    seen = {token: shares[c] * c / total for token, c in after.items()}
    for token, expected in seen.items():
        assert p[token] == pytest.approx(min(expected, 1), rel=1e-9)
    unigrams = np.exp(model.unigrams)
    unseen = [t for t in range(400) if t not in seen]
    ratio = p[unseen] / unigrams[unseen]
    np.testing.assert_allclose(ratio, (1 - sum(seen.values())) / unigrams[unseen].sum(), rtol=1e-6)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_katz_loses_nothing_where_every_token_was_seen(order: int) -> None:
    chances = 1 / np.arange(1, 7) ** 1.5
    stream = np.random.default_rng(2).choice(6, 3000, p=chances / chances.sum())
    stream[0] = EOS
    model = NgramModel.train(stream, order=order, vocab_size=6, eos_id=EOS, smoothing="good-turing")
    for smaller in (model, prune(model, 1e-4)):
        for end in range(1, 300):
            history = stream[max(0, end - order) : end].tolist()
            assert smaller.distribution(history).sum() == pytest.approx(1, abs=1e-9)


def test_pruning_keeps_probabilities_and_their_sum() -> None:
    stream = katz_stream()
    model = NgramModel.train(stream, order=3, vocab_size=400, eos_id=EOS)
    sizes = []
    for smaller in (prune(model, 1e-5), prune(model, 1e-3), NgramModel.train(
        stream, order=3, vocab_size=400, eos_id=EOS, min_count=2
    )):  # fmt: skip
        sizes.append(sum(smaller.counts))
        assert sum(smaller.counts) < sum(model.counts)
        for history in ([EOS], [EOS, 3], [3, 4], [399, 3], stream[40:42].tolist()):
            assert smaller.distribution(history).sum() == pytest.approx(1, abs=1e-9)
    assert sizes[0] > sizes[1]
    whole = keep(model, [np.ones(len(level.keys), np.bool_) for level in model.levels])
    np.testing.assert_allclose(whole.logprobs(stream), model.logprobs(stream), rtol=1e-9)
    loss = [-m.logprobs(stream).mean() for m in (model, prune(model, 1e-5), prune(model, 1e-3))]
    assert loss[0] < loss[1] < loss[2] < loss[0] + 1


def test_too_little_text_says_what_to_do_instead() -> None:
    few = np.array([0, 2, 3, 2, 4, 0])
    with pytest.raises(InputError, match="too little text for Good-Turing") as caught:
        NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS, smoothing="good-turing")
    assert "--smoothing laplace" in caught.value.fix
    assert NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS).degenerate == (1, 2)
    with pytest.raises(InputError, match="no smoothing 'kneser'") as caught:
        NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS, smoothing="kneser")  # type: ignore[arg-type]
    assert "kneser-ney" in caught.value.fix
    with pytest.raises(InputError, match="discount"):
        NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS, smoothing="mle", discount=0.5)
    plain = NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS, smoothing="laplace")
    with pytest.raises(InputError, match="cannot be pruned"):
        prune(plain, 1e-3)
    assert math.isinf(NgramModel.train(few, order=2, vocab_size=6, eos_id=EOS, smoothing="mle").floor)
