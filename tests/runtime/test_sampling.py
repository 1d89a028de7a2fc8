"""Sampling against transformers' logits processors, and the frequencies of many draws against the distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmworks.base.errors import InputError, LmworksError
from lmworks.runtime.sampling import Sampling, choose, distribution, penalize

VOCAB = 50


def reference(logits: np.ndarray, history: list[int], s: Sampling) -> np.ndarray:
    """The distribution (V,) that transformers would draw from."""
    steps = LogitsProcessorList()
    window = history if s.repeat_last_n < 0 else history[len(history) - min(s.repeat_last_n, len(history)) :]
    if s.repeat_penalty != 1 and window:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repeat_penalty))
    steps.append(TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    scores = steps(torch.tensor([window], dtype=torch.long), torch.from_numpy(logits)[None].double())
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, history: list[int], s: Sampling) -> np.ndarray:
    """The distribution (V,) that `choose` draws from."""
    tokens, probabilities = distribution(penalize(logits.astype(np.float64), history, s), s)
    full = np.zeros(len(logits))
    full[tokens] = probabilities
    return full


@pytest.mark.parametrize("last_n", [0, 3, 64, -1])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (12, 0.6), (1, 0.9), (500, 0.01)])
def test_distribution_is_that_of_transformers(last_n, top_k, top_p):
    for seed, penalty, temperature in itertools.product(range(4), (1.0, 1.3, 0.8), (0.3, 1.0, 1.7)):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 3, VOCAB).astype(np.float32)
        history = rng.integers(0, VOCAB, 20).tolist()
        s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repeat_penalty=penalty, repeat_last_n=last_n)
        np.testing.assert_allclose(ours(logits, history, s), reference(logits, history, s), atol=1e-6)


def test_tokens_tied_with_the_kth_stay():
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    s = Sampling(temperature=1.0, top_k=2)
    assert set(np.flatnonzero(ours(logits, [], s))) == {1, 2, 3}
    np.testing.assert_allclose(ours(logits, [], s), reference(logits, [], s), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_no_temperature_takes_the_largest_after_the_penalty(temperature):
    logits = np.array([5.0, 4.0, -1.0], np.float32)
    rng = np.random.default_rng(0)
    assert choose(logits, [], Sampling(temperature=temperature), rng) == 0
    assert choose(logits, [0], Sampling(temperature=temperature, repeat_penalty=2.0), rng) == 1
    assert choose(logits, [0, 1, 2], Sampling(temperature=temperature, repeat_penalty=2.0, repeat_last_n=2), rng) == 0


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = np.array([1000.0, 999.0, -1000.0], np.float32)
    assert all(choose(logits, [], Sampling(temperature=1e-300), np.random.default_rng(i)) == 0 for i in range(20))


def test_draws_have_the_expected_frequencies():
    """Pearson's chi-squared over 20,000 draws among 7 tokens stays below the 1 - 1e-4 quantile of 6 degrees."""
    logits = np.random.default_rng(5).normal(0, 1, VOCAB).astype(np.float32)
    s = Sampling(temperature=0.9, top_k=7, top_p=0.999, repeat_penalty=1.2)
    history = [int(logits.argmax())]
    expected = reference(logits, history, s) * 20_000
    assert (expected > 0).sum() == 7
    rng = np.random.default_rng(11)
    drawn = np.bincount([choose(logits, history, s, rng) for _ in range(20_000)], minlength=VOCAB)
    assert drawn[expected == 0].sum() == 0
    kept = expected > 0
    assert ((drawn - expected)[kept] ** 2 / expected[kept]).sum() < 27.9


def test_a_seed_repeats_and_another_seed_differs():
    logits = np.zeros(VOCAB, np.float32)

    def draw(seed: int | None) -> list[int]:
        s = Sampling(temperature=1.0, seed=seed)
        rng = s.make_rng()
        return [choose(logits, [], s, rng) for _ in range(30)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_logits_are_not_changed_in_place():
    logits = np.arange(VOCAB, dtype=np.float64)
    choose(logits, [3], Sampling(temperature=0.5, repeat_penalty=2.0, top_k=3), np.random.default_rng(0))
    np.testing.assert_array_equal(logits, np.arange(VOCAB))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = np.array([0.0, bad, 1.0], np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(LmworksError, match="not finite"):
            choose(logits, [], Sampling(temperature=temperature), np.random.default_rng(0))


def test_a_token_forbidden_with_minus_infinity_is_never_chosen():
    logits = np.array([-np.inf, 0.0, -np.inf], np.float32)
    assert {choose(logits, [], Sampling(temperature=1.0), np.random.default_rng(i)) for i in range(9)} == {1}


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": float("inf")},
        {"repeat_last_n": -2},
        {"seed": -1},
        {"seed": True},
    ],
)
def test_a_setting_out_of_range_is_named(setting):
    with pytest.raises(InputError, match=next(iter(setting))) as caught:
        Sampling(**setting)
    assert caught.value.expected


def test_a_rounding_error_that_swaps_two_tokens_changes_no_draw():
    """Near ties come in another order in another runtime; the draw must not go by that order."""
    logits = np.repeat(np.float32([1, 2, 3]), 400)
    noise = np.random.default_rng(1).normal(0, 1e-6, (2, len(logits))).astype(np.float32)
    for temperature, seed in itertools.product((1.0, 1.3), range(100)):
        sampling = Sampling(temperature=temperature)
        one, two = (choose(logits + part, [], sampling, np.random.default_rng(seed)) for part in noise)
        assert one == two
