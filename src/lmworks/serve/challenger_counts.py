"""What is counted of a champion and its shadow, for Prometheus and for whoever decides.

lmworks_shadow_total{model, result: agrees, differs, dropped, failed}     texts
lmworks_shadow_seconds{model, version: current, challenger}               of a request; the challenger gives way to all
lmworks_shadow_out_of_domain_total{model, version}                        texts that are strange to it
"""

from __future__ import annotations

from collections import Counter as Numbers
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmworks.base.optional import require
from lmworks.evaluation.monitor import Seen
from lmworks.serve.loadtest import percentiles

require("prometheus_client", extra="serve")
from prometheus_client import CollectorRegistry, Counter, Histogram  # noqa: E402

RESULTS = ("agrees", "differs", "dropped", "failed")
VERSIONS = ("current", "challenger")
BUCKETS = tuple(0.001 * 2**i for i in range(16))  # 1 ms … 33 s
KEPT = 1000  # requests whose times are kept
Said = Sequence[tuple[str, bool | None]]


@dataclass
class Tally:
    """One challenger's counts since it was loaded."""

    numbers: Numbers[str] = field(default_factory=Numbers)
    strange: Numbers[str] = field(default_factory=Numbers)
    judged: Numbers[str] = field(default_factory=Numbers)  # texts of which the version said whether they are strange
    seconds: dict[str, deque[float]] = field(default_factory=lambda: {name: deque(maxlen=KEPT) for name in VERSIONS})

    def state(self) -> dict[str, Any]:
        """Return it for people: shares are null where nothing was counted."""
        compared = self.numbers["agrees"] + self.numbers["differs"]
        return {
            "texts": compared, **{name: self.numbers[name] for name in RESULTS},
            "agreement": self.numbers["agrees"] / compared if compared else None,
            "seconds": {name: percentiles(times) for name, times in self.seconds.items()},
            "out_of_domain": {name: self.strange[name] / self.judged[name] if self.judged[name] else None
                              for name in VERSIONS},
        }  # fmt: skip


def read(answer: Any) -> tuple[str, bool | None]:
    """Return the label of an answer, and whether its text was strange, where that is known."""
    if isinstance(answer, Seen):
        return answer.labels[0].label, answer.ood
    return answer[0].label, None


class Counts:
    """The metrics of all models' shadows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        two = ("model", "version")
        self.total = Counter("lmworks_shadow", "Texts that a challenger was asked", ("model", "result"),
                             registry=registry)  # fmt: skip
        self.seconds = Histogram("lmworks_shadow_seconds", "Of a request", two, buckets=BUCKETS, registry=registry)
        self.strange = Counter("lmworks_shadow_out_of_domain", "Strange texts", two, registry=registry)

    def add(self, name: str, tally: Tally, result: str, number: int) -> None:
        """Count texts."""
        tally.numbers[result] += number
        self.total.labels(name, result).inc(number)

    def dropped(self, name: str, tally: Tally, number: int) -> None:
        """Count texts that the challenger was not asked, as others waited."""
        self.add(name, tally, "dropped", number)

    def failed(self, name: str, tally: Tally, number: int) -> None:
        """Count texts that the challenger could not answer."""
        self.add(name, tally, "failed", number)

    def compared(self, name: str, tally: Tally, ours: Said, theirs: Said, *seconds: float) -> None:
        """Count the answers of both to the same texts, and how long each took."""
        for (label, _), (other, _) in zip(ours, theirs, strict=True):
            self.add(name, tally, "agrees" if label == other else "differs", 1)
        for version, said, time in zip(VERSIONS, (ours, theirs), seconds, strict=True):
            self.seconds.labels(name, version).observe(time)
            tally.seconds[version].append(time)
            flags = [flag for _, flag in said if flag is not None]
            tally.judged[version] += len(flags)
            tally.strange[version] += sum(flags)
            self.strange.labels(name, version).inc(sum(flags))
