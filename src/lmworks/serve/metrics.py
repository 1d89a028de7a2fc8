"""What the server counts, for Prometheus: never a text, never a raw path, never a key.

lmworks_request_duration_seconds{route, status}   lmworks_requests_waiting   lmworks_engine_restarts_total
lmworks_working{model}   lmworks_slots_used{model}   lmworks_slots_total{model}   lmworks_kv_cache_usage_ratio{model}
lmworks_batches_total, lmworks_batch_rows_total, lmworks_batch_tokens_total {model}
lmworks_prompt_tokens_total, lmworks_prompt_tokens_reused_total, lmworks_generated_tokens_total {model}
lmworks_memory_bytes{process}   lmworks_ready   lmworks_model_info{model, task, runtime, dtype}
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmworks.base.optional import require
from lmworks.serve.supervisor import Supervisor

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

    def __init__(self, supervisor: Supervisor) -> None:
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
        self.registry.register(Engine(supervisor))

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
    """What the engine last told, as it is asked for."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.before: dict[tuple[str, str], float] = {}  # counts of engines that were replaced
        self.latest: dict[tuple[str, str], float] = {}

    def total(self, model: str, name: str, value: float) -> float:
        """Return a count that never falls, though a new engine begins at 0."""
        key = (model, name)
        if value < self.latest.get(key, 0):
            self.before[key] = self.before.get(key, 0) + self.latest[key]
        self.latest[key] = value
        return self.before.get(key, 0) + value

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        one = self.supervisor
        yield GaugeMetricFamily("lmworks_ready", "1 while requests are answered", value=float(one.ready))
        yield GaugeMetricFamily("lmworks_requests_waiting", "Requests in the engine", value=float(len(one.tickets)))
        yield CounterMetricFamily("lmworks_engine_restarts", "Engines that were replaced", value=float(one.restarts))
        memory = GaugeMetricFamily("lmworks_memory_bytes", "Memory held by a process", labels=("process",))
        for process, number in (("server", "self"), ("engine", str(one.process.pid))):
            memory.add_metric((process,), resident(number))
        yield memory
        info = GaugeMetricFamily("lmworks_model_info", "What is served", labels=("model", "task", "runtime", "dtype"))
        slots = GaugeMetricFamily("lmworks_slots_total", "Texts that are written at once", labels=("model",))
        used = GaugeMetricFamily("lmworks_slots_used", "Texts being written", labels=("model",))
        share = GaugeMetricFamily("lmworks_kv_cache_usage_ratio", "Share of the slots in use", labels=("model",))
        families = {name: CounterMetricFamily(f"lmworks_{ours}", what, labels=("model",))
                    for name, (ours, what) in COUNTERS.items()}  # fmt: skip
        for name, model in one.models.items():
            facts, counts = model.facts, model.counts
            info.add_metric((name, str(model.spec.task), facts.get("runtime", ""), facts.get("dtype", "")), 1)
            if "slots" in counts:
                slots.add_metric((name,), counts["slots"])
                used.add_metric((name,), counts["active"])
                share.add_metric((name,), counts["active"] / counts["slots"])
            for key, family in families.items():
                if key in counts:
                    family.add_metric((name,), self.total(name, key, counts[key]))
        yield from (info, slots, used, share, *families.values())


def resident(process: str) -> float:
    """Return the bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        for line in Path(f"/proc/{process}/status").read_text("utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0
