"""The learning rate against transformers' and against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from lmworks.training.schedule import learning_rate


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (5, 40), (100, 2000)])
def test_cosine_equals_transformers_after_the_warm_up(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        ours = learning_rate(step, lr=0.3, min_lr=0.0, warmup=warmup, steps=steps)
        if step >= warmup:
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        else:
            assert ours == pytest.approx(0.3 * (step + 1) / (warmup + 1))
        optimizer.step()
        theirs.step()


def test_warm_up_is_linear_and_never_zero_and_the_floor_is_kept() -> None:
    rates = [learning_rate(step, lr=1e-3, min_lr=1e-4, warmup=4, steps=20) for step in range(21)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[20] == pytest.approx(1e-4)
    assert rates[12] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[8] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert min(rates) > 0
    assert learning_rate(500, lr=1e-3, min_lr=1e-4, warmup=4, steps=20) == pytest.approx(1e-4)


def test_a_constant_rate_only_warms_up() -> None:
    rates = [learning_rate(step, lr=2.0, min_lr=0.5, warmup=1, steps=9, shape="constant") for step in range(9)]
    assert rates == [1.0] + [2.0] * 8


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (5, 40), (100, 2000)])
def test_linear_and_wsd_equal_transformers_after_the_warm_up(warmup: int, steps: int) -> None:
    decaying = round(0.3 * steps)
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2)]
    linear = get_linear_schedule_with_warmup(optimizers[0], warmup, steps)
    wsd = get_wsd_schedule(
        optimizers[1], warmup, decaying, num_training_steps=steps, decay_type="linear", min_lr_ratio=0.1
    )
    for step in range(steps):
        ours = learning_rate(step, lr=0.3, min_lr=0.0, warmup=warmup, steps=steps, shape="linear")
        stable = learning_rate(step, lr=0.3, min_lr=0.03, warmup=warmup, steps=steps, shape="wsd", decay=0.3)
        if step >= warmup:
            assert ours == pytest.approx(linear.get_last_lr()[0], abs=1e-12)
            assert stable == pytest.approx(wsd.get_last_lr()[0], abs=1e-12)
        else:
            assert ours == stable == pytest.approx(0.3 * (step + 1) / (warmup + 1))
        for optimizer, schedule in zip(optimizers, (linear, wsd), strict=True):
            optimizer.step()
            schedule.step()


def test_wsd_falls_only_at_the_end() -> None:
    rates = [learning_rate(s, lr=1.0, min_lr=0.0, warmup=0, steps=10, shape="wsd", decay=0.4) for s in range(11)]
    assert rates == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25, 0.0])
    all_warm = [learning_rate(s, lr=1.0, min_lr=0.0, warmup=8, steps=10, shape="wsd", decay=1.0) for s in (7, 8, 9)]
    assert all_warm == pytest.approx([8 / 9, 1.0, 0.5])
    assert learning_rate(9, lr=1.0, min_lr=0.0, warmup=0, steps=10, shape="wsd", decay=0.0) == 1.0
