"""Where the time of an answer goes: a table of stages and layers, and a file for chrome://tracing or ui.perfetto.dev.

    load | tokenise | batch | forward (or prefill, step) | post-process | decode (a token: choice and text)

Torch is watched by its profiler and by hooks on every module, ONNX Runtime by its own profile; a layer's time is its
own, without that of the layers inside it. Without `tracing` a stage costs one look at a variable.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from lmworks.base.errors import InputError
from lmworks.base.files import write_text
from lmworks.base.report import Report, Table

FORWARD = ("forward", "prefill", "step")
MILLION = 1_000_000
NOTHING: AbstractContextManager[None] = nullcontext()
running: Trace | None = None  # that of this process, where there is one

Event = dict[str, Any]


class Trace:
    """What is being noted: stages, layers and kernels, each event in microseconds since 1970."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.stages: dict[str, list[float]] = {}  # seconds
        self.layers: dict[str, list[float]] = {}  # seconds of its own, by the class of a module or an operator
        self.sessions: list[Any] = []  # of ONNX Runtime, with profiles
        self.folder = Path(tempfile.mkdtemp(prefix="lmworks-trace-"))
        self.ends: list[Callable[[], None]] = []
        self.watches_torch = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long a block takes."""
        at, start = time.time_ns(), time.perf_counter_ns()
        try:
            yield
        finally:
            taken = time.perf_counter_ns() - start
            self.note("stages", name, at / 1e3, taken / 1e3)
            self.stages.setdefault(name, []).append(taken / 1e9)

    def note(self, kind: str, name: str, at: float, taken: float, **more: Any) -> None:
        """Add one event."""
        self.events.append(
            {"ph": "X", "pid": kind, "tid": 0, "cat": kind, "name": name, "ts": at, "dur": taken, **more}
        )

    def ask_profile(self, options: Any) -> None:
        """Let the session that is opened with these options keep a profile."""
        options.enable_profiling = True
        options.profile_file_prefix = str(self.folder / f"session{len(self.sessions)}")

    def watch_torch(self) -> None:
        """Start torch's profiler, and time every module's own part; once."""
        if self.watches_torch:
            return
        self.watches_torch = True
        import torch
        from torch.nn.modules import module

        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=kinds)
        profiler.start()
        open_calls: list[list[int]] = []  # [start, time of the layers inside], nanoseconds

        def enter(layer: Any, inputs: Any) -> None:
            open_calls.append([time.perf_counter_ns(), 0])

        def leave(layer: Any, inputs: Any, output: Any) -> None:
            start, inside = open_calls.pop()
            taken = time.perf_counter_ns() - start
            if open_calls:
                open_calls[-1][1] += taken
            name = type(layer).__name__
            self.note("layers", name, (time.time_ns() - taken) / 1e3, taken / 1e3)
            self.layers.setdefault(name, []).append((taken - inside) / 1e9)

        hooks = (
            module.register_module_forward_pre_hook(enter),
            module.register_module_forward_hook(leave, always_call=True),
        )

        def end() -> None:
            for hook in hooks:
                hook.remove()
            profiler.stop()
            path = self.folder / "torch.json"
            profiler.export_chrome_trace(str(path))
            self.take_torch(json.loads(path.read_text(encoding="utf-8")))

        self.ends.append(end)

    def take_torch(self, found: dict[str, Any]) -> None:
        """Add the events of torch's profiler, whose times begin at a base of their own."""
        base = found.get("baseTimeNanoseconds", 0) / 1e3
        for event in found["traceEvents"]:
            if event.get("ph") == "X":
                self.events.append({**event, "pid": f"torch {event.get('cat', '')}".strip(), "ts": event["ts"] + base})

    def take_session(self, session: Any) -> None:
        """Add the profile of an ONNX Runtime session; its times begin with the session."""
        base = session.get_profiling_start_time_ns() / 1e3
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        for event in events:
            if event.get("ph") != "X":
                continue
            self.events.append({**event, "pid": "onnxruntime", "ts": event["ts"] + base})
            if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
                name = str(event.get("args", {}).get("op_name", event["name"]))
                self.layers.setdefault(name, []).append(event["dur"] / MILLION)

    def finish(self) -> None:
        """Stop watching and collect what the engines noted."""
        try:
            for end in self.ends:
                end()
            for session in self.sessions:
                self.take_session(session)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def to_json(self) -> dict[str, Any]:
        """Return the file's content: Trace Event Format, the object form."""
        kinds = list(dict.fromkeys(event["pid"] for event in self.events))
        first = min((event["ts"] for event in self.events), default=0.0)
        names = [{"ph": "M", "pid": i, "name": "process_name", "args": {"name": kind}} for i, kind in enumerate(kinds)]
        events = [{**event, "pid": kinds.index(event["pid"]), "ts": event["ts"] - first} for event in self.events]
        return {"displayTimeUnit": "ms", "traceEvents": names + events}

    def report(self) -> Report:
        """Return the time of each stage, and of each kind of layer within the forward passes."""
        forward = sum(sum(self.stages.get(name, ())) for name in FORWARD)
        stages = {name: sum(times) for name, times in self.stages.items()}
        rows = [(name, len(self.stages[name]), seconds) for name, seconds in stages.items()]
        layers = sorted(self.layers.items(), key=lambda item: -sum(item[1]))
        shares = tuple((name, len(times), sum(times), share(sum(times), forward)) for name, times in layers)
        total = sum(stages.values())
        parts = tuple((*row, share(row[2], total)) for row in rows)
        return Report(
            "Where the time went", {"stages": stages, "layers": {name: sum(times) for name, times in layers}},
            tables=(
                Table("Stages", ("stage", "times", "seconds", "share"), parts),
                Table("Layers, each without those inside", ("layer", "times", "seconds", "of forward"), shares),
            ),
        )  # fmt: skip


def share(part: float, whole: float) -> str:
    """Return a part in per cent."""
    return f"{part / whole:.1%}" if whole else ""


def stage(name: str) -> AbstractContextManager[None]:
    """Note a stage where somebody traces; else do nothing."""
    return NOTHING if running is None else running.stage(name)


@contextmanager
def paused() -> Iterator[None]:
    """Note nothing inside the block."""
    global running
    held, running = running, None
    try:
        yield
    finally:
        running = held


@contextmanager
def tracing(path: str | Path | None, *, show: IO[str] | None = None) -> Iterator[Trace | None]:
    """Trace what is loaded and run inside the block, write the file at its end, and print the table (to stderr).

    None: trace nothing. The file is written also where the block fails. Raises InputError for a place that cannot hold
    a file, before anything is run, and for a trace within another.
    """
    global running
    if path is None:
        yield None
        return
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        found = "a folder" if path.is_dir() else "its folder does not exist"
        raise InputError("the trace cannot be written there", where=str(path), found=found, expected="a file's name")
    if running is not None:
        raise InputError("a trace is running already")
    trace = running = Trace()
    try:
        yield trace
    finally:
        running = None
        trace.finish()
        write_text(path, json.dumps(trace.to_json(), ensure_ascii=False))
        trace.report().print(sys.stderr if show is None else show)
