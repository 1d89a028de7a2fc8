"""Tests between samples against scipy and sums written out; windows of the same traffic do not alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaincc

from lmworks.evaluation.drift import (
    Profile,
    alarm_level,
    chi2_test,
    compare,
    gamma_tail,
    group_rare,
    kolmogorov_tail,
    ks_test,
    mmd_test,
    psi,
)


def test_tails_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        a = 10 ** rng.uniform(-1, 2.5)
        x = a * 10 ** rng.uniform(-1, 0.8)
        assert gamma_tail(a, x) == pytest.approx(gammaincc(a, x), rel=1e-9, abs=1e-13)
    assert gamma_tail(0.5, 300.0) == pytest.approx(gammaincc(0.5, 300.0), rel=1e-9), "far out, where alarms are"
    assert gamma_tail(2, 0) == 1
    for x in (0.1, 0.3, 0.8, 1.5, 3.0):
        assert kolmogorov_tail(x) == pytest.approx(stats.kstwobign.sf(x), abs=1e-12)


def test_classes_against_scipy() -> None:
    reference, window = np.array([300, 200, 250, 50]), np.array([40, 90, 50, 20])
    known = stats.chi2_contingency([reference, window], correction=False)
    found = chi2_test(reference, window)
    assert (found.statistic, found.p) == (pytest.approx(known.statistic), pytest.approx(known.pvalue))
    assert chi2_test(np.array([9, 0]), np.array([5, 0])).p == 1


def test_rare_classes_are_put_together() -> None:
    """150 classes in a window of 200: each is expected 1.3 times, which no table of χ² is made for."""
    rng = np.random.default_rng(0)
    reference = rng.multinomial(3000, np.full(150, 1 / 150))
    r, w = group_rare(reference.astype(float), rng.multinomial(200, np.full(150, 1 / 150)).astype(float))
    assert (r.sum(), w.sum()) == (3000, 200)
    assert ((r + w) * 200 / 3200).min() >= 5 and len(r) > 20
    same = np.full(150, 1 / 150)
    small = np.array([chi2_test(rng.multinomial(3000, same), rng.multinomial(200, same)).p for _ in range(1000)])
    assert np.mean(small < 0.05) == pytest.approx(0.05, abs=0.025) and small.min() > 1e-5
    some = np.full(150, 1 / 150)
    some[:15] *= 10
    assert chi2_test(reference, rng.multinomial(200, some / some.sum())).p < 1e-5


def test_stability_index() -> None:
    reference, window = np.array([70, 30]), np.array([40, 60])
    p, q = np.array([70.5, 30.5]) / 101, np.array([40.5, 60.5]) / 101
    assert psi(reference, window) == pytest.approx(sum((q - p) * np.log(q / p)))
    assert psi(reference, reference * 10) == pytest.approx(0, abs=1e-3)
    assert math.isfinite(psi(np.array([5, 0]), np.array([0, 5])))


def test_numbers_against_scipy() -> None:
    rng = np.random.default_rng(1)
    for shift, rows in ((0.0, 200), (0.3, 200), (1.0, 60)):
        x, y = rng.normal(size=500), rng.normal(size=rows) + shift
        known, found = stats.ks_2samp(x, y, method="asymp"), ks_test(x, y)
        assert found.statistic == pytest.approx(known.statistic)
        exact = stats.ks_2samp(x, y, method="exact").pvalue
        assert np.log(found.p) == pytest.approx(np.log(exact), abs=0.2 + 0.02 * -np.log(exact)), "Stephens comes near"
    ties = [ks_test(rng.integers(3, 9, 400), rng.integers(3, 9, 100)).p for _ in range(400)]
    assert np.mean(np.array(ties) < 0.05) <= 0.05


def test_vectors_against_sums_written_out() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(20, 4)) + 0.6
    both = np.concatenate([x, y])
    pairs = [((both[i] - both[j]) ** 2).sum() for i in range(50) for j in range(i)]
    width = np.median(pairs)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-((u - v) ** 2).sum() / width) for v in b] for u in a]))

    found = mmd_test(x, y)
    assert found.statistic == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y))
    shuffled = []
    for _ in range(2000):
        order = rng.permutation(50)
        kernel = np.exp(-((both[:, None] - both) ** 2).sum(-1) / width)[order][:, order]
        shuffled.append(kernel[:30, :30].mean() + kernel[30:, 30:].mean() - 2 * kernel[:30, 30:].mean())
    assert found.p < 0.01 and np.mean(np.array(shuffled) >= found.statistic) < 0.01
    middle = float(np.median(shuffled))  # the gamma distribution is held to plain permutations in its middle
    a, b = np.mean(shuffled) ** 2 / np.var(shuffled), np.var(shuffled) / np.mean(shuffled)
    assert gamma_tail(a, middle / b) == pytest.approx(0.5, abs=0.05)


def test_the_same_traffic_is_quiet_and_another_is_not() -> None:
    rng = np.random.default_rng(3)

    def traffic(rows: int, shift: float = 0.0) -> Profile:
        features = rng.normal(size=(rows, 16)) + shift
        numbers = {"confidence": features[:, 0], "length": np.round(features[:, 1] * 5)}
        return Profile(rng.multinomial(rows, [0.5, 0.3, 0.2]), numbers, features)

    level, alarms, small = alarm_level(4), 0, []
    reference = traffic(300)
    for _ in range(25):
        found = compare(reference, traffic(100))
        assert set(found) == {"classes", "confidence", "length", "features"}
        alarms += any(one.p <= level for one in found.values())
        small.append(found["features"].p)
    assert alarms == 0
    assert np.mean(np.array(small) < 0.05) < 0.2 and max(small) > 0.3, "the p of vectors is one"
    moved = compare(reference, traffic(100, 0.8))
    assert all(moved[name].p <= level for name in ("confidence", "features"))
