"""The learning rate of each step: linear warm-up, then half a cosine down to a floor, or a constant.

    warm-up   lr · (step + 1) / (warmup + 1)                      step < warmup
    cosine    min_lr + (lr - min_lr) · (1 + cos(π · progress)) / 2    progress = (step - warmup) / (steps - warmup)

(Loshchilov and Hutter 2017, without restarts.)
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "constant"]


def learning_rate(step: int, *, lr: float, min_lr: float, warmup: int, steps: int, shape: Shape = "cosine") -> float:
    """Return the rate of this step, counted from 0; no step has the rate 0 while it warms up."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if shape == "constant":
        return lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return min_lr + (lr - min_lr) * (1.0 + math.cos(math.pi * progress)) / 2
