"""The states of a graph without attention: one array a layer, a row a slot, and texts aligned to be read by it.

Shapes: B batch, T tokens, S states of a layer, D their size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAME = "state."  # of the inputs; the outputs are called new_state.


class States:
    """What a graph knows of the texts in its slots."""

    def __init__(self, inputs: Sequence[Any], slots: int) -> None:
        """Take the graph's inputs; where none is a state, this is empty."""
        self.shapes = {item.name: tuple(item.shape[1:]) for item in inputs if item.name.startswith(NAME)}
        self.arrays = {name: np.zeros((slots, *shape), np.float32) for name, shape in self.shapes.items()}
        self.outputs = [f"new_{name}" for name in self.shapes]

    def fresh(self, rows: int) -> dict[str, NDArray[Any]]:
        """Return the states of texts that begin."""
        return {name: np.zeros((rows, *shape), np.float32) for name, shape in self.shapes.items()}

    def read(self, rows: slice, lengths: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the states of these slots, of which those of length 0 begin."""
        for array in self.arrays.values():
            array[rows][lengths == 0] = 0
        return {name: array[rows] for name, array in self.arrays.items()}

    def write(self, rows: slice, found: Sequence[NDArray[Any]]) -> None:
        """Keep what the graph gave."""
        for array, new in zip(self.arrays.values(), found, strict=True):
            array[rows] = new


def align(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places (B, T) of each row's tokens, the real ones first."""
    return np.argsort(mask == 0, axis=1, kind="stable")


def put_back(logits: NDArray[Any], order: NDArray[np.int64]) -> NDArray[Any]:
    """Return logits (B, T, V) of aligned rows in the places that their tokens came from."""
    result = np.empty_like(logits)
    np.put_along_axis(result, order[:, :, None], logits, 1)
    return result
