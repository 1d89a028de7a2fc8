"""How unlike its training data an input is: four scores, each higher the stranger.

    softmax       1 − max softmax(z)                                Hendrycks and Gimpel 2017
    energy        −log Σ_l exp z_l                                  Liu et al. 2020, equation 4, T = 1
    mahalanobis   min_c (f − μ_c)ᵀ Σ⁻¹ (f − μ_c)                    Lee et al. 2018, equation 2
    nearest       1 − the k-th highest cosine of f with known f      Sun et al. 2022, algorithm 1

z are the logits, f the features: what the head's last matrix reads. μ_c is the mean of a class, Σ the covariance around
the class means, shared and shrunk towards a multiple of the identity by Ledoit and Wolf 2004 (the amount is estimated).
The threshold at a false-alarm rate a is split-conformal (Vovk et al. 2005): of n held-out in-domain scores the
⌈(n + 1)(1 − a)⌉-th lowest, so that another in-domain text is flagged with probability a at most.

Shapes: N texts, L labels, D features, C classes, K known vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.evaluation.calibration import confidence

Numbers = NDArray[Any]
Float64 = NDArray[np.float64]
SCORES = ("softmax", "energy", "mahalanobis", "nearest")
OF_FEATURES = ("mahalanobis", "nearest")
KNOWN = 1000  # vectors kept for `nearest`, of each class alike: reading them is what it costs
NEIGHBOUR = 1  # k


def softmax_score(logits: Numbers) -> Float64:
    """Return 1 − the highest probability (N,)."""
    return 1 - confidence(logits)


def energy_score(logits: Numbers) -> Float64:
    """Return the free energy (N,)."""
    z = np.asarray(logits, np.float64)
    top = z.max(-1)
    found: Float64 = -(top + np.log(np.exp(z - top[:, None]).sum(-1)))
    return found


@dataclass(frozen=True)
class Mahalanobis:
    """Class means and a matrix that makes their shared covariance the identity."""

    whiten: Numbers  # (D, D): f @ whiten has the covariance 1
    means: Numbers  # (C, D), whitened

    @cached_property
    def squares(self) -> Numbers:
        """The means' squared lengths (C,)."""
        found: Numbers = (self.means**2).sum(1)
        return found

    def score(self, features: Numbers) -> Float64:
        """Return the squared distance (N,) from the nearest class mean."""
        white = features @ self.whiten  # (N, D)
        squares = (white**2).sum(1)[:, None] + self.squares - 2 * white @ self.means.T  # (N, C)
        found: Float64 = np.maximum(squares.min(1), 0).astype(np.float64)
        return found


def fit_mahalanobis(features: Numbers, targets: Numbers) -> Mahalanobis:
    """Return the means of the classes that occur and the whitening matrix of the features around them."""
    f = np.asarray(features, np.float64)
    classes, place = np.unique(targets, return_inverse=True)
    means = np.stack([f[place == c].mean(0) for c in range(len(classes))])  # (C, D)
    covariance, _ = shrink(f - means[place])
    values, vectors = np.linalg.eigh(covariance)
    floor = values[-1] * 1e-10  # directions in which nothing varies
    if values[-1] <= 0:
        raise InputError("the features of all texts are the same: they tell nothing apart")
    whiten = vectors / np.sqrt(np.maximum(values, floor))
    return Mahalanobis(whiten.astype(np.float32), (means @ whiten).astype(np.float32))


def shrink(centred: Numbers) -> tuple[Float64, float]:
    """Return the covariance (D, D) of centred rows (N, D), shrunk: (1 − s) S + s · trace(S)/D · I, and s.

    s = min(1, b²/d²), d² = |S − m I|²/D, b² = Σ_n |x_n x_nᵀ − S|² / (N² D), m = trace(S)/D: Ledoit and Wolf 2004.
    """
    n, size = centred.shape
    s = centred.T @ centred / n
    mean = np.trace(s) / size
    distance = ((s - mean * np.eye(size)) ** 2).sum() / size
    fourth = ((centred**2).sum(1) ** 2).sum() / n  # the mean of |x xᵀ|²
    noise = (fourth - (s**2).sum()) / (n * size)
    amount = float(min(1.0, noise / distance)) if distance > 0 else 1.0
    return (1 - amount) * s + amount * mean * np.eye(size), amount


def choose_known(features: Numbers, targets: Numbers, *, most: int = KNOWN, seed: int = 0) -> NDArray[np.float32]:
    """Return unit vectors (K, D) of some texts: at most `most`, as many of each class as there are, drawn by seed."""
    rng, classes = np.random.default_rng(seed), np.unique(targets)
    each = max(1, most // len(classes))
    rows = [rng.permutation(np.flatnonzero(targets == c))[:each] for c in classes]
    return unit(features[np.sort(np.concatenate(rows))])


def nearest_score(features: Numbers, known: Numbers, *, k: int = NEIGHBOUR) -> Float64:
    """Return 1 − the k-th highest cosine (N,) with known unit vectors (K, D)."""
    cosines = unit(features) @ known.T  # (N, K)
    place = known.shape[0] - min(k, known.shape[0])
    highest = cosines.max(1) if k == 1 else np.partition(cosines, place, axis=1)[:, place]
    found: Float64 = 1 - highest.astype(np.float64)
    return found


def unit(vectors: Numbers) -> NDArray[np.float32]:
    """Return vectors (N, D) of length 1; a vector of zeros stays."""
    x = np.asarray(vectors, np.float32)
    found: NDArray[np.float32] = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return found


def choose_threshold(scores: Numbers, false_alarms: float) -> float:
    """Return the score above which a text is flagged; raise InputError where so few texts cannot bear the rate."""
    place = math.ceil((len(scores) + 1) * (1 - false_alarms))
    if place > len(scores):
        raise InputError("too few held-out texts for such a rate", found=f"{len(scores)}, {false_alarms:g}",
                         expected=f"{math.ceil(1 / false_alarms) - 1} or more", fix="raise --false-alarms")  # fmt: skip
    return float(np.sort(scores)[place - 1])


def auroc(strange: Numbers, usual: Numbers) -> float:
    """Return the probability that a strange text scores higher than a usual one, ties counting half."""
    ordered = np.sort(usual)
    below = np.searchsorted(ordered, strange, "left") + np.searchsorted(ordered, strange, "right")
    return float(below.mean() / 2 / len(ordered))
