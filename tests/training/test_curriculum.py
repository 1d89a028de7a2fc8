"""The order of a curriculum equals a plain restatement with sets, and every row is still read once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmworks.tasks.base import Feature
from lmworks.training.curriculum import CURRICULUM, FIRST, competence, order_by
from lmworks.training.data import draw
from lmworks.training.examples import Examples, Row


def restated(difficulty: list[float], seed: int) -> list[list[int]]:
    """Return what may be drawn at each place: the unread among the easiest, by the paper's formula."""
    count, order = len(difficulty), order_by(np.array(difficulty), seed=seed).tolist()
    ranked = sorted(range(count), key=lambda i: (difficulty[i], i))
    there = []
    for k in range(count):
        share = math.sqrt(k / count * (1 - FIRST**2) + FIRST**2)
        there.append(sorted(set(ranked[: min(count, math.ceil(count * share))]) - set(order[:k])))
    return there


@pytest.mark.parametrize("count", [1, 2, 300])
def test_each_row_is_drawn_among_the_easiest_that_are_left(count: int) -> None:
    difficulty = np.random.default_rng(0).integers(0, 50, count).astype(float)
    order = order_by(difficulty, seed=7).tolist()
    assert sorted(order) == list(range(count))
    for row, there in zip(order, restated(difficulty.tolist(), 7), strict=True):
        assert row in there
    assert order == order_by(difficulty, seed=7).tolist()
    assert count < 3 or order != order_by(difficulty, seed=8).tolist()


def test_what_is_there_is_drawn_alike() -> None:
    """Place 60 of 100 rows: every unread row that is there comes about equally often."""
    seen = np.zeros(100)
    for seed in range(4000):
        seen[order_by(np.arange(100), seed=seed)[60]] += 1
    there = math.ceil(100 * math.sqrt(0.6 * (1 - FIRST**2) + FIRST**2))
    assert seen[there:].sum() == 0
    late = seen[there - 2 : there]  # became readable just now: their chance is 1 of those that are left
    assert late.mean() == pytest.approx(4000 / (there - 60), rel=0.2)


def test_competence_is_the_square_root_of_progress() -> None:
    """Platanios et al. 2019, figure 3: c(0) = c0, c(1) = 1, and half the data after a quarter of the time."""
    assert competence(np.array([0.0, 0.25, 1.0])) == pytest.approx([FIRST, 0.5, 1.0], abs=1e-4)
    assert draw(0, 0, 1, stream=CURRICULUM)[0] != draw(0, 0, 1, stream=CURRICULUM - 1)[0]


@pytest.mark.parametrize("packing", [None, 64])
def test_the_first_epoch_begins_with_easy_rows(packing: int | None) -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 500)
    rows = [Row(Feature({"input_ids": [1] * n}, i), {"labels": [1] * n}) for i, n in enumerate(lengths.tolist())]
    data = Examples(rows, epochs=2, batch_size=8, packing=packing, seed=3)
    plain = data.fingerprint()
    data.sort_by(lengths)
    assert data.fingerprint() != plain
    read = np.concatenate(data.plan)
    first, later = read[:500], read[500:]
    assert sorted(first.tolist()) == sorted(later.tolist()) == list(range(500))
    quarter, last = (lengths[first[:125]].mean(), lengths[first[375:]].mean())
    assert quarter < 0.6 * last
    assert lengths[later[:125]].mean() == pytest.approx(lengths.mean(), rel=0.2)
