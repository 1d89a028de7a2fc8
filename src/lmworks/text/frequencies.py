"""How often words occur: Zipf's law, and whether a sample could be a random part of a corpus.

    Zipf       P(rank r) = r^−s / Σ_{k ≤ V} k^−s        s by maximum likelihood: E_s[ln r] equals the mean of ln r
    JSD        H((p + q) / 2) − (H(p) + H(q)) / 2, in bits: 0 for equal distributions, 1 for such that share nothing
    χ²         Σ (observed − expected)² / expected over the corpus's most frequent words and the rest

Words come in documents, so that a table's χ² would call any real sample different. Both are therefore judged by random
samples: documents of the corpus, drawn without return, each with the chance that makes as many words as the sample has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError

TOP = 5000  # words that are told apart; all others are one bin
DRAWS = 200
LEAST_EXPECTED = 5.0  # of a word that χ² counts on its own
LEAST_DOCUMENTS = 20
FLOATS = NDArray[np.float64]


@dataclass(frozen=True)
class Zipf:
    """The exponent s, and R² between the logarithms of counts and of the law's, by rank."""

    exponent: float
    r_squared: float


def fit_zipf(counts: Iterable[int]) -> Zipf | None:
    """Return the law that fits counts of words best; None for fewer than three words."""
    frequency = np.sort(np.fromiter(counts, np.float64))[::-1]
    if len(frequency) < 3:
        return None
    log_rank = np.log(np.arange(1, len(frequency) + 1))
    wanted = float(frequency @ log_rank / frequency.sum())
    low, high = -1.0, 20.0
    for _ in range(60):  # E_s[ln r] falls as s grows
        middle = (low + high) / 2
        weights = np.exp(-middle * log_rank)
        low, high = (middle, high) if weights @ log_rank / weights.sum() > wanted else (low, middle)
    exponent = (low + high) / 2
    log_frequency = np.log(frequency)
    weights = np.exp(-exponent * log_rank)
    log_fit = np.log(frequency.sum()) - exponent * log_rank - np.log(weights.sum())
    spread = ((log_frequency - log_frequency.mean()) ** 2).sum()
    rest = ((log_frequency - log_fit) ** 2).sum()
    return Zipf(exponent, float(1 - rest / spread) if spread else 1.0)


def divergence(p: FLOATS, q: FLOATS) -> FLOATS:
    """Return the Jensen-Shannon divergence in bits of counts p [..., bins] and q [bins], along the last axis."""
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1)
    q = q / max(q.sum(), 1)
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def entropy(p: FLOATS) -> FLOATS:
    """Return the entropy in bits along the last axis."""
    logs = np.log2(np.where(p > 0, p, 1.0))
    found: FLOATS = -(p * logs).sum(axis=-1)
    return found


def chi_squared(observed: FLOATS, corpus: FLOATS, words: float) -> FLOATS:
    """Return χ² a degree of freedom of counts [..., bins] against a corpus [bins]; rare ones are one bin."""
    share = corpus / corpus.sum()
    total = observed.sum(axis=-1, keepdims=True)
    often = share * words >= LEAST_EXPECTED
    expected = np.concatenate([share[often], [share[~often].sum()]]) * total
    seen = np.concatenate([observed[..., often], observed[..., ~often].sum(axis=-1, keepdims=True)], axis=-1)
    found: FLOATS = ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum(axis=-1) / max(1, int(often.sum()))
    return found


@dataclass(frozen=True)
class Fit:
    """A sample's distance from a corpus, the band of 95 % of random samples, and the chance of such a distance."""

    words: int
    jsd: float
    jsd_band: tuple[float, float]
    jsd_p: float
    chi2: float
    chi2_band: tuple[float, float]
    chi2_p: float
    unlike: tuple[tuple[str, float, float], ...]  # word, times in a million words of the sample, of the corpus

    @property
    def is_representative(self) -> bool:
        """Say whether at least one in twenty random samples is as far from the corpus."""
        return self.jsd_p >= 0.05


def compare(sample: Counter[str], corpus: Counter[str], documents: Iterable[Sequence[str]], *, seed: int = 0) -> Fit:
    """Compare the words of a sample with those of a corpus whose documents (as words) are read once more."""
    top = [word for word, _ in corpus.most_common(TOP)]
    place = {word: i for i, word in enumerate(top)}
    chance = min(1.0, sample.total() / corpus.total())
    rng = np.random.default_rng(seed)
    drawn = np.zeros((DRAWS, len(top) + 1))
    count = 0
    for words in documents:
        count += 1
        chosen = np.flatnonzero(rng.random(DRAWS) < chance)
        if words and len(chosen):
            bins, times = np.unique([place.get(word, len(top)) for word in words], return_counts=True)
            drawn[np.ix_(chosen, bins)] += times
    if count < LEAST_DOCUMENTS:
        raise InputError(
            "too few documents to say what a random sample looks like",
            found=str(count),
            expected=f"at least {LEAST_DOCUMENTS}",
            fix="--unit paragraph or line",
        )
    whole, part = to_bins(corpus, top), to_bins(sample, top)
    jsd, jsd_drawn = float(divergence(part, whole)), divergence(drawn, whole)
    chi2, chi2_drawn = (chi_squared(counts, whole, part.sum()) for counts in (part, drawn))
    p, q = part / part.sum(), whole / whole.sum()
    mean = (p + q) / 2
    parts = xlog(p, mean) + xlog(q, mean)
    unlike = [(top[i], 1e6 * float(p[i]), 1e6 * float(q[i])) for i in np.argsort(-parts[:-1])[:10].tolist()]
    return Fit(sample.total(), jsd, band(jsd_drawn), rarity(jsd, jsd_drawn), float(chi2), band(chi2_drawn),
               rarity(float(chi2), chi2_drawn), tuple(unlike))  # fmt: skip


def to_bins(counts: Counter[str], top: Sequence[str]) -> FLOATS:
    """Return how often each word of a list occurs, and at the end all others together, [len(top) + 1]."""
    known = [float(counts[word]) for word in top]
    return np.array([*known, counts.total() - sum(known)])


def xlog(p: FLOATS, mean: FLOATS) -> FLOATS:
    """Return p · log2(p / mean), 0 where p is."""
    found: FLOATS = p * np.log2(np.where(p > 0, p, 1.0) / np.where(p > 0, mean, 1.0))
    return found


def band(drawn: FLOATS) -> tuple[float, float]:
    """Return what 95 % of random samples lie between."""
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return low, high


def rarity(found: float, drawn: FLOATS) -> float:
    """Return the chance that a random sample is as far from the corpus."""
    return (1 + int((drawn >= found).sum())) / (1 + len(drawn))
