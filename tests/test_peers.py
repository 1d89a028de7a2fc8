"""Races against peers: what counts, what does not, and who is how much faster."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peers"
MODULES = ("race", "batches", "models", "prepare", "table", "run")
ALTERED = """
import sys
sys.path.insert(0, {folder!r})
import race, work_ours

class Altered(work_ours.Ours):
    def logits(self, ids):
        return super().logits(ids) {change}

race.serve(Altered)
"""


@pytest.fixture(scope="module")
def peers() -> Iterator[SimpleNamespace]:
    """The benchmark's own modules, which are scripts beside each other."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def raced(peers: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A race of our ONNX graph on a tiny GPT-2, in which every other contestant fails in its own way."""
    place = tmp_path_factory.mktemp("peers")
    scripts = {
        "Liar": ALTERED.format(folder=str(FOLDER), change="[::-1]"),
        "Broken": "raise SystemExit('no such kernel')",
    }
    table = {"ours": ("work_ours.py", ""), "Nobody": ("work_nobody.py", "nobody")}
    for name, text in scripts.items():
        (place / f"{name}.py").write_text(text)
        table[name] = (str(place / f"{name}.py"), "")
    how = {"runtime": "onnx", "dtype": "fp32"}
    chosen = peers.run.Race("decode", "gpt2-tiny", "fp32", [(name, "fp32", how) for name in table])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.prepare, "BUILD", place)
        patch.setattr(peers.run, "BUILD", place)
        patch.setattr(peers.run, "PEERS", table)
        result: dict[str, Any] = peers.run.measure(chosen, 1, 3)
    peers.table.write_table({"a race": result}, place / "RESULTS.md")
    return {**result, "page": (place / "RESULTS.md").read_text(), "place": place}


def row(raced: dict[str, Any], who: str) -> dict[str, Any]:
    return next(row for row in raced["rows"] if row["who"] == f"{who}: fp32")


def test_ours_gives_transformers_tokens_and_is_timed(raced: dict[str, Any]) -> None:
    ours = row(raced, "ours")
    assert ours["problem"] is None
    assert ours["equal"] == raced["tokens"] > 40
    assert ours["distance"] < 1e-5
    assert len(ours["figures"]) == 3
    assert all(figure > 0 for figure in ours["figures"])


def test_the_reference_is_not_one_token_again_and_again(raced: dict[str, Any]) -> None:
    known = json.loads((raced["place"] / "models" / "gpt2-tiny" / "reference.json").read_text())
    assert len(set(known["tasks"]["decode"]["reference"]["tokens"])) > 3


def test_answers_that_are_far_from_the_reference_do_not_count(raced: dict[str, Any]) -> None:
    assert "not counted" in row(raced, "Liar")["problem"]
    assert "figures" not in row(raced, "Liar")


def test_a_peer_that_ends_or_is_absent_is_told_with_the_reason(raced: dict[str, Any]) -> None:
    assert row(raced, "Broken")["problem"] == "no such kernel"
    assert row(raced, "Nobody")["problem"] == "not installed: prepare.py nobody"
    assert "| Broken: fp32 | no such kernel |" in raced["page"]
    assert "| **ours: fp32** | " in raced["page"]


def test_a_ratio_is_the_median_within_rounds_against_the_best_of_ours(peers: SimpleNamespace) -> None:
    def outcome(name: str, figures: list[float], *, ours: bool) -> Any:
        return peers.race.Outcome(peers.race.Contestant(name, [], ours=ours), figures, distance=0.0)

    rows = peers.run.make_rows([
        outcome("slow", [1, 1, 1], ours=True),
        outcome("fast", [10, 20, 60], ours=True),
        outcome("peer", [5, 40, 20], ours=False),
    ])  # fmt: skip
    assert rows[2]["ratio"] == 2.0  # of 2, 0.5 and 3; the ratio of the medians is 1
    assert rows[2]["ratios"] == [0.5, 3.0]
    assert "ratio" not in rows[0]
    assert rows[1]["median"] == 20


def test_a_distance_that_is_not_a_number_does_not_count(peers: SimpleNamespace) -> None:
    found = peers.race.Outcome(peers.race.Contestant("peer", []))
    wrong = {"logits": peers.race.to_text([1.0, math.nan])}
    peers.race.judge(found, wrong, {"logits": peers.race.to_text([1.0, 2.0])}, 0.5)
    assert found.problem is not None


def test_tokens_are_counted_before_the_first_that_differs(peers: SimpleNamespace) -> None:
    found = peers.race.Outcome(peers.race.Contestant("peer", []))
    logits = peers.race.to_text([1.0, 2.0])
    given, known = {"logits": logits, "tokens": [5, 6, 9, 8]}, {"logits": logits, "tokens": [5, 6, 7, 8]}
    peers.race.judge(found, given, known, 0.5)
    assert (found.equal, found.problem) == (2, None)


@pytest.mark.parametrize(("most", "batches"), [(None, [3]), (2, [2, 1]), (1, [1, 1, 1])])
def test_padded_batches_keep_the_order_of_the_rows(
    peers: SimpleNamespace, most: int | None, batches: list[int]
) -> None:
    seen = []

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        return np.stack([(ids * mask).sum(1), mask.sum(1)], 1)

    rows = [[1, 2, 3], [9], [4, 5]]
    assert peers.batches.in_batches(rows, run, most=most).tolist() == [[6, 3], [9, 1], [9, 2]]
    assert seen == batches
