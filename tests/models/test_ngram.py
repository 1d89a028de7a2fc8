"""Kneser-Ney against KenLM's perplexities, a slow reference from the paper's formulas, and NLTK."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nltk.lm import KneserNeyInterpolated
from nltk.util import everygrams

from lmworks.base.errors import InputError
from lmworks.base.types import Ints
from lmworks.models import ngram_smoothing as module
from lmworks.models.ngram import NgramModel
from lmworks.models.ngram_smoothing import FALLBACK

EOS, UNKNOWN = 0, 1
BLANKS = re.compile("[\0\t\n\r ]+")  # what KenLM takes for white space


def make_stream(*, seed: int, vocab_size: int, documents: int) -> Ints:
    """Random documents of skewed tokens in which each token depends on the one before; some are empty."""
    rng = np.random.default_rng(seed)
    tokens = [EOS]
    for _ in range(documents):
        for _ in range(rng.integers(0, 12)):
            tokens.append(1 + (tokens[-1] + int(rng.geometric(0.35))) % (vocab_size - 2))
        tokens.append(EOS)
    return np.array(tokens, np.uint16)


class SlowReference:
    """Modified Kneser-Ney, word for word from Chen & Goodman (1999), on Python dictionaries."""

    def __init__(self, stream: Ints, order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        grams: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
        ends = np.flatnonzero(stream == EOS).tolist()
        for start, end in pairwise(ends):
            sentence = ("<s>", *stream[start + 1 : end].tolist(), EOS)
            for k in range(1, order + 1):
                for i in range(len(sentence) - k + 1):
                    grams[k][sentence[i : i + k]] += 1
        del grams[1][("<s>",)]
        self.counts: dict[int, dict[tuple[int, ...], int]] = {order: dict(grams[order])}
        for k in range(order - 1, 0, -1):
            before: dict[tuple[int, ...], set[object]] = defaultdict(set)
            for gram in grams[k + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[k] = {g: c if g[0] == "<s>" else len(before[g]) for g, c in grams[k].items()}
        self.discounts = {k: self.find_discounts(self.counts[k].values()) for k in self.counts}

    @staticmethod
    def find_discounts(counts: Iterable[int]) -> tuple[float, float, float]:
        n1, n2, n3, n4 = (sum(c == i for c in counts) for i in (1, 2, 3, 4))
        if not n1 or not n2 or not n3:
            return FALLBACK
        y = n1 / (n1 + 2 * n2)
        return 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3

    def probability(self, word: int, history: tuple[object, ...]) -> float:
        k = len(history) + 1
        followers = {g[-1]: c for g, c in self.counts[k].items() if g[:-1] == history}
        lower = self.probability(word, history[1:]) if history else 1 / self.vocab_size
        if not followers:
            return lower
        d = (0.0, *self.discounts[k])
        total = sum(followers.values())
        gamma = sum(d[min(c, 3)] for c in followers.values()) / total
        count = followers.get(word, 0)
        return (count - d[min(count, 3)]) / total + gamma * lower

    def logprobs(self, stream: Ints) -> list[float]:
        result, history = [], ()
        for token, following in pairwise(stream.tolist()):
            history = ("<s>",) if token == EOS else (*history, token)
            recent = history[max(0, len(history) - self.order + 1) :] if self.order > 1 else ()
            result.append(math.log(self.probability(following, recent)))
        return result


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_formulas_of_the_paper(order: int, seed: int) -> None:
    vocab_size = 13
    train = make_stream(seed=seed, vocab_size=vocab_size, documents=120)
    held_out = make_stream(seed=seed + 100, vocab_size=vocab_size + 1, documents=15)  # with an unknown token
    model = NgramModel.train(train, order=order, vocab_size=vocab_size + 2, eos_id=EOS)
    slow = SlowReference(train, order, vocab_size + 2)
    np.testing.assert_allclose(model.discounts, [slow.discounts[k] for k in range(1, order + 1)], rtol=1e-12)
    np.testing.assert_allclose(model.logprobs(held_out), slow.logprobs(held_out), rtol=1e-10)
    np.testing.assert_allclose(model.logprobs(train), slow.logprobs(train), rtol=1e-10)
    assert model.counts[1:] == tuple(len(slow.counts[k]) for k in range(2, order + 1))
    assert model.order == order


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one_after_any_history(order: int) -> None:
    stream = make_stream(seed=1, vocab_size=30, documents=100)
    model = NgramModel.train(stream, order=order, vocab_size=33, eos_id=EOS)
    for history in ([], [EOS], [EOS, 5], [32, 31], [3, EOS], *(stream[i : i + 5].tolist() for i in range(40))):
        distribution = model.distribution(history)
        assert distribution.min() > 0
        assert abs(distribution.sum() - 1) < 1e-12
        scored = [model.logprobs(np.array([*history, w]))[-1] for w in range(33)] if history else []
        if scored:
            np.testing.assert_allclose(np.log(distribution), scored, rtol=1e-10)


def load_lines(data: bytes) -> list[list[str]]:
    lines = data.decode("utf-8", "replace").split("\n")
    return [[word for word in BLANKS.split(line) if word] for line in lines[: -1 if not lines[-1] else None]]


def perplexities(
    train: list[list[str]], test: list[list[str]], order: int, *, missing: Callable[[str], bool] = lambda word: False
) -> tuple[float, float, int, int]:
    """Return perplexity with and without unknown words, and how many of how many are unknown."""
    ids: dict[str, int] = {}
    stream, held_out = [EOS], [EOS]
    for line in train:
        stream += [ids.setdefault(word, len(ids) + 2) for word in line if not missing(word)] + [EOS]
    for line in test:
        held_out += [ids.get(word, UNKNOWN) for word in line] + [EOS]
    model = NgramModel.train(np.array(stream), order=order, vocab_size=len(ids) + 2, eos_id=EOS)
    logprobs = model.logprobs(np.array(held_out))
    known = np.array(held_out[1:]) != UNKNOWN
    return math.exp(-logprobs.mean()), math.exp(-logprobs[known].mean()), int((~known).sum()), len(known)


@pytest.mark.parametrize(
    ("order", "including", "excluding"),
    [(2, 687.1123, 337.4638), (3, 654.9973, 320.1231), (4, 649.9265, 317.8918), (5, 649.2370, 317.6404)],
)
def test_kenlm_on_wikitext(order: int, including: float, excluding: float, data_folder: Path) -> None:
    """Measured with lmplz --skip_symbols --discount_fallback and query; see the data folder's README."""
    train, test = (load_lines((data_folder / "wikitext-2" / name).read_bytes()) for name in ("valid.txt", "test.txt"))
    found = perplexities(train, test, order, missing=lambda word: word == "<unk>")
    assert found[2:] == (27_114, 245_569)
    assert found[:2] == pytest.approx((including, excluding), rel=1e-6)


