"""The scores of labelled examples as functions of sums, so that intervals and tests can draw the examples again.

    text-classification    one label an example: accuracy, f1 (macro); of several labels: accuracy, f1 (micro)
    token-classification   accuracy of the words, f1 of the entities (micro)
    question-answering     exact_match, f1

Each number is that of `lmworks.evaluation.metrics.score` when the sums are those of all examples.

Shapes: N examples, K sums, C classes, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmworks.evaluation.metrics import as_sets, best_match, entities
from lmworks.evaluation.significance import Float64, Statistic, bootstrap_all

MANY_CLASSES = 200  # beyond these the counts of each class would be a large table: accuracy alone


def mean_of(column: int, count: int = 1) -> Statistic:
    """Return one sum over another, 0 where that is 0."""
    return lambda sums: np.divide(
        sums[..., column], sums[..., count], out=np.zeros(sums.shape[:-1]), where=sums[..., count] > 0
    )


def f1_of(sums: Float64) -> Float64:
    """Return 2 tp / (predicted + actual) of sums (…, 3), 0 where nothing is there."""
    below = sums[..., 1] + sums[..., 2]
    return np.divide(2 * sums[..., 0], below, out=np.zeros(below.shape), where=below > 0)


def macro_f1(sums: Float64) -> Float64:
    """Return the mean F1 of the classes that occur: sums (S, 2 + 3 C) -> (S,)."""
    counts = np.moveaxis(sums[..., 2:].reshape(*sums.shape[:-1], 3, -1), -2, -1)  # (S, C, 3): tp, predicted, actual
    occur = counts[..., 1] + counts[..., 2] > 0
    found: Float64 = (f1_of(counts) * occur).sum(-1) / np.maximum(occur.sum(-1), 1)
    return found


def parts_of(
    task: str, said: Sequence[Any], references: Sequence[Any], *, also: Sequence[str] = ()
) -> tuple[Float64, dict[str, Statistic]]:
    """Return the parts of each example (N, K), and the scores by name; no scores for numbers and for vectors.

    `also` are labels that get columns although nothing here has them, so that two models have the same ones.
    """
    if task == "token-classification":
        rows = [tag_parts(p, r) for p, r in zip(said, references, strict=True)]
        named = any(tag == "O" or tag[1:2] == "-" for tags in references for tag in tags)
        scores: dict[str, Statistic] = {"accuracy": mean_of(0)}
        return np.array(rows, np.float64), scores | ({"f1": lambda sums: f1_of(sums[..., 2:5])} if named else {})
    if task == "question-answering":
        version_2 = not all(references)
        pairs = zip(said, references, strict=True)
        matched = [(1.0, *best_match(p, [text for text, _ in r], version_2)) for p, r in pairs]
        return np.array(matched), {"exact_match": mean_of(1, 0), "f1": mean_of(2, 0)}
    if task not in ("text-classification", "image-classification") or isinstance(references[0], float):
        return np.zeros((len(references), 0)), {}
    predicted, actual = as_sets(said), as_sets(references)
    right = np.array([[float(p == a), 1.0] for p, a in zip(predicted, actual, strict=True)])  # (N, 2)
    if not isinstance(references[0], str):
        counts = np.array([[len(p & a), len(p), len(a)] for p, a in zip(predicted, actual, strict=True)], np.float64)
        return np.hstack([right, counts]), {"accuracy": mean_of(0), "micro_f1": lambda sums: f1_of(sums[..., 2:5])}
    place = {name: i for i, name in enumerate(sorted({*said, *references, *also}))}
    if len(place) > MANY_CLASSES:
        return right, {"accuracy": mean_of(0)}
    one_hot = np.eye(len(place))
    p, a = (one_hot[[place[name] for name in names]] for names in (said, references))  # (N, C) each
    return np.hstack([right, p * a, p, a]), {"accuracy": mean_of(0), "f1": macro_f1}


def tag_parts(said: Sequence[str], actual: Sequence[str]) -> tuple[int, ...]:
    """Return a sentence's right words, words, right entities, predicted and actual ones."""
    p, a = set(entities(said)), set(entities(actual))
    return sum(x == y for x, y in zip(said, actual, strict=True)), len(actual), len(p & a), len(p), len(a)


def intervals(task: str, said: Sequence[Any], references: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Return the interval of each score that sums can give."""
    values, scores = parts_of(task, said, references)
    return bootstrap_all(values, scores) if scores and len(values) > 1 else {}
