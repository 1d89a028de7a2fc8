"""Several short documents end to end in one row, without padding; no document sees another, positions start anew.

A document goes into the first row that has room for it (first fit, Johnson 1973). When the model runs, documents of one
length are attended to together and no mask is needed: attention costs what the documents cost, not the row's square.

Shapes: R rows, T tokens of a row, N tokens of all documents, D hidden_size, n documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # evaluation reads rows as well, and needs no torch
    from torch import Tensor, nn

DOCUMENTS = "documents"  # (R, T): from 1, the document of its row that a token belongs to; negative on padding


def first_fit(lengths: NDArray[Any], capacity: int) -> list[NDArray[np.int64]]:
    """Return the documents of each row, in the order given; one that is longer than a row has a row of its own."""
    room, rows = np.zeros(len(lengths), np.int64), list[list[int]]()
    for document, length in enumerate(lengths.tolist()):
        fits = room[: len(rows)] >= length
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(document)
        room[row] -= length
    return [np.array(row, np.int64) for row in rows]


def join_words(words: Sequence[Sequence[int]]) -> list[int]:
    """Number the words of documents on: no word may seem to go on in the next document; negative ones stay."""
    joined, first = list[int](), 0
    for document in words:
        joined += [word + first if word >= 0 else word for word in document]
        first += max(document) + 1
    return joined


def packed_states(model: nn.Module, input_ids: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Run packed rows, ids and documents (R, T) -> states (N, D), and the place (N,) of each in the flattened rows.

    The states come sorted by the length of their documents.
    """
    import torch

    from lmworks.models.inference import ragged_states

    network: Any = model
    places, lengths = sort_documents(documents.cpu().numpy())
    index = torch.from_numpy(places).to(input_ids.device)  # (N,)
    return ragged_states(network.transformer, input_ids.flatten()[index], lengths.tolist()), index


def sort_documents(documents: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of all tokens, document by document, the shortest first, and the length of each."""
    rows = np.arange(len(documents))[:, None] * (documents.max() + 1)
    number = np.where(documents > 0, rows + documents, -1).ravel()  # (R·T,)
    edges = np.flatnonzero(np.diff(number, prepend=-2))
    starts = edges[number[edges] >= 0]
    lengths = np.diff(edges, append=number.size)[number[edges] >= 0]  # (n,)
    order = np.argsort(lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum()), lengths
