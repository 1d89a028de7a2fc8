"""Temperature and calibration error against scipy, scikit-learn and the definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss

from lmworks.base.errors import InputError
from lmworks.evaluation.calibration import confidence, ece, fit_temperature, nll, reliability


def overconfident(heat: float, rows: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that are `heat` times too large for labels drawn from their softmax, and the labels."""
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(rows, 5)) * 1.5
    targets = np.array([rng.choice(5, p=p) for p in softmax(honest, axis=1)])
    return honest * heat, targets


@pytest.mark.parametrize("heat", [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_a_general_minimiser(heat: float) -> None:
    logits, targets = overconfident(heat)

    def loss(log_t: float) -> float:
        return float(log_loss(targets, softmax(logits / np.exp(log_t), axis=1)))

    found = fit_temperature(logits, targets)
    assert found == pytest.approx(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x), rel=1e-4)
    assert found == pytest.approx(heat, rel=0.1), "the labels were drawn at this heat"
    assert nll(logits, targets, found) == pytest.approx(loss(np.log(found)), rel=1e-9)


def test_calibration_lowers_the_error_and_keeps_every_decision() -> None:
    logits, targets = overconfident(4.0)
    right, warm = logits.argmax(1) == targets, fit_temperature(logits, targets)
    before, after = ece(confidence(logits), right), ece(confidence(logits, warm), right)
    assert before > 0.2 and after < 0.03
    assert ((logits / warm).argmax(1) == logits.argmax(1)).all()


def test_the_error_is_its_definition_and_edges_belong_below() -> None:
    rng = np.random.default_rng(1)
    said = np.concatenate([rng.uniform(0.2, 1, 400), [1.0, 1 / 15, 2 / 15, 0.0]])
    right = rng.random(404) < said
    total = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        here = (said > low) & (said <= high) if b else said <= high
        total += abs(right[here].mean() - said[here].mean()) * here.mean() if here.any() else 0
    assert ece(said, right) == pytest.approx(total, abs=1e-12)
    assert sum(n for n, _, _ in reliability(said, right)) == 404


def test_what_leaves_nothing_to_fit() -> None:
    assert fit_temperature(np.eye(4) * 9, np.arange(4)) == 1.0, "always right: more confidence cannot be learnt"
    with pytest.raises(InputError, match="two labels"):
        fit_temperature(np.zeros((3, 1)), np.zeros(3, int))
