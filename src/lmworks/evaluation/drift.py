"""Whether traffic still looks like the reference: tests between two samples, and what keeps them from crying wolf.

    psi         Σ_c (q_c − p_c) ln(q_c / p_c), half a count added to each class       from 0.25 on it counts as large
    chi2        two-sample χ² of counts (Pearson 1900; Cochran 1954 on small counts: classes expected fewer than 5 times
                in the window are put together, by rising count)
    ks          sup |F − G|, with Stephens' (1970) correction of Kolmogorov's limit
    mmd         mean k(x, x') + mean k(y, y') − 2 mean k(x, y), Gaussian k as wide as the median distance; p from the
                gamma distribution with the mean and variance of permuted samples (Gretton et al. 2012, section 3.3)

Each test is made again in every window. Over `horizon` windows of traffic like the reference, P(any alarm) ≤ `alpha`
when each of m tests alarms at p ≤ alpha / (m · horizon): Bonferroni's bound, which needs nothing to be independent
(windows overlap, and all are compared with one reference).

Shapes: C classes, N texts of a window, M texts of the reference, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
Float64 = NDArray[np.float64]
LEAST = 5.0  # expected counts of a class in the smaller sample
SHUFFLES = 200
ALPHA, HORIZON = 0.05, 1000


@dataclass(frozen=True)
class Difference:
    """A test's statistic and the probability of one as large where nothing has changed."""

    statistic: float
    p: float


@dataclass(frozen=True)
class Profile:
    """Texts as numbers: what the reference keeps, and what a window is compared by; None where there is nothing."""

    classes: Numbers | None  # (C,) counts of the answers
    numbers: dict[str, Numbers]  # confidence, score, length: (N,) each
    features: Numbers | None  # (N, D)


def compare(reference: Profile, window: Profile) -> dict[str, Difference]:
    """Return every test that both profiles have numbers for: classes, each of the numbers, features."""
    found = {}
    if reference.classes is not None and window.classes is not None:
        found["classes"] = chi2_test(reference.classes, window.classes)
    for name, known in reference.numbers.items():
        found[name] = ks_test(known, window.numbers[name])
    if reference.features is not None and window.features is not None:
        found["features"] = mmd_test(reference.features, window.features)
    return found


def psi(reference: Numbers, window: Numbers) -> float:
    """Return the population stability index of counts (C,); 0 for the same shares."""
    p, q = ((np.asarray(x, np.float64) + 0.5) / (np.sum(x) + 0.5 * len(x)) for x in (reference, window))
    return float(((q - p) * np.log(q / p)).sum())


def chi2_test(reference: Numbers, window: Numbers) -> Difference:
    """Compare counts (C,) of two samples; those of rare classes are added up first."""
    r, w = group_rare(np.asarray(reference, np.float64), np.asarray(window, np.float64))
    total, n = r + w, w.sum()
    if len(r) < 2 or not n or not r.sum():
        return Difference(0.0, 1.0)
    expected = total * n / total.sum()
    other = total - expected
    statistic = float(((w - expected) ** 2 / expected + (r - other) ** 2 / other).sum())
    return Difference(statistic, gamma_tail((len(r) - 1) / 2, statistic / 2))


def group_rare(reference: Float64, window: Float64) -> tuple[Float64, Float64]:
    """Add up classes, the rarest first, until each group is expected LEAST times in both samples."""
    total = reference + window
    share = min(reference.sum(), window.sum()) / max(total.sum(), 1)
    groups: list[list[int]] = [[]]
    for c in np.argsort(total, kind="stable"):  # by one sample's counts its chance extremes would share a group
        if total[groups[-1]].sum() * share >= LEAST:
            groups.append([])
        groups[-1].append(int(c))
    if len(groups) > 1 and total[groups[-1]].sum() * share < LEAST:
        groups[-2] += groups.pop()
    return tuple(np.array([x[group].sum() for group in groups]) for x in (reference, window))  # type: ignore[return-value]


def ks_test(reference: Numbers, window: Numbers) -> Difference:
    """Compare two samples of numbers (M,) and (N,); with ties p is too high rather than too low."""
    r, w = np.sort(reference), np.sort(window)
    if not len(r) or not len(w):
        return Difference(0.0, 1.0)
    both = np.concatenate([r, w])
    distance = float(
        np.abs(np.searchsorted(r, both, "right") / len(r) - np.searchsorted(w, both, "right") / len(w)).max()
    )
    root = math.sqrt(len(r) * len(w) / (len(r) + len(w)))
    return Difference(distance, kolmogorov_tail((root + 0.12 + 0.11 / root) * distance))


def mmd_test(reference: Numbers, window: Numbers, *, seed: int = 0) -> Difference:
    """Compare vectors (M, D) and (N, D); the statistic is the biased MMD², between 0 and 2."""
    m, n = len(reference), len(window)
    if m < 2 or n < 2:
        return Difference(0.0, 1.0)
    kernel = gaussian(np.concatenate([reference, window]).astype(np.float64))  # (M + N, M + N)
    signs = np.concatenate([np.full(m, 1 / m), np.full(n, -1 / n)])
    statistic = float(signs @ kernel @ signs)
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(signs, (SHUFFLES, 1)), axis=1)  # (SHUFFLES, M + N)
    null = ((shuffled.astype(np.float32) @ kernel.astype(np.float32)) * shuffled).sum(1)
    mean, variance = float(null.mean()), float(null.var())
    if variance <= 0:
        return Difference(statistic, 1.0)
    return Difference(statistic, gamma_tail(mean**2 / variance, statistic * mean / variance))


def gaussian(x: Float64) -> Float64:
    """Return exp(−|x − y|² / (2 w²)) of all pairs of vectors (N, D), w² the median of the squared distances, halved."""
    squares = (x**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)
    width = float(np.median(distances[np.triu_indices(len(x), 1)]))
    found: Float64 = np.exp(-distances / max(width, 1e-12))
    return found


def alarm_level(tests: int, *, alpha: float = ALPHA, horizon: int = HORIZON) -> float:
    """Return the p of one test in one window at or below which drift is alarmed."""
    return alpha / (tests * horizon)


def kolmogorov_tail(x: float) -> float:
    """Return Kolmogorov's limit 2 Σ_j (−1)^(j−1) exp(−2 j² x²)."""
    if x < 0.2:  # 1 to 12 places; the series is slow there
        return 1.0
    return min(1.0, max(0.0, 2 * sum((-1.0) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 101))))


def gamma_tail(a: float, x: float) -> float:
    """Return Γ(a, x)/Γ(a), what a gamma variable of shape a exceeds x with; χ² of k degrees: gamma_tail(k/2, χ²/2).

    A series below a + 1, a continued fraction above (DLMF 8.7.1 and 8.9.2, evaluated by Lentz's method).
    """
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        k = a
        while abs(term) > abs(total) * 1e-16:
            k += 1
            term *= x / k
            total += term
        return min(1.0, max(0.0, 1 - front * total))
    b, c, d = x + 1 - a, 1e300, 1 / (x + 1 - a)
    fraction = d
    for i in range(1, 10_000):
        step, b = -i * (i - a), b + 2
        d = 1 / (step * d + b or 1e-300)
        c = b + step / c or 1e-300
        fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return min(1.0, front * fraction)
