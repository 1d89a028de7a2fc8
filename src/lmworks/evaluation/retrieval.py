"""How well vectors bring together what belongs together: ranks of right partners, and labels of nearest neighbours.

    recall_at_k   share of anchors whose partner is among the k nearest of all partners
    mrr           mean of 1 / rank of the partner

Shapes: N anchors, C candidates, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.types import Floats

BLOCK = 512  # anchors compared at a time
DEPTHS = (1, 10)


def rank_partners(anchors: Floats, candidates: Floats, partners: Sequence[int], *, names: Sequence[str]) -> list[int]:
    """Return the rank, from 1 on, of each anchor's partner among all candidates, by their product.

    anchors (N, D) and candidates (C, D), all different texts, have length 1; `partners` (N,) are places among the
    candidates. Anchors of one name share their partners: none counts against another.
    """
    right: dict[str, list[int]] = {}
    for name, partner in zip(names, partners, strict=True):
        right.setdefault(name, []).append(partner)
    ranks: list[int] = []
    for start in range(0, len(anchors), BLOCK):
        scores = np.asarray(anchors[start : start + BLOCK]) @ np.asarray(candidates).T  # (b, C)
        for row, found in enumerate(scores, start):
            own = found[partners[row]]
            found[right[names[row]]] = -np.inf
            ranks.append(1 + int((found > own).sum()))
    return ranks


def nearest_labels(vectors: Floats, labels: Sequence[str]) -> list[str]:
    """Return for each of N texts the label of the one that is nearest to it; vectors (N, D) have length 1."""
    said: list[str] = []
    vectors = np.asarray(vectors)
    for start in range(0, len(vectors), BLOCK):
        scores = vectors[start : start + BLOCK] @ vectors.T  # (b, N)
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        said += [labels[i] for i in scores.argmax(1).tolist()]
    return said


def score_ranks(predictions: Sequence[Any]) -> dict[str, float]:
    """Return recall_at_1, recall_at_10 and mrr of ranks; of (rank, nearer) also how often the positive was nearer."""
    pairs = [p if isinstance(p, tuple) else (p, None) for p in predictions]
    ranks: NDArray[np.float64] = np.array([rank for rank, _ in pairs], np.float64)
    scores = {f"recall_at_{k}": float((ranks <= k).mean()) for k in DEPTHS}
    scores["mrr"] = float((1 / ranks).mean())
    nearer = [value for _, value in pairs if value is not None]
    return {**scores, "triplet_accuracy": float(np.mean(nearer))} if nearer else scores
