"""Padded batches, as users of a peer make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def in_batches(
    rows: Sequence[Sequence[int]], run: Callable[[np.ndarray, np.ndarray], np.ndarray], *, most: int | None = None
) -> np.ndarray:
    """Run rows padded to the longest: all at once (None), or sorted by length in batches of at most `most`.

    `run` takes ids and mask (B, T) and returns (B, O). The answers are in the order of the rows.
    """
    order = sorted(range(len(rows)), key=lambda row: len(rows[row])) if most else list(range(len(rows)))
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    for start in range(0, len(rows), most or len(rows)):
        batch = order[start : start + (most or len(rows))]
        longest = max(len(rows[row]) for row in batch)
        ids, mask = (np.zeros((len(batch), longest), np.int64) for _ in range(2))
        for i, row in enumerate(batch):
            ids[i, : len(rows[row])] = rows[row]
            mask[i, : len(rows[row])] = 1
        for row, logits in zip(batch, run(ids, mask), strict=True):
            found[row] = logits
    return np.array(found)
