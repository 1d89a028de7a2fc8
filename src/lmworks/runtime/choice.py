"""Which way of running a folder is fastest on this machine: measured once, then remembered.

A way is a runtime and a dtype. float32 is the reference; a lossy way stands for choice only where the folder's
certificate shows that it kept every decision, or where the user asks for any dtype. What was measured lies in a small
file, found again by what the folder holds, the machine and the versions: none of it is measured twice.

    cost = start + 100 rounds      a runtime that starts late must make up for it
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.files import read_json, write_json
from lmworks.base.hub_cache import home_folder
from lmworks.base.optional import is_installed
from lmworks.base.threads import thread_count
from lmworks.models.config import Config
from lmworks.models.families import read_config
from lmworks.runtime.base import Runtime

ANY = "any"  # the dtype of a user who takes the fastest, lossy or not
START = {"onnx": 0.1, "torch": 1.0}  # seconds until the library is imported, about
TIMES = 100
MARGIN = 0.95  # of the best so far: a later way must beat it by more than chance
LEAST_CHECKED = 16  # decisions of a certificate that say something
TOKENS, ROWS, PROMPT, STEPS = 128, 8, 32, 16  # what is measured: a text and a ragged batch; or a prompt and its end
WARM, ROUNDS, SECONDS = 2, 7, 4.0  # rounds before any counts; rounds, and the time after which no round begins
SAMPLE, SAMPLES = 1 << 12, 32  # bytes, and places in a large file, that tell it from another
APART = 1e-3  # of the largest number: what a graph and the weights may differ by in float32, and be the same model
LARGE = 4_000_000_000  # bytes of weights and graphs above which the ways do not lie in memory together
ENGINES = {"onnx": "onnxruntime", "torch": "lmworks.runtime.torch_runtime"}
FORMAT = 1
PACKAGES = ("lmworks", "torch", "onnxruntime")
log = logging.getLogger("lmworks")


class Way(NamedTuple):
    """How a folder may be run."""

    runtime: str  # "torch" | "onnx"
    dtype: str

    def __str__(self) -> str:
        return f"{self.runtime} {self.dtype}"


class Choice(NamedTuple):
    """What was chosen, and why."""

    way: Way
    why: str
    measured: bool = False  # now, not remembered


def find_ways(folder: Path, graphs: Sequence[str], dtype: str) -> list[Way]:
    """Return the ways to run a folder in this dtype, the one that starts sooner first; "auto" and "any" are several."""
    installed = {name: is_installed(package) for name, package in (("onnx", "onnxruntime"), ("torch", "torch"))}
    ways = [Way("onnx", graph) for graph in graphs] if installed["onnx"] else []
    if installed["torch"] and (any(folder.glob("model*.safetensors*")) or not ways):
        ways.insert(int(Way("onnx", "fp32") in ways), Way("torch", "fp32"))
        ways.append(Way("torch", "bf16"))
    if dtype == ANY:
        return ways
    if dtype != "auto":
        return [way for way in ways if way.dtype == dtype]
    if not any(way.dtype == "fp32" for way in ways):
        return ways[:1]
    kept = kept_decisions(folder)
    return [way for way in ways if way.dtype == "fp32" or way in kept]


def kept_decisions(folder: Path) -> set[Way]:
    """Return the ways of which the certificate says that every decision, and enough of them, was kept."""
    path = folder / "certificate.json"
    try:
        runtimes = read_json(path).get("runtimes") if path.is_file() else None
    except LmworksError:  # `inspect` tells of it
        return set()
    found = set()
    for runtime, cells in runtimes.items() if isinstance(runtimes, dict) else ():
        for dtype, cell in cells.items() if isinstance(cells, dict) else ():
            equal = (cell.get("decisions_equal") or cell.get("tokens_equal")) if isinstance(cell, dict) else None
            if equal and cell.get("passed") and equal[0] == equal[1] >= LEAST_CHECKED:
                found.add(Way(runtime, dtype))
    return found


def choose(
    folder: Path, ways: Sequence[Way], open_way: Callable[[Way], Runtime], *, head: str, threads: int | None = None
) -> Choice:
    """Return the fastest of these ways, remembered or, the first time, measured."""
    if len(ways) == 1:
        return Choice(ways[0], f"{ways[0]} is the only way that keeps the answers here")
    key = describe(folder, ways, head, threads)
    path = remembered_at(key)
    known = recall(path)
    if known is not None:
        return known
    log.info("measuring %s on this machine, once: %s", folder.name, ", ".join(map(str, ways)))
    size = sum(path.stat().st_size for path in weights(folder))
    answers: dict[Way, NDArray[Any]] = {}
    costs, problems = measure(ways, open_way, read_config(folder), head, together=size < LARGE, answers=answers)
    stale = find_stale(answers)
    if stale:
        log.warning("%s: %s", folder.name, stale)
        costs, problems = {way: cost for way, cost in costs.items() if way.runtime != "onnx"}, [*problems, stale]
    if not costs:
        raise InputError("nothing runs this model", where=str(folder), found="; ".join(problems))
    best = next(iter(costs))
    for way in costs:
        if costs[way] < MARGIN * costs[best]:
            best = way
    shown = ", ".join(f"{way} {1e3 * cost / TIMES:.3g} ms" for way, cost in costs.items())
    why = f"{best}: the fastest here of {shown} a round, with a {TIMES}th of the start"
    why += f" (left out: {'; '.join(problems)})" if problems else ""
    record = {"format": FORMAT, "folder": str(folder.absolute()), "runtime": best.runtime, "dtype": best.dtype,
              "why": why, "date": datetime.now(UTC).isoformat(timespec="seconds"), **key}  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        log.info("%s; remembered in %s", why, path)
    except (OSError, LmworksError) as error:
        log.warning("%s; it cannot be remembered (%s): set LMWORKS_CACHE to a folder you may write to", why, error)
    return Choice(best, why, measured=True)


def find_stale(answers: Mapping[Way, NDArray[Any]]) -> str:
    """Say in words that the graphs are not those of the weights beside them; "" where both give the same numbers."""
    known, given = answers.get(Way("torch", "fp32")), answers.get(Way("onnx", "fp32"))
    if known is None or given is None:
        return ""
    apart = np.abs(known - given).max(initial=0) if known.shape == given.shape else math.inf
    if apart <= APART * max(float(np.abs(known).max(initial=0)), 1.0):
        return ""
    return (
        f"its graphs were made of other weights (a number differs by {apart:.2g}) and are not used: export them again"
    )


def describe(folder: Path, ways: Sequence[Way], head: str, threads: int | None) -> dict[str, Any]:
    """Return what a choice depends on: the folder's content, the ways, the task, the machine, the versions."""
    return {
        "content": content_hash(folder), "ways": [str(way) for way in ways], "task": head,
        "machine": {"processor": read_processor(), "threads": threads or thread_count()},
        "versions": {name: found for name in PACKAGES if (found := read_version(name))},
    }  # fmt: skip