def test_kenlm_with_the_unknown_word_as_a_word(data_folder: Path) -> None:
    train, test = (load_lines((data_folder / "wikitext-2" / name).read_bytes()) for name in ("valid.txt", "test.txt"))
    found = perplexities(train, test, 5)
    assert found[2:] == (11_896, 245_569)
    assert found[:2] == pytest.approx((366.1311, 263.4692), rel=1e-6)


def test_kenlm_on_books(data_folder: Path) -> None:
    train = load_lines((data_folder / "books" / "bronte.txt").read_bytes()[:3_000_000])
    found = perplexities(train, load_lines((data_folder / "books" / "botchan.txt").read_bytes()), 5)
    assert found[2:] == (5_504, 55_026)
    assert found[:2] == pytest.approx((914.7698, 435.5979), rel=1e-6)


def test_nltk_with_one_fixed_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK takes the same discount for every count and does not smooth its unigrams."""
    stream = make_stream(seed=5, vocab_size=12, documents=150)
    calls = iter([(1e-12,) * 3, (0.3,) * 3, (0.3,) * 3])
    monkeypatch.setattr(module, "find_discounts", lambda adjusted: next(calls))
    model = NgramModel.train(stream, order=3, vocab_size=12, eos_id=EOS)
    ends = np.flatnonzero(stream == EOS).tolist()
    sentences = [["<s>", *map(str, stream[a + 1 : b].tolist()), "0"] for a, b in pairwise(ends)]
    theirs = KneserNeyInterpolated(3, discount=0.3)
    theirs.fit([everygrams(s, max_len=3) for s in sentences], vocabulary_text=[w for s in sentences for w in s])
    seen = 0
    for a, b in pairwise(ends):
        logprobs = model.logprobs(stream[a : b + 1])
        sentence = ["<s>", *map(str, stream[a + 1 : b].tolist()), "0"]
        for i in range(2, len(sentence)):
            expected = theirs.score(sentence[i], sentence[i - 2 : i])
            assert math.exp(logprobs[i - 1]) == pytest.approx(expected, rel=1e-10)
            seen += 1
    assert seen > 400


def test_degenerate_counts_fall_back() -> None:
    model = NgramModel.train(np.array([0, 2, 3, 4, 0]), order=3, vocab_size=6, eos_id=EOS)
    assert model.discounts == (FALLBACK,) * 3  # every count is 1
    assert abs(model.distribution([2, 3]).sum() - 1) < 1e-12
    empty = NgramModel.train(np.array([0]), order=3, vocab_size=6, eos_id=EOS)
    np.testing.assert_allclose(empty.distribution([0]), 1 / 6)
    np.testing.assert_allclose(empty.logprobs(np.array([0, 3, 0])), -math.log(6))


def test_no_ngram_crosses_a_document() -> None:
    """Documents in another order, or as streams of their own, give the same model."""
    a, b = (make_stream(seed=seed, vocab_size=20, documents=60) for seed in (1, 2))
    held_out = make_stream(seed=3, vocab_size=20, documents=20)
    both = [
        NgramModel.train(streams, order=5, vocab_size=20, eos_id=EOS).logprobs(held_out)
        for streams in ([a, b], np.concatenate([b, a[1:]]))
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-12)


def test_samples_follow_the_distribution() -> None:
    stream = make_stream(seed=4, vocab_size=9, documents=200)
    model = NgramModel.train(stream, order=3, vocab_size=9, eos_id=EOS)
    first = Counter((model.sample(max_tokens=1, seed=seed) or [EOS])[0] for seed in range(1500))
    expected = model.distribution([EOS])
    for token in range(9):
        spread = math.sqrt(1500 * expected[token] * (1 - expected[token]))
        assert abs(first[token] - 1500 * expected[token]) < 5 * spread + 1
    sample = model.sample(max_tokens=50, prompt=[3, 4], seed=7)
    assert sample == model.sample(max_tokens=50, prompt=[3, 4], seed=7)
    assert EOS not in sample


def test_what_cannot_be_trained_or_scored_is_refused() -> None:
    with pytest.raises(InputError, match="begin with the end token"):
        NgramModel.train(np.array([3, 0]), vocab_size=5, eos_id=EOS)
    with pytest.raises(InputError, match="outside the vocabulary"):
        NgramModel.train(np.array([0, 5, 0]), vocab_size=5, eos_id=EOS)
    with pytest.raises(InputError, match="ends documents"):
        NgramModel.train(np.array([0, 2, 0]), vocab_size=5, eos_id=None)
    with pytest.raises(InputError, match="outside the vocabulary"):
        NgramModel.train(np.array([0, 2, 0]), vocab_size=5, eos_id=EOS).logprobs(np.array([0, 9]))


@pytest.mark.slow
def test_two_million_tokens_are_quick() -> None:
    rng = np.random.default_rng(0)
    stream = rng.zipf(1.3, 2_000_000).clip(max=3999)
    stream[rng.random(len(stream)) < 0.01] = EOS
    stream[0] = EOS
    start = time.perf_counter()
    model = NgramModel.train(stream, order=5, vocab_size=4000, eos_id=EOS)
    assert time.perf_counter() - start < 20
    start = time.perf_counter()
    model.logprobs(stream[:200_000])
    assert time.perf_counter() - start < 3
