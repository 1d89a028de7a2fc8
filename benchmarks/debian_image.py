"""Build a Dockerfile in a bootstrapped Debian root, and run the result as a container engine would. Needs root.

For machines without an engine. FROM python:X-slim is Debian's own release with that Python (debootstrap); COPY, RUN,
ENV, USER and ENTRYPOINT are taken as they stand, anything else but HEALTHCHECK, EXPOSE and STOPSIGNAL is an error. The
server then runs as process 1 of its own process space, as the user that the file names, without capabilities, on a root
that is mounted read-only, with /tmp and /dev/shm in memory. The network is the machine's.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RELEASES = {"3.11": "bookworm", "3.13": "trixie"}  # whose python3 it is
PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
PIP = ("/etc/pip.conf", "/etc/resolv.conf", f"/{CERTIFICATES}")  # of this machine, for the stages that fetch
PATIENCE = 300  # seconds
LEFT_ALONE = {"HEALTHCHECK", "EXPOSE", "STOPSIGNAL", "#"}


@dataclass
class Stage:
    """One stage: its root and what it says about running."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    entry: list[str] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)

    @property
    def added_bytes(self) -> int:
        """Bytes that the stage adds to its base: what COPY brought."""
        return sum(path.lstat().st_size for top in self.copied for path in [top, *top.rglob("*")] if not path.is_dir())


def build(folder: Path, work: Path, *, bases: Path | None = None) -> Stage:
    """Build the Dockerfile in `folder` below `work`; return its last stage. `bases` keeps what is bootstrapped."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in (folder / "Dockerfile").read_text().splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word or word in LEFT_ALONE:
            continue
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stage = Stage(work / f"stage-{len(stages)}")
            shutil.rmtree(stage.root, ignore_errors=True)
            subprocess.run(["cp", "-a", make_base(image, bases or work), stage.root], check=True)
            stages[name or str(len(stages))] = stage
            continue
        assert stage is not None, "FROM comes first"
        if word == "COPY":
            copy(stage, shlex.split(rest), folder, stages)
        elif word == "RUN":
            run_in(stage, rest)
        elif word == "ENV":
            stage.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "USER":
            stage.user = rest
        elif word == "ENTRYPOINT":
            stage.entry = json.loads(rest)
        else:
            raise ValueError(f"{word} is not known here")
    assert stage is not None
    return stage


def make_base(image: str, work: Path) -> Path:
    """Bootstrap the release that has this Python, once."""
    release = RELEASES[image.removeprefix("python:").removesuffix("-slim")]
    base = work / release
    if not base.exists():
        staged = work / f"{release}.staged"
        shutil.rmtree(staged, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(staged)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (staged / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        staged.rename(base)
    return base


def copy(stage: Stage, words: list[str], folder: Path, stages: dict[str, Stage]) -> None:
    """Do what COPY does: files into a folder, or one folder as another."""
    source = folder
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")].root
    *names, place = words
    target = stage.root / place.lstrip("/")
    for name in names:
        one = source / name.lstrip("/")
        into = target / one.name if place.endswith("/") else target
        into.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", one, into], check=True)
        stage.copied.append(into)


def run_in(stage: Stage, command: str) -> None:
    """Run a command in a stage that fetches: with this machine's way to its package index."""
    for name in PIP:
        if Path(name).exists():
            shutil.copyfile(name, stage.root / name.lstrip("/"))
    passed = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    environment = {
        **passed,
        "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        **stage.environment,
    }
    subprocess.run(["unshare", "--mount", "--pid", "--fork", "chroot", str(stage.root), "/bin/sh", "-c", command],
                   env=environment, check=True)  # fmt: skip


START = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -t tmpfs -o size=256m tmpfs "$ROOT/tmp"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
mkdir "$ROOT/dev/shm" && mount -t tmpfs -o size=64m tmpfs "$ROOT/dev/shm"
for node in "null 1 3" "zero 1 5" "random 1 8" "urandom 1 9"; do
  set -- $node
  mknod -m 666 "$ROOT/dev/$1" c "$2" "$3"
done
mount -o remount,bind,ro "$ROOT"
exec chroot "$ROOT" setpriv --reuid "${USER_IDS%:*}" --regid "${USER_IDS#*:}" --clear-groups --inh-caps=-all \\
  --bounding-set=-all --no-new-privs env -i PATH=/usr/local/bin:/usr/bin:/bin $ENVIRONMENT $ENTRY
"""


@contextmanager
def running(stage: Stage, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the entry point with more words after it; yield the outer process and the number of the server's own."""
    words = {"ENVIRONMENT": [f"{name}={value}" for name, value in stage.environment.items()],
             "ENTRY": [*stage.entry, *more]}  # fmt: skip
    assert not any(" " in word for some in words.values() for word in some)
    given = {name: " ".join(some) for name, some in words.items()}
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", START],
        env={"PATH": os.environ["PATH"], "ROOT": str(stage.root), "USER_IDS": stage.user, **given},
    )
    server = 0
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while process.poll() is None and not children.read_text().split():
            pass
        server = int(children.read_text().split()[0])
        yield process, server
    finally:
        if server and process.poll() is None:  # --kill-child is forgotten when the child becomes another user
            os.kill(server, signal.SIGKILL)
        process.kill()
        process.wait()


def wait_for(request: str | urllib.request.Request, process: subprocess.Popen[bytes]) -> tuple[float, bytes]:
    """Ask until there is an answer; return the seconds that it took and the answer."""
    start = time.perf_counter()
    while process.poll() is None and time.perf_counter() - start < PATIENCE:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return time.perf_counter() - start, answer.read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise RuntimeError("the server ended" if process.poll() is not None else f"no answer in {PATIENCE} s")


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
