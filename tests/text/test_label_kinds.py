"""Columns of labels: numbers with a slip are not taken for names."""

from __future__ import annotations

import pytest

from lmworks.base.errors import InputError
from lmworks.text.label_kinds import unify


@pytest.mark.parametrize("slip", ["nan", "inf", "-inf", "NA", "?", "o.5"])
def test_a_slip_among_numbers_is_named(slip: str) -> None:
    labels = ["0.5"] * 20 + [slip]
    with pytest.raises(InputError, match="the others are") as error:
        unify(labels, [f"line {i}" for i in range(21)], is_table=True)
    assert error.value.where == "line 20" and repr(slip) in error.value.found


@pytest.mark.parametrize("labels", [["1.5", "good"], ["1", "2", "nan"], ["nan", "na"]])
def test_names_that_look_a_little_like_numbers_remain_names(labels: list[str]) -> None:
    assert unify(labels, labels, is_table=True) == labels
    assert unify(["0.5", "nan"], ["a", "b"], is_table=False) == ["0.5", "nan"]
