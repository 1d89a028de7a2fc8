"""When to train a model again: a rule with hysteresis over what a server sees, and the file that remembers it.

A check is bad where the traffic drifts, more of it is strange than the monitor's false alarms explain, or accuracy on a
labelled sample has fallen. Windows overlap: only one counts none of whose requests counted before. Accuracy that has
fallen counts each time.

    watching   `checks` bad checks in a row, and `feedback` accepted since the last time: it fires, once, and
    holding    is silent until `calm` checks in a row were normal, or `cooldown` hours have passed; then it watches anew

So between two trainings lie so many normal checks or hours, and so many bad checks, whatever the evidence does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_json
from lmworks.evaluation.significance import fisher_tail

STATE, FORMAT = "retraining.json", 1
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to train again.

    Parameters
    ----------
    checks
        Bad checks in a row before it trains.
    calm
        Normal checks in a row after which it may train again.
    cooldown
        Hours after which it may train again, whatever the checks say.
    least
        Pieces of feedback that must have been accepted since the last time.
    """

    checks: int = 3
    calm: int = 3
    cooldown: float = 24.0
    least: int = 100

    def check(self) -> Rule:
        """Return it. Raises InputError for what is out of range."""
        for name, low, high in (("checks", 1, 1000), ("calm", 1, 1000), ("cooldown", 0.01, 1e5), ("least", 1, 10**7)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"--{name} is out of range", found=str(getattr(self, name)),
                                 expected=f"{low} to {high:g}")  # fmt: skip
        return self


@dataclass(frozen=True)
class Evidence:
    """What a check found: the requests at the last comparison (None: there is none yet), what is bad, all accepted
    feedback, the requests of a window, and whether accuracy is among what is bad."""

    requests: int | None
    reasons: tuple[str, ...]
    accepted: int
    window: int = 1
    fallen: bool = False


@dataclass(frozen=True)
class State:
    """What is remembered between checks; times are seconds since 1970."""

    bad: int = 0
    calm: int = 0
    holding: bool = False
    fired: float | None = None
    used: int = 0  # feedback that was accepted when it fired
    requests: int | None = None  # at the last comparison that counted


def step(state: State, seen: Evidence, rule: Rule, now: float) -> tuple[State, str]:
    """Return what to remember and what to do: normal, watching, feedback (too little), holding, or fire."""
    if state.holding and state.fired is not None and now - state.fired >= rule.cooldown * HOUR:
        state = replace(state, holding=False, bad=0, calm=0)
    new = seen.requests is not None and (  # a server that started anew counts from none
        state.requests is None or not 0 <= seen.requests - state.requests < seen.window
    )
    if new or seen.fallen:
        bad, requests = bool(seen.reasons), seen.requests if new else state.requests
        state = replace(state, requests=requests, bad=(state.bad + 1) * bad, calm=(state.calm + 1) * (not bad))
        if state.holding and state.calm >= rule.calm:
            state = replace(state, holding=False)
    state = replace(state, used=min(state.used, seen.accepted))  # some may have been deleted
    if state.holding:
        return state, "holding"
    if state.bad < rule.checks:
        return state, "watching" if state.bad else "normal"
    if seen.accepted - state.used < rule.least:
        return state, "feedback"
    return fire(state, seen, now), "fire"


def fire(state: State, seen: Evidence, now: float) -> State:
    """Return what to remember of a training that begins."""
    return replace(state, bad=0, calm=0, holding=True, fired=now, used=seen.accepted)


def find_evidence(watched: Mapping[str, Any], accuracy: Mapping[str, Any] | None, accepted: int) -> Evidence:
    """Return what GET /drift or a log says of a model, and what a labelled sample does."""
    last = (watched["comparisons"] or [None])[-1]
    reasons = []
    if last is not None:
        if last["drift"]:
            reasons.append("drift: " + ", ".join(f"{name} p={last['tests'][name]['p']:.1e}" for name in last["drift"]))
        reference, share, texts = watched.get("reference", {}), last["out_of_domain"], last["window"]
        usual = reference.get("false_alarms")
        if usual is not None and is_more(round(share * texts), texts, usual, reference["texts"], last["level"]):
            reasons.append(f"strange: {share:.1%} of the last {texts}, {usual:.1%} are expected")
    fallen = accuracy is not None and accuracy["fallen"]
    if accuracy is not None and fallen:
        reasons.append(f"accuracy: {accuracy['accuracy']:.1%} of {accuracy['texts']} texts, it was "
                       f"{accuracy['expected']:.1%}")  # fmt: skip
    requests, window = (None, 1) if last is None else (int(last["requests"]), int(last["window"]))
    return Evidence(requests, tuple(reasons), accepted, window, bool(fallen))


def is_more(found: int, trials: int, share: float, texts: int, level: float) -> bool:
    """Whether so many, or more, come of chance with probability `level` at most, by the reference of so many texts.

    Above a threshold that was chosen for `share` lie so many of them (`choose_threshold`); the test is Fisher's.
    """
    below = min(texts, math.ceil((texts + 1) * (1 - share)))
    return fisher_tail(trials - found, trials, below, texts) <= level


def read_state(folder: Path, model: str) -> State:
    """Return what is remembered of a model. Raises FormatError for a file that was not written here."""
    if not (folder / STATE).is_file():
        return State()
    kept = read_json(folder / STATE)
    try:
        return to_state(dict(kept["models"]).get(model, {}))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise FormatError("this is not what retrain wrote", where=str(folder / STATE), fix="remove it") from None


def to_state(known: Mapping[str, Any]) -> State:
    """Return what a file remembers, also one of another version."""
    return State(**{one.name: known[one.name] for one in fields(State) if one.name in known})


def write_state(folder: Path, model: str, state: State) -> None:
    """Remember a model's state."""
    before = read_json(folder / STATE)["models"] if (folder / STATE).is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE, {"format": FORMAT, "models": {**before, model: asdict(state)}})
