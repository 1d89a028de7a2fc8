"""Smoothings: from counts to probabilities, each a model of the same form.

    mle                  c(hw) / c(h)                                         nothing for what was not seen
    laplace              (c(hw) + 1) / (c(h) + V)
    good-turing          (r*/r) · c(hw) / c(h), r = c(hw); what that frees goes to the shorter context (Katz 1987)
    kneser-ney           (a(hw) − D) / Σ_v a(hv) + γ(h) · p(w | h′)           one D an order (Ney et al. 1994)
    modified-kneser-ney  the same with three D, for counts of 1, 2 and more   (Chen & Goodman 1999, section 3)

h′ is h without its first token. a(hw) is how often hw occurs; in the lower orders it is in how many different contexts
hw occurs, but for what begins a document, which has no context. γ(h) is what the discounts freed. Kneser-Ney ends in
the uniform distribution over the vocabulary. The details are those of KenLM (Heafield et al. 2013).

r* is Gale and Sampson's "Good-Turing frequency estimation without tears" (1995): (r+1) n_{r+1} / n_r while that differs
from a line through log n_r, then the line. A single token has r* / N, and those never seen share n_1 / N.

Shapes: G n-grams of an order, V vocabulary, R different counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmworks.base.errors import InputError
from lmworks.models.ngram_counts import Counts, Float64, Int64

Smoothing = Literal["mle", "laplace", "good-turing", "kneser-ney", "modified-kneser-ney"]
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts give none, as in KenLM
SURE = 1.96  # standard deviations by which Turing's estimate must leave the line to be preferred
LEAST = 1e-12  # below this a remainder is rounding
LEFT = 1e-6  # of a context's probability is left for what was never seen, however the discounts come out


@dataclass(frozen=True)
class Level:
    """The n-grams of one order k ≥ 2."""

    keys: Int64  # (G,) sorted: context · V + token
    logprobs: Float64  # (G,) natural log of the probability
    backoff: Float64  # (G of the order below,) natural log of each context's weight for what it does not hold


@dataclass(frozen=True)
class Fitted:
    """What a smoothing made: `unigrams` (V,) natural log-probabilities, `levels` the orders from 2 up."""

    unigrams: Float64
    levels: tuple[Level, ...]
    discounts: tuple[tuple[float, ...], ...] = ()  # of each order
    degenerate: tuple[int, ...] = ()  # orders whose counts gave no discounts


def fit(counts: Counts, smoothing: Smoothing, discount: float | None) -> Fitted:
    """Smooth; `discount` replaces the estimated one of kneser-ney, as NLTK has it, which leaves single tokens as is."""
    if discount is not None and (smoothing != "kneser-ney" or not 0 < discount < 1):
        raise InputError("a discount of one's own is for kneser-ney", found=f"{discount} with {smoothing}",
                         expected="between 0 and 1, with kneser-ney")  # fmt: skip
    if smoothing == "kneser-ney":
        return kneser_ney(counts, find_discount if discount is None else lambda _: (discount,) * 3, discount is None)
    if smoothing == "modified-kneser-ney":
        return kneser_ney(counts, find_discounts, True)
    return katz(counts) if smoothing == "good-turing" else plain(counts, 1.0 if smoothing == "laplace" else 0.0)


def plain(counts: Counts, added: float) -> Fitted:
    """Add so much to every count: 0 is the maximum likelihood, 1 is Laplace. `backoff` is of each unseen token."""
    size = added * counts.vocab_size
    with np.errstate(divide="ignore", invalid="ignore"):
        total = counts.unigrams.sum() + size
        unigrams = np.log((counts.unigrams + added) / total) if total else np.full(counts.vocab_size, -np.inf)
        levels, below = [], counts.vocab_size
        for this in counts.tallies:
            context = this.keys // counts.vocab_size  # (G,)
            totals = np.bincount(context, this.counts, minlength=below) + size  # (G below,)
            unseen = np.log(added / totals) if added else np.full(below, -np.inf)  # (G below,)
            levels.append(Level(this.keys, np.log((this.counts + added) / totals[context]), unseen))
            below = len(this.keys)
    return Fitted(unigrams, tuple(levels))


def kneser_ney(counts: Counts, find: Callable[[Int64], tuple[float, float, float] | None], uniform: bool) -> Fitted:
    """Interpolate; `find` gives the discounts of an order, `uniform` whether single tokens are smoothed too."""
    V, tallies = counts.vocab_size, counts.tallies
    adjusted = np.bincount(tallies[0].keys % V, minlength=V) if tallies else counts.unigrams  # (V,) contexts of each
    cuts = find(adjusted) if uniform else (0.0, 0.0, 0.0)
    found = [cuts]
    taken = np.choose(np.minimum(adjusted, 3), [0.0, *(cuts or FALLBACK)])  # (V,)
    total = max(1, int(adjusted.sum()))
    freed = taken.sum() / total if adjusted.any() else 1.0
    below = (adjusted - taken) / total + freed / V  # (V,) probabilities of the order below
    with np.errstate(divide="ignore"):
        unigrams, levels = np.log(below), []
        for k, this in enumerate(tallies):
            if k + 1 < len(tallies):
                kinds = np.bincount(tallies[k + 1].suffix, minlength=len(this.keys))  # (G,) different tokens before it
                adjusted = np.where(this.initial, this.counts, kinds)
            else:
                adjusted = this.counts
            cuts = find(adjusted)
            found.append(cuts)
            taken = np.choose(np.minimum(adjusted, 3), [0.0, *(cuts or FALLBACK)])  # (G,)
            context = this.keys // V  # (G,)
            totals = np.bincount(context, adjusted, minlength=len(below))  # (G below,)
            freed = np.bincount(context, taken, minlength=len(below))
            gamma = np.where(totals > 0, freed / np.maximum(totals, 1), 1.0)  # (G below,)
            below = (adjusted - taken) / totals[context] + gamma[context] * below[this.suffix]  # (G,)
            levels.append(Level(this.keys, np.log(below), np.log(gamma)))
    degenerate = tuple(k for k, cuts in enumerate(found, 1) if cuts is None)
    return Fitted(unigrams, tuple(levels), tuple(cuts or FALLBACK for cuts in found), degenerate)


def find_discounts(adjusted: Int64) -> tuple[float, float, float] | None:
    """Return D for counts of 1, 2 and more, from how many n-grams have a count of 1, 2, 3, 4; None: there is none."""
    n = counts_of_counts(adjusted)
    if not n[1:4].all():
        return None
    y = n[1] / (n[1] + 2 * n[2])
    one, two, more = (float(i - (i + 1) * y * n[i + 1] / n[i]) for i in (1, 2, 3))
    return (one, two, more) if 0 < one <= 1 and 0 < two <= 2 and 0 < more <= 3 else None


def find_discount(adjusted: Int64) -> tuple[float, float, float] | None:
    """Return the one D of an order, n1 / (n1 + 2 n2), for every count; None: there is none."""
    n = counts_of_counts(adjusted)
    return (float(n[1] / (n[1] + 2 * n[2])),) * 3 if n[1] and n[2] else None


def counts_of_counts(adjusted: Int64) -> Float64:
    """Return how many n-grams have a count of 0, 1, 2, 3 and 4: (5,)."""
    return np.bincount(np.minimum(adjusted, 5), minlength=5)[:5].astype(np.float64)


def good_turing(counts: Int64, what: str = "the counts") -> tuple[Int64, Float64]:
    """Return the different counts r above 0 and their r*, (R,) each; `what` they are of, for the error.

    Raises InputError where a line through log n_r does not fall as it must.
    """
    r, n = np.unique(counts[counts > 0], return_counts=True)  # (R,) each
    slope, line = 0.0, np.zeros(1)
    if len(r) > 1:
        before, after = np.concatenate([[0], r[:-1]]), np.concatenate([r[1:], [2 * r[-1] - r[-2]]])
        z = 2.0 * n / (after - before)  # n_r, averaged over the gap in which it stands
        x, y = np.log(r), np.log(z)
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        line = (r + 1) * (1 + 1 / r) ** slope  # (R,)
    if slope >= -1 or r[0] != 1:
        raise InputError(
            f"there is too little text for Good-Turing: {what} do not thin out",
            found=", ".join(f"{many} that occur {count} times" for count, many in zip(r[:4], n[:4], strict=True)),
            expected="many that occur once, fewer twice, and so on",
            fix="give more text, a lower --order, or --smoothing laplace",
        )
    follows = r[1:] == r[:-1] + 1
    turing = (r[:-1] + 1) * n[1:] / n[:-1]  # (R-1,)
    spread = np.sqrt((r[:-1] + 1.0) ** 2 * (n[1:] / n[:-1] ** 2) * (1 + n[1:] / n[:-1]))
    stays = follows & (np.abs(turing - line[:-1]) > SURE * spread)
    switch = int(np.argmin(np.concatenate([stays, [False]])))  # the first that the line serves as well
    return r, np.concatenate([turing[:switch], line[switch:]])


def katz(counts: Counts) -> Fitted:
    """Back off from Good-Turing: a seen n-gram keeps r*/r of its share, the rest of a context goes to the one below."""
    V = counts.vocab_size
    try:
        r, adjusted = good_turing(counts.unigrams, "single tokens")
    except InputError:
        if not counts.tallies:
            raise
        r = np.unique(counts.unigrams[counts.unigrams > 0])  # those of a tokenizer are all frequent: none is discounted
        adjusted = r.astype(np.float64)
    total = counts.unigrams.sum()
    once = max(1, int((counts.unigrams == 1).sum()))  # where none is, one that could have been
    freed = once / total if (counts.unigrams == 0).any() else 0.0
    below = np.zeros(V)  # probabilities of the order below
    seen = counts.unigrams > 0
    below[seen] = adjusted[np.searchsorted(r, counts.unigrams[seen])]
    below *= (1 - freed) / below.sum()
    below[~seen] = freed / max(1, (~seen).sum())
    with np.errstate(divide="ignore"):
        unigrams, levels, lower = np.log(below), [], below
    for k, this in enumerate(counts.tallies, 2):
        r, adjusted = good_turing(this.counts, f"sequences of {k} tokens")
        keeps = np.minimum(adjusted / r, 1.0)  # (R,)
        context = this.keys // V  # (G,)
        totals = np.bincount(context, this.counts, minlength=len(below))  # (G below,)
        below_size = len(below)
        p = keeps[np.searchsorted(r, this.counts)] * this.counts / totals[context]  # (G,)
        held = np.bincount(context, p, minlength=below_size)  # (G below,) what a context's n-grams have together
        full = np.bincount(context, minlength=below_size) == V  # (G below,) every token was seen: none to leave for
        p *= np.where(full, 1 / np.where(full, held, 1.0), np.minimum(1.0, (1 - LEFT) / np.maximum(held, LEFT)))[
            context
        ]
        left = np.where(totals > 0, np.maximum(1 - held, LEFT), 1.0)
        below = lower[this.suffix]  # (G,) of the same token after the shorter context
        others = 1 - np.bincount(context, below, minlength=below_size)  # (G below,)
        levels.append(Level(this.keys, np.log(p), np.log(np.where(full, 1.0, left / np.maximum(others, LEAST)))))
        lower = below = p
    return Fitted(unigrams, tuple(levels))
