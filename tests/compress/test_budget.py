"""The grammar of a budget, and the choice among candidates, by numbers that a person can check."""

from __future__ import annotations

import pytest

from lmworks.base.errors import InputError
from lmworks.compress.budget import read_budget
from lmworks.compress.candidates import Candidate, broken, charts, choose, frontier, recommend, time_in_turn

SCORES = ("accuracy", "f1", "perplexity", "agreement")


def make(name: str, accuracy: float, size: float, speed: float, kind: str = "whole numbers") -> Candidate:
    found = {"accuracy": accuracy, "agreement": 1.0, "size": size, "size_share": size / 100, "memory": 3 * size,
             "memory_share": size / 100, "latency": 10 / speed, "latency_gain": speed, "many": 100 / speed,
             "throughput": speed, "speed": speed}  # fmt: skip
    return Candidate(name=name, kind=kind, what=name, found=found)


BASE = make("fp32", 0.90, 100, 1.0, "floats")
SMALL, FAST, TINY = make("int8", 0.895, 25, 1.8), make("bf16", 0.90, 50, 2.2, "floats"), make("int4", 0.85, 15, 1.0)
ALL = [BASE, SMALL, FAST, TINY, Candidate(name="onnx", kind="graphs", what="", failed="it cannot be made")]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("accuracy>=-1%", {"fp32", "int8", "bf16"}),
        ("accuracy>=-0.4%", {"fp32", "bf16"}),
        ("accuracy >= 0.9", {"fp32", "bf16"}),
        ("accuracy>=90%", {"fp32", "bf16"}),
        ("accuracy>=-0.05", {"fp32", "int8", "bf16", "int4"}),
        ("speed>=2x", {"bf16"}),
        ("size<=0.25x", {"int8", "int4"}),
        ("size<=30%, speed>=1.5x", {"int8"}),
        ("size<30MB", {"int8", "int4"}),
        ("size<=-50%", {"int8", "bf16", "int4"}),
        ("latency<=5ms", {"bf16"}),
        ("memory<=0.1GB", {"int8", "int4"}),
        ("size<25MB", {"int4"}),
    ],
)
def test_a_budget_says_what_it_seems_to_say(text: str, kept: set[str]) -> None:
    clauses = read_budget(text, SCORES)
    assert {one.name for one in ALL[:4] if not broken(one, BASE, clauses)} == kept


def test_a_worse_perplexity_is_a_share_of_it() -> None:
    (clause,) = read_budget("perplexity<=+2%", SCORES)
    assert clause.holds({"perplexity": 30.6}, {"perplexity": 30.0})
    assert not clause.holds({"perplexity": 30.7}, {"perplexity": 30.0})
    assert str(clause) == "perplexity<=+2%"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acuracy>=-1%", "did you mean \"accuracy\""), ("accuracy=>1", "no demand"), ("", "empty"),
        ("speed>=3", "speed>=2x"), ("accuracy>=2ms", "no ms"), ("size<=+2x", "size<=2x"), ("sped>=2x", "speed"),
        ("accuracy>=-1%; speed>=2x", "no demand"), ("size<=1e400", "no demand"),
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_is_an_error_with_its_mending(text: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        read_budget(text, SCORES)
    assert says in str(error.value)


def test_the_least_size_times_time_within_the_budget_is_chosen() -> None:
    """int8: 0.25 / 1.8 = 0.139, bf16: 0.5 / 2.2 = 0.227; the smaller int4 loses too much."""
    assert choose(ALL, BASE, read_budget("accuracy>=-1%", SCORES), "accuracy") is SMALL
    assert choose(ALL, BASE, read_budget("accuracy>=-1%,speed>=2x", SCORES), "accuracy") is FAST
    assert choose(ALL, BASE, read_budget("accuracy>=-1%,speed>=50x", SCORES), "accuracy") is None
    assert frontier(ALL, "accuracy") == ["int8", "bf16", "int4"]


def test_each_scenario_has_a_sentence_with_measured_numbers() -> None:
    said = recommend(ALL, BASE, "accuracy", [])
    assert said["server"].startswith("bf16") and "2.20 times" in said["server"]
    assert said["edge"].startswith("int8") and "25.0 MB" in said["edge"]
    assert "no graph" in said["browser"]
    graph = make("onnx-int8", 0.894, 24, 1.5, "graphs")
    assert recommend([*ALL, graph], BASE, "accuracy", [])["browser"].startswith("onnx-int8")
    assert charts(ALL, "accuracy")[0].to_svg().count("<circle") == 4


def test_the_least_of_several_rounds_counts() -> None:
    calls: list[str] = []
    one, other = time_in_turn(
        lambda i: calls.append(f"a{i}"), lambda i: [calls.append(f"b{i}"), sum(range(20000))], inputs=3, rounds=4
    )  # fmt: skip
    assert 0 < one < other
    assert len(calls) == 2 * 3 * 4 + 2 and set(calls) == {f"{x}{i}" for x in "ab" for i in range(3)}
