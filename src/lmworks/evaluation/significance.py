"""How sure a score is, and whether two models differ on the same examples.

Every score here is a function of sums over examples: accuracy is Σ right / Σ 1, bits per byte Σ bits / Σ bytes,
macro-F1 a function of the counts of each class. So all of them are drawn again alike:

    interval               draw N of the N examples with replacement, many times; the middle `level` of what comes out
                           (percentile bootstrap, Efron 1979)
    paired bootstrap       draw the same examples for both models; p = share of draws in which the difference is as far
                           from the mean of all draws as the one seen is from 0 (Koehn 2004, shifted as in Riezler and
                           Maxwell 2005)
    randomization          swap the two models' results of each example by a coin; p = share of swaps whose difference
                           is as large as the one seen (Noreen 1989)
    McNemar                of the examples that one model alone has right, would a fair coin share them out as unevenly?
                           exact and two-sided
    Holm                   p-values of several comparisons, raised so that one false alarm among all stays as rare

p of n draws is (count + 1) / (n + 1), never 0. Examples must be independent: documents, or long blocks of one.

Shapes: N examples, K sums, S draws; values (N, K) are the parts of each example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError

Float64 = NDArray[np.float64]
Statistic = Callable[[Float64], Float64]  # sums (S, K) -> scores (S,)
LEVEL, DRAWS = 0.95, 1000
TIE = 1e-12  # differences nearer than this are equal: sums in another order


@dataclass(frozen=True)
class Difference:
    """Model b less model a: its interval, and how often chance alone would give as much."""

    value: float
    low: float
    high: float
    p_bootstrap: float
    p_randomization: float


def ratio(sums: Float64) -> Float64:
    """Return the first sum over the second: a mean where the second counts examples."""
    found: Float64 = sums[..., 0] / sums[..., 1]
    return found


def bootstrap(
    values: Float64, statistic: Statistic = ratio, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of a score whose examples have these parts (N, K)."""
    return bootstrap_all(values, {"score": statistic}, level=level, draws=draws, seed=seed)["score"]


def bootstrap_all(
    values: Float64, statistics: Mapping[str, Statistic], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the intervals of several scores of the same examples, from the same draws."""
    drawn = np.stack(list(resample(check(values), draws, seed)))  # (S, K)
    ends = [(1 - level) / 2, (1 + level) / 2]
    found = {name: np.quantile(statistic(drawn), ends) for name, statistic in statistics.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def paired_difference(
    a: Float64, b: Float64, statistic: Statistic = ratio, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Return what model b has more than model a on the same examples: parts (N, K) of each.

    Raises InputError where the models were scored on different examples.
    """
    a, b = check(a), check(b)
    if a.shape != b.shape:
        raise InputError("the models were scored on different examples", found=f"{len(a)} and {len(b)}")
    both = np.concatenate([a, b], axis=1)  # (N, 2K)
    k = a.shape[1]

    def difference(sums: Float64) -> Float64:
        found: Float64 = statistic(sums[..., k:]) - statistic(sums[..., :k])
        return found

    seen = float(difference(both.sum(0)[None])[0])
    drawn = difference(np.stack(list(resample(both, draws, seed))))  # (S,)
    swapped = difference(np.stack(list(swap(a, b, draws, seed))))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        seen, float(low), float(high), share_beyond(drawn - drawn.mean(), seen), share_beyond(swapped, seen)
    )


def check(values: Any) -> Float64:
    """Return the parts as floats (N, K); raise InputError where there is no example."""
    parts: Float64 = np.asarray(values, np.float64)
    if parts.ndim != 2 or not len(parts):
        raise InputError("there is no example to draw from", found=f"shape {parts.shape}")
    return parts


def resample(values: Float64, draws: int, seed: int) -> Iterator[Float64]:
    """Yield the sums (K,) of N examples drawn with replacement from (N, K)."""
    rng, n = np.random.default_rng([seed, 1]), len(values)
    for _ in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        yield times @ values


def swap(a: Float64, b: Float64, draws: int, seed: int) -> Iterator[Float64]:
    """Yield the sums (2K,) of both models, each example's results swapped by a coin."""
    rng, total, more = np.random.default_rng([seed, 2]), np.concatenate([a.sum(0), b.sum(0)]), b - a
    for _ in range(draws):
        moved = rng.integers(0, 2, len(a)) @ more  # (K,)
        yield total + np.concatenate([moved, -moved])


def share_beyond(found: Float64, seen: float) -> float:
    """Return the p-value: how often a difference is at least as large as the one seen, in either direction."""
    return (int((np.abs(found) >= abs(seen) - TIE).sum()) + 1) / (len(found) + 1)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of so many examples that only a, or only b, has right (McNemar 1947)."""
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [log_choose(n, i) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def fisher_tail(right: int, trials: int, known: int, texts: int) -> float:
    """Return the probability that at most `right` of `trials` are right where `known` of `texts` alike are.

    One-sided, of the hypergeometric distribution: given how many are right of all, and that both are drawn alike.
    """
    both = right + known
    logs = [log_choose(trials, k) + log_choose(texts, both - k) for k in range(max(0, both - texts), right + 1)]
    top = max(logs)
    return min(1.0, math.exp(top - log_choose(trials + texts, both)) * sum(math.exp(one - top) for one in logs))


def log_choose(n: int, k: int) -> float:
    """Return the logarithm of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values of several comparisons, each raised so that the chance of any false alarm stays (Holm 1979)."""
    found, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, p_values[i] * (len(p_values) - rank)))
        found[i] = worst
    return found
