"""What the server sees pass by: windows of answers against the reference, alarms, and the numbers for Prometheus.

lmworks_answers_total{model, label}   lmworks_confidence{model}   lmworks_out_of_domain_total{model}
lmworks_drift{model}   lmworks_drift_statistic{model, test}   lmworks_drift_p{model, test}   lmworks_drift_psi{model}
lmworks_drift_windows_total{model}   lmworks_drift_undelivered_total{to}

A window holds the last requests' classes, confidences, scores, lengths and vectors: no text, and nothing longer than it
is needed. Every quarter of a window it is compared again, in a thread; a test alarms at p ≤ alpha / (tests · horizon).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.evaluation.drift import ALPHA, HORIZON, Profile, alarm_level, compare, psi
from lmworks.evaluation.monitor import CLASSIFY, Monitor, Seen, read_monitor
from lmworks.serve.engine import Spec
from lmworks.serve.monitor_alerts import Target, send

require("prometheus_client", extra="serve")
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: E402

WINDOW = 200  # requests
PARTS = 4  # a window is looked at each time that so large a part of it is new
KEPT = 200  # comparisons that /drift shows
BUCKETS = tuple(i / 20 for i in range(1, 21))
POLICIES = ("flag", "abstain", "fallback=NAME")


@dataclass(frozen=True)
class Watching:
    """How the server watches: what it does with strange inputs, whom it tells of drift."""

    when_unsure: str = "flag"
    alert: Target | None = None
    log: Path | None = None  # a line of JSON for each comparison
    window: int = WINDOW

    @property
    def fallback(self) -> str | None:
        """The model that answers instead."""
        kind, _, name = self.when_unsure.partition("=")
        return name if kind == "fallback" else None


class Watch:
    """One model's traffic."""

    def __init__(self, name: str, monitor: Monitor, window: int) -> None:
        self.name, self.monitor, self.window = name, monitor, window
        self.labels: tuple[str, ...] = tuple(monitor.facts["reference"].get("classes", ()))
        self.reference = to_profile(monitor)
        self.rows: deque[Seen] = deque(maxlen=window)
        self.requests = self.new = 0
        self.found: deque[dict[str, Any]] = deque(maxlen=KEPT)

    @property
    def drifting(self) -> bool:
        """Whether the last comparison alarmed."""
        return bool(self.found and self.found[-1]["drift"])

    def add(self, seen: Sequence[Seen]) -> list[tuple[int, list[Seen]]]:
        """Take answers in; return the windows that are to be compared, each with the number of requests so far."""
        due = []
        for one in seen:
            self.rows.append(one)
            self.requests += 1
            self.new += 1
            if len(self.rows) == self.window and self.new >= max(1, self.window // PARTS):
                self.new = 0
                due.append((self.requests, list(self.rows)))
        return due

    def compare(self, requests: int, rows: Sequence[Seen]) -> dict[str, Any]:
        """Return what a window says: each test with its p, the drift among them, and plain rates."""
        numbers = {"confidence": [one.confidence for one in rows], "score": [one.ood_score for one in rows],
                   "length": [one.tokens for one in rows]}  # fmt: skip
        classes = np.bincount([one.label for one in rows], minlength=len(self.labels)) if self.labels else None
        features = [one.features for one in rows if one.features is not None]
        window = Profile(
            classes,
            {name: np.array(numbers[name], np.float32) for name in self.reference.numbers},  # rounded as those are
            np.array(features) if features else None,
        )
        tests = compare(self.reference, window)
        level = alarm_level(len(tests))
        found = {
            "model": self.name, "time": round(time.time(), 3), "requests": requests, "window": len(rows),
            "tests": {name: {"statistic": one.statistic, "p": one.p} for name, one in tests.items()},
            "level": level, "drift": [name for name, one in tests.items() if one.p <= level],
            "out_of_domain": sum(one.ood for one in rows) / len(rows),
        }  # fmt: skip
        if "confidence" in window.numbers:
            found["confidence"] = float(window.numbers["confidence"].mean())
        if classes is not None and self.reference.classes is not None:
            found["psi"] = psi(self.reference.classes, classes)
        return found

    def state(self) -> dict[str, Any]:
        """Return what /drift shows."""
        facts = self.monitor.facts
        return {
            "drift": self.drifting, "requests": self.requests, "window": self.window,
            "step": max(1, self.window // PARTS), "alpha": ALPHA, "horizon": HORIZON,
            "reference": {"texts": facts["reference"]["texts"], "accuracy": facts.get("accuracy"),
                          "accuracy_kept": facts.get("accuracy_kept"),
                          "false_alarms": facts["false_alarms"], "score": facts["score"],
                          "threshold": facts["threshold"]},
            "comparisons": list(self.found),
        }  # fmt: skip


def to_profile(monitor: Monitor) -> Profile:
    """Return the reference of a monitor."""
    classes = monitor.facts["reference"].get("classes")
    names = ("confidence", "score", "length")
    numbers: dict[str, Any] = {name: monitor.arrays[name] for name in names if name in monitor.arrays}
    return Profile(
        None if classes is None else np.array(list(classes.values())), numbers, monitor.arrays.get("features")
    )


class Watches:
    """Every model that has a monitor."""

    def __init__(self, specs: Sequence[Spec], how: Watching, registry: CollectorRegistry) -> None:
        self.how, self.tasks = how, set[asyncio.Task[None]]()
        self.watches: dict[str, Watch] = {}
        for spec in specs:
            monitor = read_monitor(Path(spec.folder))
            if monitor is not None and monitor.facts["task"] == spec.task:
                self.watches[spec.name] = Watch(spec.name, monitor, how.window)
        check_policy(how, specs, list(self.watches))
        one, labels = registry, ("model",)
        self.answers = Counter("lmworks_answers", "Answers by class", ("model", "label"), registry=one)
        self.confidence = Histogram(
            "lmworks_confidence", "Calibrated confidence", labels, buckets=BUCKETS, registry=one
        )
        self.strange = Counter("lmworks_out_of_domain", "Inputs unlike the training data", labels, registry=one)
        self.drift = Gauge("lmworks_drift", "1 while the traffic differs from the reference", labels, registry=one)
        self.statistic = Gauge("lmworks_drift_statistic", "Of the last window", ("model", "test"), registry=one)
        self.p = Gauge("lmworks_drift_p", "Of the last window", ("model", "test"), registry=one)
        self.psi = Gauge("lmworks_drift_psi", "Stability index of the classes", labels, registry=one)
        self.windows = Counter("lmworks_drift_windows", "Windows compared", labels, registry=one)
        self.undelivered = Counter(
            "lmworks_drift_undelivered", "Lines and alerts that were lost", ("to",), registry=one
        )
        for to in ("log", "alert"):
            self.undelivered.labels(to)
        self.turn = asyncio.Lock()  # one window after the other, as they came
        for watch in self.watches.values():
            self.begin(watch)

    def begin(self, watch: Watch) -> None:
        """Show a watch in the metrics before anything has passed by."""
        for counter in (self.strange, self.drift, self.windows):
            counter.labels(watch.name)
        if watch.labels:
            self.confidence.labels(watch.name)

    def follow(self, name: str, monitor: Monitor | None) -> None:
        """Begin anew with another version of a model: what passed by before was compared with another reference."""
        if monitor is None:
            self.watches.pop(name, None)
            return
        self.watches[name] = Watch(name, monitor, self.how.window)
        self.begin(self.watches[name])
        self.drift.labels(name).set(0)

    def add(self, watch: Watch, seen: Sequence[Seen]) -> None:
        """Count answers, and compare the windows that are full in the background."""
        name = watch.name
        for one in seen:
            if one.confidence is not None:
                self.answers.labels(name, watch.labels[one.label]).inc()
                self.confidence.labels(name).observe(one.confidence)
            if one.ood:
                self.strange.labels(name).inc()
        for requests, rows in watch.add(seen):
            task = asyncio.ensure_future(self.look(watch, requests, rows))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def look(self, watch: Watch, requests: int, rows: list[Seen]) -> None:
        """Compare a window; tell whoever is to know."""
        async with self.turn:
            before = watch.drifting
            found = await asyncio.to_thread(watch.compare, requests, rows)
            if self.watches.get(watch.name) is not watch:
                return  # another version answers by now
            self.count(watch, found)
            if self.how.log is not None:
                self.lost("log", await asyncio.to_thread(append, self.how.log, json.dumps(found)))
        if found["drift"] and not before:
            said = ", ".join(f"{name} p={found['tests'][name]['p']:.1e}" for name in found["drift"])
            sys.stderr.write(f"drift: {watch.name} after {requests} requests: {said}\n")
            if self.how.alert is not None:
                self.lost("alert", await asyncio.to_thread(send, self.how.alert, {"alert": "drift", **found}))

    def count(self, watch: Watch, found: dict[str, Any]) -> None:
        """Keep a comparison, and its numbers for Prometheus."""
        watch.found.append(found)
        self.windows.labels(watch.name).inc()
        self.drift.labels(watch.name).set(bool(found["drift"]))
        for test, one in found["tests"].items():
            self.statistic.labels(watch.name, test).set(one["statistic"])
            self.p.labels(watch.name, test).set(one["p"])
        if "psi" in found:
            self.psi.labels(watch.name).set(found["psi"])

    def lost(self, to: str, problem: str) -> None:
        """Say and count what could not be delivered, where there is a problem."""
        if problem:
            self.undelivered.labels(to).inc()
            sys.stderr.write(f"drift: the {to} could not be {'written' if to == 'log' else 'delivered'}: {problem}\n")


def append(path: Path, line: str) -> str:
    """Add a line to a file, after half a one that a lost process left; return what went wrong, or nothing."""
    try:
        start = "\n" if is_torn(path) else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{start}{line}\n")
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def is_torn(path: Path) -> bool:
    """Say whether a file ends inside a line."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def check_policy(how: Watching, specs: Sequence[Spec], watched: Sequence[str]) -> None:
    """Raise InputError for a policy that this server cannot follow."""
    kind, equals, name = how.when_unsure.partition("=")
    if kind not in ("flag", "abstain", "fallback") or bool(equals and name) != (kind == "fallback"):
        raise InputError(
            "there is no such policy", found=f"--when-unsure {how.when_unsure}", expected=", ".join(POLICIES)
        )
    if kind != "flag" and not watched:
        raise InputError("--when-unsure needs a model that knows its limits", found="no model with a monitor",
                         fix="lmworks monitor fit MODEL DATA")  # fmt: skip
    others = {spec.name: spec.task for spec in specs}
    if kind == "fallback" and others.get(name) != CLASSIFY:
        raise InputError("the fallback must be a classifier that this server serves", found=name,
                         expected=", ".join(n for n, task in others.items() if task == CLASSIFY),
                         fix="lmworks serve MODEL OTHER --when-unsure fallback=OTHER")  # fmt: skip
    if kind == "fallback" and not set(watched) - {name}:
        raise InputError("the fallback cannot stand in for itself", found=name)
