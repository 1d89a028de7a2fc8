"""Counts, Zipf's law and distances against scipy and brute force."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare

from lmworks.base.errors import InputError
from lmworks.text import statistics
from lmworks.text.frequencies import chi_squared, compare, divergence, fit_zipf
from lmworks.text.statistics import RULES, Distinct, Measures, measure, to_words
from lmworks.text.stream import Record


def measured(texts: list[str], *, batch: int = 200) -> Measures:
    total = Measures()
    for start in range(0, len(texts), batch):
        documents = [Record(str(i), text) for i, text in enumerate(texts[start : start + batch])]
        total.add(measure(documents, languages=False))
    return total


def test_counts_against_brute_force(data_folder: Path) -> None:
    text = (data_folder / "books" / "dubois.txt").read_text("utf-8")[:200_000]
    texts = ["", *text.split("\n\n"), "one", "one two"]
    found = measured(texts)
    words = [to_words(one) for one in texts]
    assert found.words == Counter(word for one in words for word in one)
    for n in (1, 2, 3):
        grams = [tuple(one[i : i + n]) for one in words for i in range(len(one) - n + 1)]
        assert (found.ngrams[n].count, found.ngrams[n].total) == (len(set(grams)), len(grams))
    lines = [line.strip() for one in texts for line in one.split("\n") if line.strip()]
    assert found.lines.share == len(set(lines)) / len(lines)
    assert found.sizes["words"] == sum(map(len, words)) and found.lengths == Counter(map(len, words))
    assert found.sizes["bytes"] == len("".join(texts).encode())


def test_different_hashes_are_estimated_in_flat_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LIMIT", 4096)
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**64, 200_000, np.uint64, endpoint=False)
    both, halves = Distinct(), [Distinct(), Distinct()]
    for i in range(40):
        drawn = rng.choice(pool, 10_000)
        both.add(drawn, len(drawn))
        halves[i % 2].add(drawn, len(drawn))
        assert len(both.kept) <= 4096
    true = len(pool) * (1 - np.exp(-2))  # seen in 400,000 draws
    assert abs(both.count / true - 1) < 0.08
    halves[0].add(halves[1].kept, halves[1].total, halves[1].level)
    assert halves[0].count == both.count and halves[0].total == 400_000


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.5])
def test_zipf_finds_the_exponent_of_draws(exponent: float) -> None:
    share = np.arange(1, 3001) ** -exponent
    counts = np.random.default_rng(0).multinomial(2_000_000, share / share.sum())
    counts = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(counts) + 1)

    def unlikeliness(s: float) -> float:
        return float(s * (counts * np.log(ranks)).sum() + counts.sum() * np.log((ranks**-s).sum()))

    found = fit_zipf(counts.tolist())
    assert found is not None
    assert abs(found.exponent - minimize_scalar(unlikeliness, bounds=(0.1, 3), method="bounded").x) < 1e-4
    assert abs(found.exponent - exponent) < 0.01 and found.r_squared > 0.97
    assert fit_zipf([5, 3]) is None


def test_distances_are_scipys() -> None:
    rng = np.random.default_rng(0)
    corpus, samples = rng.integers(0, 500, 60).astype(float), rng.integers(0, 40, (5, 60)).astype(float)
    assert np.allclose(divergence(samples, corpus), [jensenshannon(s, corpus, base=2) ** 2 for s in samples])
    assert divergence(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    sample = rng.multinomial(100_000, corpus / corpus.sum()).astype(float)
    often = corpus / corpus.sum() * 100_000 >= 5
    merged = [np.append(c[often], c[~often].sum()) for c in (sample, corpus / corpus.sum() * 100_000)]
    theirs = chisquare(*merged).statistic if merged[1][-1] else chisquare(sample[often], merged[1][:-1]).statistic
    assert np.isclose(chi_squared(sample, corpus, 100_000) * often.sum(), theirs)


def test_random_samples_are_representative_and_others_are_not(data_folder: Path) -> None:
    """Of random samples about one in twenty is called different: the level of the test."""
    books = {
        name: [to_words(p) for p in (data_folder / "books" / f"{name}.txt").read_text("utf-8")[:200_000].split("\n\n")]
        for name in ("darwin", "dubois")
    }
    documents = [words for one in books.values() for words in one if words]
    corpus = Counter(word for words in documents for word in words)
    rng = random.Random(0)
    refused = 0
    for seed in range(6):
        chosen = [words for words in documents if rng.random() < 0.1]
        fit = compare(Counter(w for words in chosen for w in words), corpus, documents, seed=seed)
        refused += not fit.is_representative
    assert refused <= 2
    biased = Counter(word for words in books["darwin"][:100] for word in words)
    fit = compare(biased, corpus, documents)
    assert not fit.is_representative and fit.jsd > fit.jsd_band[1] and fit.chi2 > fit.chi2_band[1]
    assert len(fit.unlike) == 10 and all(a != b for _, a, b in fit.unlike)
    with pytest.raises(InputError, match="too few documents"):
        compare(biased, corpus, documents[:5])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a few words", "fewer than 50 words"),
        ("ab " * 60, "mean word shorter than 3 or longer than 10 letters"),
        ("word # " * 60, "a # or … for fewer than ten words"),
        ("- some item\n" * 60, "over 90 % of lines begin with a bullet"),
        ("and so on...\n" * 60, "over 30 % of lines end in …"),
        ("12 345 word " * 60, "over 20 % of words without a letter"),
        ("the same line\n" * 60, "over 30 % of lines repeat another"),
        ("same pair " * 60, "one pair of words has over 20 % of the text"),
        ("three words more " * 60, "three words in a row have over 18 %"),
        ("four words and more " * 60, "four words in a row have over 16 %"),
    ],
)
def test_rules(text: str, rule: str, data_folder: Path) -> None:
    book = (data_folder / "books" / "bronte.txt").read_text("utf-8")[1000:6000]
    lines = [line for line in text.split("\n") if line.strip()]
    assert RULES[rule](to_words(text), lines)
    assert not RULES[rule](to_words(book), [line for line in book.split("\n") if line.strip()])
