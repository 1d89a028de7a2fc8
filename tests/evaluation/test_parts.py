"""Scores as functions of sums: those of the metrics, of scikit-learn and of seqeval, on all examples and on draws."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from lmworks.evaluation.metrics import score
from lmworks.evaluation.parts import intervals, parts_of

RNG = np.random.default_rng(0)
LABELS = [f"l{i}" for i in RNG.integers(0, 5, 60)]
GUESSED = [label if RNG.random() < 0.7 else f"l{RNG.integers(0, 6)}" for label in LABELS]
SEVERAL = [tuple(f"l{i}" for i in range(4) if RNG.random() < 0.4) or ("l0",) for _ in range(50)]
SEVERAL_GUESSED = [row if RNG.random() < 0.5 else ("l1", "l3") for row in SEVERAL]
TAGS = [tuple(RNG.choice(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], 8)) for _ in range(40)]
TAGS_GUESSED = [tuple(tag if RNG.random() < 0.7 else "O" for tag in row) for row in TAGS]
ANSWERS = [[("the red fox", 0), ("red fox", 4)] if i % 4 else [] for i in range(40)]
ANSWERS_GUESSED = [str(RNG.choice(["", "fox", "red fox", "a dog"])) for _ in range(40)]


@pytest.mark.parametrize(("task", "said", "true"), [
    ("text-classification", GUESSED, LABELS),
    ("text-classification", SEVERAL_GUESSED, SEVERAL),
    ("token-classification", TAGS_GUESSED, TAGS),
    ("token-classification", [("N", "V")] * 4, [("N", "N")] * 4),
    ("question-answering", ANSWERS_GUESSED, ANSWERS),
    ("question-answering", ANSWERS_GUESSED[1:4], ANSWERS[1:4]),
])  # fmt: skip
def test_the_sums_of_all_examples_give_the_metrics(task: str, said: Any, true: Any) -> None:
    values, scores = parts_of(task, said, true)
    known = score(task, said, true)
    assert scores
    for name, statistic in scores.items():
        assert float(statistic(values.sum(0)[None])[0]) == pytest.approx(known[name]), name
        low, high = intervals(task, said, true)[name]
        assert low <= known[name] <= high


def test_a_draw_is_scored_as_scikit_learn_scores_it() -> None:
    values, scores = parts_of("text-classification", GUESSED, LABELS)
    for _ in range(20):
        rows = RNG.integers(0, 60, 60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = f1_score([LABELS[i] for i in rows], [GUESSED[i] for i in rows], average="macro")
        assert float(scores["f1"](values[rows].sum(0)[None])[0]) == pytest.approx(theirs)


def test_labels_that_nothing_has_change_nothing() -> None:
    (a, plain), (b, more) = (parts_of("text-classification", GUESSED, LABELS, also=also) for also in ((), ("x", "y")))
    assert b.shape[1] == a.shape[1] + 6
    assert plain["f1"](a.sum(0)[None]) == pytest.approx(more["f1"](b.sum(0)[None]))


def test_numbers_have_none() -> None:
    assert intervals("text-classification", [0.3, 0.4], [0.1, 0.2]) == {}
    assert intervals("feature-extraction", [1, 2], [(), ()]) == {}
