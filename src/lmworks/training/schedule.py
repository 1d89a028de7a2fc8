"""The learning rate of each step: linear warm-up, then a curve down to a floor, or none.

    warm-up    lr · (step + 1) / (warmup + 1)                                    step < warmup
    constant   lr
    linear     min_lr + (lr - min_lr) · (1 - progress)
    cosine     min_lr + (lr - min_lr) · (1 + cos(π · progress)) / 2    progress = (step - warmup) / (steps - warmup)
    wsd        lr, then linear down to min_lr over the last `decay` of all steps (warm-up, stable, decay)

Cosine without restarts is Loshchilov and Hutter 2017, wsd is Hu et al. 2024 (MiniCPM). After the warm-up these are the
curves of transformers; its warm-up is lr · step / warmup, which spends the first step on a rate of 0, so ours is not.
"""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "wsd"]


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup: int, steps: int, shape: Shape = "cosine", decay: float = 0.2
) -> float:
    """Return the rate of this step, counted from 0; no step has the rate 0 while it warms up."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if shape == "constant":
        return lr
    begins = max(warmup, steps - round(decay * steps)) if shape == "wsd" else warmup
    progress = min(1.0, max(0, step - begins) / max(1, steps - begins))
    share = (1.0 + math.cos(math.pi * progress)) / 2 if shape == "cosine" else 1.0 - progress
    return min_lr + (lr - min_lr) * share