def content_hash(folder: Path) -> str:
    """Return a hash of the config, and of names, sizes and samples of weights and graphs: instant for any size."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weights(folder):
        size = path.stat().st_size
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for place in range(SAMPLES):
                file.seek(max(size - SAMPLE, 0) * place // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def weights(folder: Path) -> list[Path]:
    """Return the files of weights and graphs."""
    files = (*folder.glob("*.safetensors"), *folder.glob("onnx/*"))
    return sorted(path for path in files if path.is_file())


def read_processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def read_version(package: str) -> str:
    """Return the version of a package, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def choices_folder() -> Path:
    """Return where choices lie: LMWORKS_CACHE, else beside the Hub's cache."""
    named = os.environ.get("LMWORKS_CACHE")
    return (Path(named).expanduser() if named else home_folder() / "lmworks") / "runtimes"


def remembered_at(key: Mapping[str, Any]) -> Path:
    """Return the file of a choice."""
    return choices_folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def recall(path: Path) -> Choice | None:
    """Return a remembered choice; one that cannot be read is none, and is said to be none."""
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if record.get("format") == FORMAT and str(record["why"]):
            return Choice(Way(record["runtime"], record["dtype"]), record["why"])
    except (LmworksError, KeyError, OSError):
        pass
    log.warning("%s cannot be read: it is measured again", path)
    return None


