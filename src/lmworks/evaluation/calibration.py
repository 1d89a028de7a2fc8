"""Confidence that means what it says: one temperature for all logits, and how far confidence is from accuracy.

    p = softmax(z / T)              T minimises the mean of −log p[y] on labelled texts that the model has not learnt
    ECE = Σ_b n_b / N · |accuracy of b − mean confidence of b|     b: 15 bins of equal width (0, 1/15], … (14/15, 1]

A temperature changes no decision: the order of the labels stays.
Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", sections 2 and 4.2.

Shapes: N texts, L labels; logits (N, L), targets (N,) the true label's place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError

Numbers = NDArray[Any]
BINS = 15
HOTTEST, STEPS = 1e3, 60  # the temperatures looked at are 1/HOTTEST to HOTTEST; halvings of that range


def log_softmax(logits: Numbers) -> NDArray[np.float64]:
    """Return the log-probabilities (N, L) of logits (N, L)."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    found: NDArray[np.float64] = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return found


def nll(logits: Numbers, targets: Numbers, temperature: float = 1.0) -> float:
    """Return the mean of −log p of the true labels, natural."""
    found = log_softmax(np.asarray(logits) / temperature)
    return float(-found[np.arange(len(found)), targets].mean())


def fit_temperature(logits: Numbers, targets: Numbers) -> float:
    """Return the temperature of the least NLL; raise InputError where one class or no text leaves nothing to fit.

    In b = 1/T the NLL is convex, with the slope mean(Σ_l p_l z_l − z_y): its sign is halved in on. Where every
    answer is right the slope has no end: the temperature then stops at 1, as more confidence cannot be learnt.
    """
    if not len(logits) or np.shape(logits)[-1] < 2:
        raise InputError("a temperature is fitted on texts with two labels or more", found=f"logits {np.shape(logits)}")
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    true = z[np.arange(len(z)), targets]

    def slope(b: float) -> float:
        p = np.exp(log_softmax(z * b))
        return float((p * z).sum(-1).mean() - true.mean())

    if not true.any():  # the true label is always the highest
        return 1.0
    low, high = -np.log(HOTTEST), np.log(HOTTEST)  # of b
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(np.exp(middle)) > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def confidence(logits: Numbers, temperature: float = 1.0) -> NDArray[np.float64]:
    """Return the probability (N,) of the likeliest label."""
    found: NDArray[np.float64] = np.exp(log_softmax(np.asarray(logits) / temperature).max(-1))
    return found


def reliability(confident: Numbers, correct: Numbers, *, bins: int = BINS) -> list[tuple[int, float, float]]:
    """Return (texts, mean confidence, accuracy) of each bin that holds any, by rising confidence."""
    place = np.clip(np.ceil(np.asarray(confident) * bins).astype(int) - 1, 0, bins - 1)  # (N,): bins are (a, b]
    return [
        (int(here.sum()), float(confident[here].mean()), float(correct[here].mean()))
        for here in (place == b for b in range(bins))
        if here.any()
    ]


def ece(confident: Numbers, correct: Numbers, *, bins: int = BINS) -> float:
    """Return the expected calibration error: the mean distance between confidence and accuracy, 0 to 1."""
    total = len(confident)
    return sum(n / total * abs(right - said) for n, said, right in reliability(confident, correct, bins=bins))
