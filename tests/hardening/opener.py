"""A process that opens strangers' folders and says what came of it; Python's audit hook notes what it should not do.

A line of JSON {kind, folder, out} comes in, one goes out: {outcome, error, message, events, seconds, memory}.
`outcome` is "refused" (one of our own errors), "loaded" (opened, asked, and the tensors compared with the file's bytes
by a reader of this file's own), or "broken" (anything else).
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmworks
from lmworks.api import load
from lmworks.base.errors import LmworksError
from lmworks.base.hub_cache import find_cached, list_missing
from lmworks.evaluation.monitor import read_monitor
from lmworks.export.receipt import check_receipt
from lmworks.models.weights import read_tensors
from lmworks.runtime.batching import run_features
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.base import Feature
from lmworks.tokens.chat import render_chat
from lmworks.training.adapter_files import open_adapter
from lmworks.training.state import load_checkpoint, load_into
from lmworks.verbs import ngram_folder
from lmworks.verbs.converting import convert
from lmworks.verbs.inspection import inspect_folder

TYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "U8": np.dtype("u1")}
CHAT = [{"role": "user", "content": "hello"}]
# What an interpreter loads for itself: modules of the standard library, of installed packages, and our own
LIBRARIES = tuple(
    {*(str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix)), str(Path(lmworks.__file__).parent)}
)
CHILDREN = ("sandbox.py", "torch_file.py")  # the two processes with limits of their own, by the file that they run
HARMLESS = ("/dev/null", "/proc/self/", "/proc/cpuinfo", "/proc/meminfo", "/sys/fs/cgroup", "/sys/devices/system/cpu")
WATCHED = ("exec", "compile", "import", "open", "subprocess.", "socket.", "pickle.", "marshal.", "ctypes.",
           "urllib.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "http.", "ftplib.")  # fmt: skip


BASES = "nowhere"


class Watch:
    """The audit hook."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.events: list[str] | None = None
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None and event.startswith(WATCHED) and not self.is_harmless(event, arguments):
            self.events.append(f"{event} {str(arguments)[:300]}")

    def is_harmless(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path = arguments[0]
            if not isinstance(path, str | bytes | os.PathLike):
                return True  # a file that is open already
            text = os.path.normpath(Path.cwd() / os.fsdecode(path))  # links stay: the kernel's view is another test
            inside = any(text == place or text.startswith(f"{place}/") for place in (*self.allowed, *LIBRARIES))
            return inside or text.startswith(HARMLESS)
        if event in ("ctypes.dlopen", "ctypes.dlsym"):  # ours: glibc's mallopt, when a model is read for torch
            return "libc.so.6" in str(arguments[0]) and arguments[-1] in ("libc.so.6", "mallopt")
        if event == "import":
            return True  # what it opens and runs is looked at in its own events
        if event == "exec":
            return str(arguments[0].co_filename).startswith((*LIBRARIES, "<frozen ")) or is_importing()
        if event in ("compile", "marshal.loads", "marshal.load"):
            return is_importing()
        if event == "subprocess.Popen":
            command = list(arguments[1])
            return command[:3] == [sys.executable, "-I", "-S"] and Path(command[3]).name in CHILDREN
        if event in ("os.fork", "os.posix_spawn"):
            return False
        return False


def is_importing() -> bool:
    """Say whether the import system is at work, on a file of the libraries."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap_external>":
            return True
        frame = frame.f_back
    return False


def raw(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file without the library and without ours."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        part = data[8 + size + start : 8 + size + end]
        found[name] = np.frombuffer(part, TYPES[info["dtype"]]).reshape(info["shape"])
    return found


def compare(folder: Path) -> None:
    """Compare what was read with the bytes of the files."""
    wanted: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        wanted |= raw(path)
    found = read_tensors(folder)
    assert set(found) <= set(wanted)
    for name, tensor in found.items():
        assert tensor.numpy().tobytes() == wanted[name].tobytes(), name


def answer(folder: Path, out: Path, runtime: str = "torch") -> None:
    (labels,) = load(folder, "text-classification", runtime=runtime)(["a cat sat"])
    assert np.isfinite([label.score for label in labels]).all() and len(labels) >= 1
    if runtime == "torch":
        compare(folder)


def write_on(folder: Path, out: Path, runtime: str = "torch") -> None:
    predictor = load(folder, "text-generation", runtime=runtime)
    assert isinstance(predictor.generate("a cat", max_tokens=4).text, str)
    if predictor.tokenizer.chat_template is not None:
        assert isinstance(render_chat(predictor.tokenizer, CHAT), str)
    if runtime == "torch":
        compare(folder)


def embed(folder: Path, out: Path) -> None:
    vectors = load(folder, "feature-extraction", runtime="torch")(["a cat", "a dog"])
    assert np.isfinite(np.asarray(vectors, np.float64)).all()


def look(folder: Path, out: Path) -> None:
    (labels,) = load(folder, runtime="torch")([str(folder / "picture.png")])
    assert np.isfinite([label.score for label in labels]).all()


def adapted(folder: Path, out: Path) -> None:
    opened = open_adapter(folder)
    features = [Feature({"input_ids": np.array([2, 7, 8, 3])}, 0)]
    (logits,) = run_features(TorchRuntime(opened.model), features, output="logits")
    assert np.isfinite(logits).all()


def converted(folder: Path, out: Path) -> None:
    convert(folder, out, overwrite=True)
    answer(out, out)


def receipt(folder: Path, out: Path) -> None:
    found = check_receipt(folder)
    if not found["passed"]:
        said = found.get("problem") or f"{found['changed']} {found['missing']}"
        raise LmworksError(f"lmworks.json: {said}")


def monitor(folder: Path, out: Path) -> None:
    found = read_monitor(folder)
    if found is not None:
        assert np.isfinite(found.score(np.zeros((1, 3)), np.zeros((1, 16), np.float32))).all()


def counts(folder: Path, out: Path) -> None:
    opened = ngram_folder.load(folder)
    scores = opened.model.logprobs(opened.encode([b"a cat sat on", b"the dog"]))
    assert not np.isnan(np.asarray(scores)).any()


def resumed(folder: Path, out: Path) -> None:
    found = load_checkpoint(folder)
    if found is not None:
        load_into(found[0], torch.nn.Linear(4, 3))


def cache(folder: Path, out: Path) -> None:
    os.environ["HF_HUB_CACHE"] = str(folder)
    found = find_cached("org/name")
    if found is not None:
        assert not list_missing(found)
        answer(found, out)


def inspected(folder: Path, out: Path) -> None:
    json.dumps(inspect_folder(folder).to_dict(), allow_nan=False)


def probe(folder: Path, out: Path) -> None:
    """Do all that no reader may do."""
    Path("/etc/hostname").read_bytes()
    subprocess.run(["true"], check=True)
    os.system("true")
    socket.socket().close()
    pickle.loads(pickle.dumps(Path("x")))
    exec("1")
    Path(str(folder) + ".beside").write_text("x")
    raise LmworksError("probe")


OPENERS: dict[str, Callable[[Path, Path], None]] = {
    "classifier": answer, "shards": answer, "vocab.txt": answer, "language model": write_on, "vocab.json": write_on,
    "tokenizer.model": write_on, "inspected": inspected, "pickle": converted, "old pickle": converted,
    "pickle shards": converted, "graph": lambda f, o: answer(f, o, "onnx"),
    "graph with data": lambda f, o: answer(f, o, "onnx"), "graph that writes": lambda f, o: write_on(f, o, "onnx"),
    "adapter": adapted, "embedder": embed, "vision": look, "receipt": receipt, "monitor": monitor, "n-grams": counts,
    "ARPA": counts, "checkpoint": resumed, "cache": cache, "probe": probe,
}  # fmt: skip


def run(watch: Watch, kind: str, folder: Path, out: Path) -> dict[str, Any]:
    """Open one folder and say what came of it."""
    # the base model of an adapter is named by a path of its own
    watch.allowed = (f"{folder}", f"{out.parent}", f"{folder.parent / kind}", BASES)
    start, spent, most, watch.events = time.perf_counter(), used(), peak(), []
    error: BaseException | None = None
    try:
        OPENERS[kind](folder, out)
    except BaseException as caught:  # a panic of a native library is one
        error = caught
    events, watch.events = watch.events, None
    said = {"events": events, "seconds": time.perf_counter() - start, "cpu": used() - spent,
            "memory": peak() - most}  # fmt: skip
    if error is None:
        return {**said, "outcome": "loaded"}
    refused = isinstance(error, LmworksError)
    trace = "" if refused else "".join(traceback.format_exception(error))[-2500:]
    return {**said, "outcome": "refused" if refused else "broken", "error": type(error).__name__,
            "message": str(error), "trace": trace}  # fmt: skip


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def used() -> float:
    """Return the processor time of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    torch.set_num_threads(1)
    watch, warm = Watch(), set()
    global BASES
    for line in sys.stdin:
        asked = json.loads(line)
        kind, BASES = asked["kind"], str(Path(asked["good"]).with_name("adapter-base"))
        if kind not in warm and kind != "probe":  # the good folder first, so that what is loaded once has been
            warm.add(kind)
            for _ in range(2):
                first = run(watch, kind, Path(asked["good"]), Path(asked["out"]) / "good")
                assert first["outcome"] == "loaded", first
        print("\1" + json.dumps(run(watch, kind, Path(asked["folder"]), Path(asked["out"]) / "made")), flush=True)


if __name__ == "__main__":
    main()
