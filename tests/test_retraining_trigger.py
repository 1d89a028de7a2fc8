"""When to train again: what is evidence, what counts, and a rule that never flaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from lmworks.base.errors import FormatError, InputError
from lmworks.evaluation.ood import choose_threshold
from lmworks.verbs.retraining_trigger import (
    HOUR,
    Evidence,
    Rule,
    State,
    find_evidence,
    is_more,
    read_state,
    step,
    write_state,
)

BAD = ("drift",)


def run(rule: Rule, checks: list[tuple[bool, int, float]]) -> list[str]:
    """Return the verdicts of checks, each (bad, accepted feedback, hours since the last one)."""
    state, now, said = State(), 0.0, []
    for number, (bad, accepted, hours) in enumerate(checks):
        now += hours * HOUR
        state, verdict = step(state, Evidence(number, BAD if bad else (), accepted), rule, now)
        said.append(verdict)
    return said


def test_the_trigger_waits_fires_once_and_holds() -> None:
    rule = Rule(checks=3, calm=2, cooldown=24, least=10)
    one = [(True, 99, 0.0)]
    assert run(rule, one * 4) == ["watching", "watching", "fire", "holding"]
    assert run(rule, [(False, 99, 0), *one * 2, (False, 99, 0), *one * 3]) == [
        "normal", "watching", "watching", "normal", "watching", "watching", "fire"
    ], "a normal check begins the count anew"  # fmt: skip
    assert run(rule, [(True, 9, 0), (True, 9, 0), (True, 9, 0), (True, 10, 0)])[2:] == ["feedback", "fire"]
    calm = [*one * 3, (False, 99, 0), (True, 99, 0), (False, 99, 0), (False, 99, 0)]
    assert run(rule, calm)[3:] == ["holding", "holding", "holding", "normal"], "normal twice in a row"
    assert run(rule, [*calm, *[(True, 108, 0)] * 3])[-1] == "feedback", "nothing has been learnt since"
    assert run(rule, [*calm, *[(True, 109, 0)] * 3])[-1] == "fire"
    later = [*one * 3, (True, 200, 23), (True, 200, 2), (True, 200, 0), (True, 200, 0)]
    assert run(rule, later)[3:] == ["holding", "watching", "watching", "fire"], "a day has passed"


def test_a_window_counts_once() -> None:
    rule, state = Rule(checks=2, least=1), State()
    for _ in range(9):
        state, verdict = step(state, Evidence(7, BAD, 5), rule, 0)
        assert verdict == "watching"
    assert step(State(), Evidence(None, (), 5), rule, 0) == (State(), "normal"), "nothing was compared yet"
    state, verdict = step(state, Evidence(8, BAD, 0), rule, 0)
    assert verdict == "feedback"
    assert step(state, Evidence(8, BAD, 1), rule, 0)[1] == "fire", "feedback that comes later is enough"
    fired = State(holding=True, fired=100.0, used=50, requests=8)
    assert step(fired, Evidence(8, (), 3), rule, 90)[0].used == 3, "some was deleted; a clock that goes back"


def test_requests_count_once() -> None:
    """One burst is in four windows that overlap; a server that starts anew counts from none."""
    rule, state, said = Rule(), State(), []
    for requests in range(400, 800, 50):
        burst = BAD if 450 <= requests <= 600 else ()
        state, verdict = step(state, Evidence(requests, burst, 500, window=200), rule, requests)
        said.append((requests, verdict, state.bad))
    assert {verdict for _, verdict, _ in said} == {"normal", "watching"} and max(bad for *_, bad in said) == 1, said
    state, said = State(), []
    for requests in (1000, 1200, 200):
        state, verdict = step(state, Evidence(requests, BAD, 500, window=200), rule, requests)
        said.append(verdict)
    assert said == ["watching", "watching", "fire"]


def test_accuracy_that_has_fallen_needs_no_new_window() -> None:
    """A sample is answered for each check; that it did not fall says nothing of the traffic."""
    for requests in (None, 200):
        state, said = State(requests=requests), []
        for number in range(3):
            seen = Evidence(requests, ("accuracy",), 500, window=200, fallen=True)
            state, verdict = step(state, seen, Rule(), number)
            said.append(verdict)
        assert said == ["watching", "watching", "fire"]
    state = State(bad=2, requests=200)
    assert step(state, Evidence(200, BAD, 500, window=200), Rule(), 0)[0] == state


FEW = st.integers(1, 4)


@given(
    st.builds(Rule, checks=FEW, calm=FEW, cooldown=st.floats(1, 50), least=st.integers(1, 9)),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.floats(0, 3)), max_size=12),
)  # fmt: skip
def test_it_never_flaps(rule: Rule, moves: list[tuple[int, int, int, float]]) -> None:
    """Between two trainings: enough normal checks in a row, or hours; then enough bad ones; and new feedback."""
    total, checks = 0, []
    for bad, normal, more, hours in moves:
        for is_bad in [True] * bad + [False] * normal:
            total += more
            checks.append((is_bad, total, hours))
    verdicts, last, time_ = run(rule, checks), None, [0.0]
    for _, _, hours in checks:
        time_.append(time_[-1] + hours)
    for i in [i for i, said in enumerate(verdicts) if said == "fire"]:
        assert all(bad for bad, _, _ in checks[i - rule.checks + 1 : i + 1]) and i + 1 >= rule.checks
        before = 0 if last is None else checks[last][1]
        assert checks[i][1] - before >= rule.least
        if last is not None:
            between = "".join("x" if bad else "." for bad, _, _ in checks[last + 1 : i + 1])
            assert len(between) >= rule.checks
            rested = time_[i + 1] - time_[last + 1] >= rule.cooldown * (1 - 1e-9)
            assert rested or "." * rule.calm in between, between
        last = i


def watched(**more: Any) -> dict[str, Any]:
    """Return what GET /drift says of a model."""
    last = {"requests": 5, "window": 200, "drift": [], "tests": {"score": {"p": 1e-9}}, "out_of_domain": 0.05,
            "level": 1e-5} | more  # fmt: skip
    return {"comparisons": [last], "reference": {"false_alarms": 0.05, "texts": 1000}}


def test_what_counts_as_evidence() -> None:
    assert find_evidence(watched(), None, 3) == Evidence(5, (), 3, window=200)
    assert find_evidence({"comparisons": []}, None, 3) == Evidence(None, (), 3)
    assert find_evidence(watched(drift=["score"]), None, 3).reasons == ("drift: score p=1.0e-09",)
    assert find_evidence(watched(out_of_domain=0.15), None, 3).reasons == (
        "strange: 15.0% of the last 200, 5.0% are expected",
    )
    assert not find_evidence({"comparisons": watched(out_of_domain=0.9)["comparisons"]}, None, 0).reasons, "a log"
    accuracy = {"fallen": True, "accuracy": 0.6, "texts": 50, "expected": 0.9}
    assert find_evidence(watched(), accuracy, 3).reasons == ("accuracy: 60.0% of 50 texts, it was 90.0%",)
    assert find_evidence(watched(), accuracy, 3).fallen
    for found in range(0, 201, 10):
        table = [[found, 49], [200 - found, 951]]  # 49 of the 1,000 scores are above the threshold that was chosen
        theirs = fisher_exact(table, alternative="greater").pvalue
        assert is_more(found, 200, 0.05, 1000, 1e-5) is bool(theirs <= 1e-5), found


def test_few_held_out_texts_do_not_cry_wolf() -> None:
    """The threshold comes of the reference: what is above it there says how much may be above it in a window."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        reference, window = rng.normal(size=50), rng.normal(size=200)
        found = int((window > choose_threshold(reference, 0.05)).sum())
        alarms += is_more(found, 200, 0.05, 50, 0.01)
    assert alarms <= 10, "1 % of 400, by chance"


def test_what_the_trigger_remembers(tmp_path: Path) -> None:
    state = State(bad=2, fired=7.5, used=3, requests=9)
    write_state(tmp_path / "new", "news", state)
    write_state(tmp_path / "new", "mood", State(calm=1))
    assert read_state(tmp_path / "new", "news") == state and read_state(tmp_path / "new", "other") == State()
    (tmp_path / "new/retraining.json").write_text('{"models": 3}')
    with pytest.raises(FormatError, match="not what retrain wrote"):
        read_state(tmp_path / "new", "news")
    for bad in ({"checks": 0}, {"cooldown": 0}, {"least": 0}, {"calm": -1}):
        with pytest.raises(InputError, match="out of range"):
            Rule(**bad).check()  # type: ignore[arg-type]
