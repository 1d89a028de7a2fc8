"""Dynamic batching against one question at a time, on real reviews."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lmworks.base.errors import InputError
from lmworks.runtime.predictor import Predictor, load
from lmworks.serve.batches import Batches
from lmworks.serve.slots import LateError


@pytest.fixture(scope="module")
def predictor(classifier: Path) -> Predictor:
    return load(classifier, runtime="onnx")


@pytest.fixture(scope="module")
def reviews(data_folder: Path) -> list[str]:
    lines = (data_folder / "sst2" / "dev.tsv").read_text("utf-8").splitlines()
    return [line.rsplit("\t", 1)[0] for line in lines[:60]]


def collect(told: dict[int, Any]) -> Any:
    """Return a `tell` that keeps the last of each request."""
    return lambda request, _, value, took=None: told.__setitem__(request, value)


def test_answers_are_those_of_a_batch_of_one_in_fewer_batches(predictor: Predictor, reviews: list[str]) -> None:
    told: dict[int, Any] = {}
    batches = Batches(predictor, collect(told))
    for number, review in enumerate(reviews):
        batches.add(number, [review], {}, time.monotonic() + 60)
    while batches.turn():
        pass
    for number, review in enumerate(reviews):
        [found], expected = told[number], predictor(review)
        assert [one.label for one in found] == [one.label for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-6)
    assert batches.batches < len(reviews) / 3
    assert batches.rows == len(reviews)


def test_int8_answers_do_not_depend_on_who_else_asks(classifier: Path, reviews: list[str]) -> None:
    predictor = load(classifier, runtime="onnx", dtype="int8")
    told: dict[int, Any] = {}
    batches = Batches(predictor, collect(told))
    for number, review in enumerate(reviews[:12]):
        batches.add(number, [review], {}, time.monotonic() + 60)
    while batches.turn():
        pass
    assert [told[number][0] for number in range(12)] == [predictor(review) for review in reviews[:12]]


def test_options_differ_within_a_batch(predictor: Predictor) -> None:
    told: dict[int, Any] = {}
    batches = Batches(predictor, collect(told))
    batches.add(1, ["a fine film", "a dull film"], {"top_k": 1}, time.monotonic() + 60)
    batches.add(2, ["a fine film"], {"scores": "none"}, time.monotonic() + 60)
    while batches.turn():
        pass
    assert batches.batches == 1
    assert [len(labels) for labels in told[1]] == [1, 1]
    assert told[2][0] == predictor("a fine film", scores="none")


def test_the_oldest_goes_first_and_nobody_starves(predictor: Predictor, reviews: list[str]) -> None:
    order: list[int] = []
    batches = Batches(predictor, lambda request, what, value: order.append(request))
    long = " ".join(reviews)[:600]
    batches.add(0, [long], {}, time.monotonic() + 60)
    for number, review in enumerate(reviews, 1):
        batches.add(number, [review], {}, time.monotonic() + 60)
    batches.turn()
    assert order[0] == 0


def test_the_cancelled_and_the_late_do_not_run(predictor: Predictor) -> None:
    told: dict[int, Any] = {}
    batches = Batches(predictor, collect(told))
    batches.add(1, ["a"], {}, time.monotonic() + 60)
    batches.add(2, ["b"], {}, time.monotonic() - 1)
    batches.add(3, ["c"], {}, time.monotonic() + 60)
    batches.cancel(1)
    while batches.turn():
        pass
    assert isinstance(told[2], LateError) and 1 not in told and 3 in told
    assert batches.rows == 1


def test_what_cannot_be_encoded_is_refused_at_once(predictor: Predictor) -> None:
    batches = Batches(predictor, collect({}))
    with pytest.raises(InputError, match="longer"):
        batches.add(1, ["word " * 2000], {}, time.monotonic() + 60)
    with pytest.raises(InputError, match="option"):
        batches.add(1, ["word"], {"colour": "red"}, time.monotonic() + 60)
    assert not batches.turn()
