"""Scores of strangeness against scikit-learn and scipy; the threshold's promise, kept over many draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from lmworks.base.errors import InputError
from lmworks.evaluation.ood import (
    auroc,
    choose_known,
    choose_threshold,
    energy_score,
    fit_mahalanobis,
    nearest_score,
    shrink,
    softmax_score,
    unit,
)

RNG = np.random.default_rng(0)
CLASSES, SIZE = 6, 24
CENTRES = RNG.normal(size=(CLASSES, SIZE)) * 3
MIX = RNG.normal(size=(SIZE, SIZE))  # features are correlated


def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features around the class means, and the classes."""
    targets = RNG.integers(0, CLASSES, rows)
    return CENTRES[targets] + RNG.normal(size=(rows, SIZE)) @ MIX * 0.5, targets


def test_scores_of_logits() -> None:
    logits = RNG.normal(size=(50, 7)) * 30
    np.testing.assert_allclose(softmax_score(logits), 1 - softmax(logits, axis=1).max(1), atol=1e-12)
    np.testing.assert_allclose(energy_score(logits), -logsumexp(logits, axis=1), atol=1e-12)


@pytest.mark.parametrize("rows", [40, 400])
def test_mahalanobis_is_scikit_learns_shrunk_covariance(rows: int) -> None:
    features, targets = draw(rows)
    means = np.stack([features[targets == c].mean(0) for c in range(CLASSES)])
    reference = LedoitWolf(assume_centered=True).fit(features - means[targets])
    covariance, amount = shrink(features - means[targets])
    assert amount == pytest.approx(reference.shrinkage_, abs=1e-9) and amount > 0
    np.testing.assert_allclose(covariance, reference.covariance_, atol=1e-9)
    other = RNG.normal(size=(30, SIZE)) * 3
    known = cdist(other, means, "mahalanobis", VI=reference.precision_).min(1) ** 2
    np.testing.assert_allclose(fit_mahalanobis(features, targets).score(other), known, rtol=2e-3)


def test_features_that_never_vary_are_refused_and_flat_ones_are_not() -> None:
    with pytest.raises(InputError, match="the same"):
        fit_mahalanobis(np.ones((9, 4)), np.arange(9) % 3)
    features, targets = draw(80)
    features[:, 3] = 0.0
    assert np.isfinite(fit_mahalanobis(features, targets).score(features)).all()


@pytest.mark.parametrize("k", [1, 5])
def test_nearest_is_scikit_learns(k: int) -> None:
    features, targets = draw(200)
    known = choose_known(features, targets)
    np.testing.assert_allclose(known, unit(features))
    other = RNG.normal(size=(30, SIZE))
    distances, _ = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features).kneighbors(other)
    np.testing.assert_allclose(nearest_score(other, known, k=k), distances[:, -1], atol=1e-6)


def test_known_vectors_are_as_many_of_each_class_as_there_are() -> None:
    features, targets = draw(300)
    targets[:] = np.repeat([0, 1, 2], [250, 40, 10])
    known = choose_known(features, targets, most=60)
    where = [np.abs(unit(features) - row).max(1).argmin() for row in known]
    assert np.bincount(targets[where]).tolist() == [20, 20, 10]
    np.testing.assert_array_equal(known, choose_known(features, targets, most=60))


def test_area_under_the_curve_with_ties() -> None:
    strange, usual = RNG.integers(2, 9, 80), RNG.integers(0, 7, 120)
    truth = np.repeat([1, 0], [80, 120])
    assert auroc(strange, usual) == pytest.approx(roc_auc_score(truth, np.concatenate([strange, usual])), abs=1e-12)


def test_the_threshold_keeps_its_promise() -> None:
    """Split conformal: over all draws a new text is flagged with the probability asked for, or just below."""
    flags = [RNG.normal() > choose_threshold(RNG.normal(size=39), 0.1) for _ in range(20_000)]
    assert np.mean(flags) == pytest.approx(4 / 40, abs=0.008), "the 36th of 39: 4 of 40 places are above it"
    with pytest.raises(InputError, match="too few"):
        choose_threshold(np.arange(18), 0.05)
    assert choose_threshold(np.arange(19), 0.05) == 18