def list_choices(folder: Path) -> list[dict[str, Any]]:
    """Return what is remembered of a folder's content: runtime, dtype, task, why, date."""
    if not (folder / "config.json").is_file() or not choices_folder().is_dir():
        return []
    content, found = content_hash(folder), []
    for path in sorted(choices_folder().glob("*.json")):
        try:
            record = read_json(path)
        except LmworksError:
            continue
        if record.get("content") == content:
            found.append({name: record.get(name) for name in ("runtime", "dtype", "task", "why", "date")})
    return found


def measure(
    ways: Sequence[Way], open_way: Callable[[Way], Runtime], config: Config, head: str, *, together: bool = True,
    answers: dict[Way, NDArray[Any]] | None = None,
) -> tuple[dict[Way, float], list[str]]:  # fmt: skip
    """Return each way's cost in seconds, and why some ways were left out. The ways take turns, where all have room.

    `answers` takes what each way said first.
    """
    if not together:
        parts = [measure([way], open_way, config, head, answers=answers) for way in ways]
        return {way: cost for costs, _ in parts for way, cost in costs.items()}, [
            p for _, found in parts for p in found
        ]
    runtimes: dict[Way, Runtime] = {}
    starts: dict[Way, float] = {}
    problems = []
    for way in ways:
        try:
            import_module(ENGINES[way.runtime])
            begun = time.perf_counter()
            runtimes[way] = open_way(way)
            starts[way] = START[way.runtime] + time.perf_counter() - begun
        except (LmworksError, ImportError) as error:
            problems.append(f"{way}: {error.what if isinstance(error, LmworksError) else error}")
    work = make_work(config, head, min((runtime.max_length for runtime in runtimes.values()), default=1))
    seconds: dict[Way, list[float]] = {way: [] for way in runtimes}
    begun = time.perf_counter()
    for turn in range(WARM + ROUNDS):
        if turn > WARM and time.perf_counter() - begun > SECONDS:
            break
        for way, runtime in runtimes.items():
            start = time.perf_counter()
            said = work(runtime)
            if answers is not None:
                answers.setdefault(way, np.array(said))
            if turn >= WARM:
                seconds[way].append(time.perf_counter() - start)
    return {way: starts[way] + TIMES * statistics.median(times) for way, times in seconds.items()}, problems


def make_work(config: Config, head: str, longest: int) -> Callable[[Runtime], NDArray[Any]]:
    """Return what is measured: an image; a prompt and some tokens; or a long text and a ragged batch.

    It returns its first numbers.
    """
    rng = np.random.default_rng(0)
    if config.vision is not None:
        v = config.vision
        pixels = rng.standard_normal((1, v.num_channels, v.image_size, v.image_size)).astype(np.float32)
        return lambda runtime: first(runtime.run({"pixel_values": pixels}))
    if head == "CausalLM":
        prompt = rng.integers(0, config.vocab_size, max(1, min(PROMPT, longest - STEPS))).tolist()

        def write(runtime: Runtime) -> NDArray[Any]:
            said = runtime.prefill([0], [prompt])
            for _ in range(min(STEPS, longest - len(prompt))):
                runtime.step([0], prompt[:1])
            return said

        return write
    lengths = [max(1, min(longest, TOKENS * (row + 1) // ROWS)) for row in reversed(range(ROWS))]
    ids = rng.integers(0, config.vocab_size, (ROWS, lengths[0]))
    mask = (np.arange(lengths[0]) < np.array(lengths)[:, None]).astype(np.int64)
    halves = [list(group) for _, group in groupby(range(ROWS), key=lambda row: 2 * row // ROWS)]

    def read(runtime: Runtime) -> NDArray[Any]:
        said = first(runtime.run({"input_ids": ids[:1], "attention_mask": mask[:1]}))
        for rows in halves:  # as texts of like length share a batch
            width = lengths[rows[0]]
            runtime.run({"input_ids": ids[rows, :width], "attention_mask": mask[rows, :width]})
        return said

    return read


def first(numbers: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the first of a runtime's outputs."""
    return next(iter(numbers.values()), np.empty(0))
