"""Damaged and hostile folders: each ends in one of our errors, which names the file, or in a load that was verified."""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import mutate
from safetensors.torch import load_file
from strangers import KINDS

HERE = Path(__file__).parent
TRACE = int(os.environ.get("LMWORKS_TRACE", "1500"))  # letters of a traceback
SEED = int(os.environ.get("LMWORKS_SEED", "1"))
MEMORY = 200 << 20  # bytes more than before
SECONDS = 5.0  # of processor time; the clock on the wall belongs to whatever else runs here


class Opener:
    """The process that opens folders (opener.py); started again when a case ends it."""

    def __init__(self, prefix: tuple[str, ...] = ()) -> None:
        self.prefix, self.process = prefix, None

    def ask(self, **asked: Any) -> dict[str, Any]:
        if self.process is None:
            own = tempfile.mkdtemp(prefix="lmworks-choices-")  # without what other tests have measured
            more = {"OMP_NUM_THREADS": "1", "LMWORKS_THREADS": "1", "HF_HUB_OFFLINE": "1", "LMWORKS_CACHE": own}
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-X", "faulthandler", str(HERE / "opener.py")], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, **more}, text=True,
            )  # fmt: skip
        process: subprocess.Popen[str] = self.process
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], 60)
        line = process.stdout.readline() if ready else ""
        while ready and line and not line.startswith("\1"):
            line = process.stdout.readline()
        if not line:
            self.close()
            why = "hung" if not ready else "ended"
            return {"outcome": "broken", "error": why, "message": "", "events": [], "cpu": 0}
        return dict(json.loads(line[1:]))

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of folder, whole."""
    place = tmp_path_factory.mktemp("strangers")
    return {kind: make(place / kind) for kind, make in KINDS.items()}


def attack(
    good: dict[str, Path], place: Path, count: int, *, seed: int = 0, prefix: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Open `count` damaged folders, of every kind in turn; return what came of each."""
    opener, found = Opener(prefix), []
    kinds = list(KINDS)
    for i in range(count):
        kind, draw = kinds[i % len(kinds)], random.Random(f"{seed} {i}")
        folder, out, outside = place / f"{i}" / kind, place / f"{i}" / "out", place / f"{i}" / "outside"
        shutil.copytree(good[kind], folder, symlinks=True)
        outside.mkdir()
        file, what = mutate(draw, folder, outside)
        said = opener.ask(kind=kind, folder=str(folder), out=str(out), good=str(good[kind]))
        if said["outcome"] == "loaded" and "pickle" in kind:
            said = compare(said, folder, out / "made")
        names = {path.name for path in good[kind].rglob("*") if path.is_file()} | {"model.safetensors", "text 1"}
        case = f"{i}: {kind}: {file} {what}"
        found.append({**said, "names": sorted(names | {Path(file).name}), "case": case, "file": file, "kind": kind})
        shutil.rmtree(place / f"{i}")
    opener.close()
    return found


def compare(said: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Compare what was converted with torch's own reader."""
    wanted, made = {}, {}
    for path in folder.glob("pytorch_model*.bin"):
        wanted |= torch.load(path, weights_only=True)
    for path in out.glob("model*.safetensors"):
        made |= load_file(path)
    same = set(wanted) == set(made) and all(
        made[name].dtype == tensor.dtype and made[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()
        for name, tensor in wanted.items()
    )
    return said if same else {**said, "outcome": "broken", "error": "other tensors than torch's", "message": ""}


def judge(found: list[dict[str, Any]]) -> None:
    """Fail with every case that is neither a clear refusal nor a verified load."""
    wrong = []
    for case in found:
        if case["outcome"] == "broken":
            trace = case.get("trace", "")[-TRACE:] if TRACE else ""
            wrong.append(f"{case['case']}\n    {case['error']}: {case['message'][:300]}\n{trace}")
        if case["events"]:
            wrong.append(f"{case['case']}\n    did {case['events'][:4]}")
        if case["cpu"] > SECONDS:
            wrong.append(f"{case['case']}\n    took {case['cpu']:.1f} s")
        if case.get("memory", 0) > MEMORY:
            wrong.append(f"{case['case']}\n    took {case['memory'] >> 20} MB")
        if case["outcome"] == "refused" and not any(name in case["message"] for name in case["names"]):
            wrong.append(f"{case['case']}\n    does not name the file: {case['message'][:400]}")
    outcomes = Counter((case["kind"], case["outcome"]) for case in found)
    print(sorted(outcomes.items()))
    assert not wrong, f"{len(wrong)} of {len(found)}\n" + "\n".join(wrong)


def test_200_damaged_folders(good: dict[str, Path], tmp_path: Path) -> None:
    judge(attack(good, tmp_path, 200))


@pytest.mark.slow
def test_2000_damaged_folders(good: dict[str, Path], tmp_path: Path) -> None:
    judge(attack(good, tmp_path, 2000, seed=SEED))


def test_the_watch_sees_what_no_reader_may_do(tmp_path: Path) -> None:
    """The audit hook of opener.py can fail: files outside, processes, sockets, pickles and code are noted."""
    opener = Opener()
    said = opener.ask(kind="probe", folder=str(tmp_path / "a"), out=str(tmp_path / "b" / "out"), good=str(tmp_path))
    opener.close()
    seen = {event.split()[0] for event in said["events"]}
    wanted = {"open", "subprocess.Popen", "os.system", "socket.__new__", "pickle.find_class", "exec", "compile"}
    assert wanted <= seen, said
    assert sum("/etc/hostname" in event or ".beside" in event for event in said["events"]) == 2


SYSTEM = (
    "/lib",
    "/usr/lib",
    "/usr/share/zoneinfo",
    "/usr/share/locale",
    "/etc/os-release",
    "/etc/ld.so.",
    "/etc/localtime",
    "/proc/",
    "/sys/",
    "/dev/",
)
CALLS = "trace=open,openat,openat2,execve,execveat,socket,connect"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strace", [path for path in [shutil.which("strace")] if path])
def test_the_kernel_sees_no_more_than_the_audit(good: dict[str, Path], tmp_path: Path, strace: str) -> None:
    """What native readers open, strace shows: files of the folder and of the system's libraries, and no socket."""
    log, place = tmp_path / "strace.txt", tmp_path / "cases"
    place.mkdir()
    prefix = (strace, "-f", "-qq", "--seccomp-bpf", "-s", "500", "-e", CALLS, "-o", str(log))
    cases = attack(good, place, 220, seed=7, prefix=prefix)
    roots = [str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, HERE.parents[1], *sys.path) if p]
    allowed = (*SYSTEM, *roots, str(place), str(next(iter(good.values())).parent),
               str(Path(tempfile.gettempdir()) / "lmworks-choices-"))  # fmt: skip
    lines = log.read_text("utf-8", "replace").splitlines()
    assert len(lines) > 1000
    wrong = []
    for line in lines:
        found = re.search(r"(open|openat|openat2)\((?:AT_FDCWD, |\d+, )?\"([^\"]*)\".*= (-?\d+)", line)
        if found and int(found[3]) >= 0:
            path = os.path.normpath(found[2])
            if path.startswith("/") and (not path.startswith(allowed) or "/outside" in path):
                wrong.append(line)
        talks = re.search(r"(socket|connect)\(", line) and "AF_UNIX" not in line
        if talks or ("execve(" in line and sys.executable not in line and " = 0" in line):
            wrong.append(line)
    assert not wrong, f"{len(wrong)}\n" + "\n".join(wrong[:40])
    judge(cases)
