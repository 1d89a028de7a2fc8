"""What the server counts, for Prometheus: never a text, never a raw path, never a key.

lmworks_request_duration_seconds{route, status}   lmworks_requests_waiting   lmworks_engine_restarts_total
lmworks_working{model}   lmworks_slots_used{model}   lmworks_slots_total{model}   lmworks_kv_cache_usage_ratio{model}
lmworks_batches_total, lmworks_batch_rows_total, lmworks_batch_tokens_total {model}
lmworks_prompt_tokens_total, lmworks_prompt_tokens_reused_total, lmworks_generated_tokens_total {model}
lmworks_memory_bytes, lmworks_processor_seconds_total {process}   lmworks_ready
lmworks_model_info{model, task, runtime, dtype}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.optional import require

if TYPE_CHECKING:
    from lmworks.serve.service import Service

require("prometheus_client", extra="serve")
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest  # noqa: E402
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: E402

BUCKETS = tuple(0.01 * 2**i for i in range(14))  # 0.01 s … 81.92 s
COUNTERS = {  # the engine's name: ours, and what it is
    "batches": ("batches", "Batches run"),
    "rows": ("batch_rows", "Rows of all batches"),
    "tokens": ("batch_tokens", "Tokens of all batches"),
    "read_tokens": ("prompt_tokens", "Tokens of prompts that were read"),
    "reused_tokens": ("prompt_tokens_reused", "Tokens of prompts that a slot held already"),
    "written_tokens": ("generated_tokens", "Tokens written"),
}


class Metrics:
    """The counts of one server."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "lmworks_request_duration_seconds", "From the first byte to the last", ("route", "status"),
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "lmworks_time_to_first_token_seconds", "Of streamed texts", ("model",), buckets=BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self.active = Gauge("lmworks_working", "Requests being answered", ("model",), registry=self.registry)
        self.registry.register(Engine(service))

    @contextmanager
    def working(self, model: str) -> Iterator[None]:
        """Count a request while it is answered."""
        gauge = self.active.labels(model)
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()

    def done(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.seconds.labels(route, str(status)).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self.registry)


class Engine:
    """What the engines last told, as it is asked for."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.seen: dict[tuple[str, str, str], tuple[float, float]] = {}  # of versions that are gone; of the latest
        self.used: dict[int | None, float] = {}  # processor seconds of each engine's process

    def totals(self) -> dict[tuple[str, str], float]:
        """Return counts of all versions of a model that never fall, though a new engine begins at 0."""
        for model in self.service.versions:
            for key in COUNTERS.keys() & (model.counts.keys() | model.past.keys()):
                place = (model.spec.name, key, model.spec.folder)
                value = model.past.get(key, 0.0) + model.counts.get(key, 0.0)
                before, last = self.seen.get(place, (0.0, 0.0))
                self.seen[place] = (before + last if value < last else before, value)
        found: dict[tuple[str, str], float] = {}
        for (name, key, _), (before, last) in self.seen.items():
            found[name, key] = found.get((name, key), 0) + before + last
        return found

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        engines = self.service.engines
        waiting, restarts = sum(len(one.tickets) for one in engines), sum(one.restarts for one in engines)
        yield GaugeMetricFamily("lmworks_ready", "1 while requests are answered", value=float(not self.service.problem))
        yield GaugeMetricFamily("lmworks_requests_waiting", "Requests in the engine", value=float(waiting))
        yield CounterMetricFamily("lmworks_engine_restarts", "Engines that were replaced", value=float(restarts))
        memory = GaugeMetricFamily("lmworks_memory_bytes", "Memory held by a process", labels=("process",))
        memory.add_metric(("server",), resident("self"))
        memory.add_metric(("engine",), sum(resident(str(one.process.pid)) for one in engines))
        used = CounterMetricFamily("lmworks_processor_seconds", "Processor time of a process", labels=("process",))
        used.add_metric(("server",), processor_seconds("self"))
        for number in (one.process.pid for one in engines):
            self.used[number] = max(self.used.get(number, 0.0), processor_seconds(str(number)))
        used.add_metric(("engine",), sum(self.used.values()))
        yield from (memory, used)
        info = GaugeMetricFamily("lmworks_model_info", "What is served", labels=("model", "task", "runtime", "dtype"))
        slots = GaugeMetricFamily("lmworks_slots_total", "Texts that are written at once", labels=("model",))
        busy = GaugeMetricFamily("lmworks_slots_used", "Texts being written", labels=("model",))
        share = GaugeMetricFamily("lmworks_kv_cache_usage_ratio", "Share of the slots in use", labels=("model",))
        families = {name: CounterMetricFamily(f"lmworks_{ours}", what, labels=("model",))
                    for name, (ours, what) in COUNTERS.items()}  # fmt: skip
        for name, model in self.service.models.items():
            facts, counts = model.facts, model.counts
            info.add_metric((name, str(model.spec.task), facts.get("runtime", ""), facts.get("dtype", "")), 1)
            if "slots" in counts:
                slots.add_metric((name,), counts["slots"])
                busy.add_metric((name,), counts["active"])
                share.add_metric((name,), counts["active"] / counts["slots"])
        for (name, key), value in self.totals().items():
            families[key].add_metric((name,), value)
        yield from (info, slots, busy, share, *families.values())


def resident(process: str) -> float:
    """Return the bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        for line in Path(f"/proc/{process}/status").read_text("utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def processor_seconds(process: str) -> float:
    """Return the processor time that a process has used; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in the system and out of it
    except (OSError, IndexError):
        return 0.0
