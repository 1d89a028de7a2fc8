"""Easy rows first: the first epoch draws from a growing share of the rows, sorted by difficulty.

When a part p of the epoch is over, the next row is drawn among the unread ones of the easiest

    c(p) = sqrt(p (1 - c0²) + c0²)      (Platanios et al. 2019, "Competence-based curriculum learning", equation 7)

They draw with replacement. Here each row is read once, as in any epoch, so that a run with a curriculum has the steps
of one without: c(p) ≥ p, so there is always one left to draw. Later epochs are in random order. A plain sort would make
batches of equals: all short, or all of the same kind.

Shapes: n rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.training.data import draw

FIRST = 0.01  # c0: the share of the rows that is there from the beginning (the paper's value)
CURRICULUM = 2**32 + 4  # the random stream


def competence(progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the rows that may be drawn when this part of the epoch is over."""
    share: NDArray[np.float64] = np.sqrt(progress * (1 - FIRST**2) + FIRST**2)
    return share


def order_by(difficulty: NDArray[Any], *, seed: int) -> NDArray[np.int64]:
    """Return the order in which rows are read: difficulty (n,) -> rows (n,); equal ones count in the given order."""
    ranked, count = np.argsort(difficulty, kind="stable"), len(difficulty)
    there = np.ceil(count * competence(np.arange(count) / count)).astype(np.int64).clip(max=count)  # (n,)
    numbers = draw(seed, 0, count, stream=CURRICULUM)
    order, pool, added = np.empty(count, np.int64), list[int](), 0
    for place, (limit, number) in enumerate(zip(there.tolist(), numbers.tolist(), strict=True)):
        pool += ranked[added:limit].tolist()
        added = max(added, limit)
        drawn = number % len(pool)
        order[place], pool[drawn] = pool[drawn], pool[-1]
        pool.pop()
    return order
