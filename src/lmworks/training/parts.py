"""The parts in which a batch is computed: how many, how large, and which rank computes them.

Shares of parts follow, where devices are unlike, from the rows that each rank manages in a second.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmworks.base.threads import cpu_count
from lmworks.base.types import Batch

if TYPE_CHECKING:
    from lmworks.training.distributed import Ranks

WARM_STEPS, MEASURED_STEPS = 2, 4  # of a run whose ranks are measured


def even_shares(accumulation: int, world: int) -> list[float]:
    """Return the shares of equal parts: at least `accumulation` of them, and as many on each rank."""
    parts = -(-accumulation // world) * world
    return [1 / parts] * parts


def count_rows(batch: Batch) -> int:
    """Return how many rows a batch has."""
    return len(next(iter(batch.values())))


def cut(rows: int, shares: Sequence[float]) -> list[slice]:
    """Return the rows of each part: as many as its share says, to the nearest row; of equal parts the first get more.

    Where there are more parts than rows some are empty.
    """
    if len(set(shares)) == 1:
        edges = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(rows), len(shares)))])
    else:
        edges = np.rint(np.cumsum([0.0, *shares]) / sum(shares) * rows).astype(int)
    return [slice(int(start), int(end)) for start, end in pairwise(edges)]


def stretches(parts: int, world: int) -> list[list[int]]:
    """Return the numbers of the parts that each rank computes, in order: nearly as many for each."""
    return [numbers.tolist() for numbers in np.array_split(np.arange(parts), world)]


def deal(batch: Batch, shares: Sequence[float], ranks: Ranks) -> list[tuple[int, Batch]]:
    """Return the parts of a batch that this rank computes, with their numbers; none without rows."""
    rows = cut(count_rows(batch), shares)
    mine = stretches(len(shares), ranks.world)[ranks.rank]
    return [(i, {name: array[rows[i]] for name, array in batch.items()}) for i in mine if rows[i].stop > rows[i].start]


class Pace:
    """Measures, in the first steps of a sitting, the rows that each rank manages in a second, and makes shares of them.

    A rank's own work is timed, without its waiting for the others; all ranks see rows of the same lengths. `wanted`
    "auto" measures where the ranks have different devices; nothing is measured again for as many ranks as were
    `measured` before.
    """

    def __init__(self, ranks: Ranks, device: torch.device, *, wanted: str, measured: int) -> None:
        self.ranks, self.device = ranks, device
        self.left, self.rows, self.seconds = 0, 0, 0.0
        if wanted != "never" and ranks.world not in (1, measured) and (wanted == "always" or self.are_unlike()):
            self.left = WARM_STEPS + MEASURED_STEPS

    def are_unlike(self) -> bool:
        """Tell whether the ranks have different devices."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{platform.processor()} {cpu_count()}"
        return len(set(self.ranks.gather(name))) > 1

    def clock(self) -> float:
        """Return the time, once the device has done what it was told, where that matters."""
        if self.left and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def add(self, parts: Sequence[Batch], seconds: float, shares: Sequence[float]) -> list[float] | None:
        """Take in a step's parts; after the last step that is measured return new shares."""
        if not self.left:
            return None
        self.left -= 1
        if self.left < MEASURED_STEPS:
            self.rows, self.seconds = self.rows + sum(count_rows(part) for part in parts), self.seconds + seconds
        if self.left:
            return None
        speeds = self.ranks.gather(self.rows / max(self.seconds, 1e-9))
        if min(speeds) <= 0:  # a rank had no rows
            return None
        numbers = stretches(len(shares), self.ranks.world)
        return [
            round(speed / sum(speeds) / len(mine), 4) for speed, mine in zip(speeds, numbers, strict=True) for _ in mine
        ]
