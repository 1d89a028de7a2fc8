"""How many processors, and how much memory, this process may really use: the smallest of machine, affinity and cgroup.

Inside a container the machine's core count is a trap: libraries that start a thread a core fight each other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lmworks.base.launch import read_launch

CGROUP = Path("/sys/fs/cgroup")


def rest_while_waiting() -> None:
    """Let OpenMP threads sleep instead of spin while they wait for each other; call it before torch is imported.

    Spinning threads hold the processors that the others wait for: beside another busy process, a training step took two
    to four times as long. A user's own OMP_WAIT_POLICY stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def cpu_count(*, cgroup: Path = CGROUP) -> int:
    """Return the number of processors to use, at least 1; `LMWORKS_THREADS` overrides it.

    Processes that a launcher started on this machine share its processors evenly.
    """
    wanted = os.environ.get("LMWORKS_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_quota(cgroup)
    return max(1, (allowed if quota is None else min(allowed, int(quota))) // read_launch().local_world)


def thread_count(*, cgroup: Path = CGROUP) -> int:
    """Return the number of threads that products may use: a processor each, `OMP_NUM_THREADS` at most.

    `LMWORKS_THREADS` is stronger; and torchrun's OMP_NUM_THREADS=1 is its default rather than anyone's wish.
    """
    usable, bound = cpu_count(cgroup=cgroup), os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if os.environ.get("LMWORKS_THREADS") or read_launch().local_world > 1:
        return usable
    return min(usable, int(bound)) if bound.isdigit() and int(bound) > 0 else usable  # "4,2": a number for each level


def read_quota(cgroup: Path) -> float | None:
    """Return the cgroup's processor quota in cores (version 2, then 1), or None where there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = float((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        return microseconds / float((cgroup / "cpu" / "cpu.cfs_period_us").read_text()) if microseconds > 0 else None
    except (OSError, ValueError):
        return None


def read_memory(cgroup: Path = CGROUP) -> tuple[int, int] | None:
    """Return the bytes of memory that there are and that are free, within the container's limit; None off Linux."""
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        total, free = int(rows["MemTotal"]) * 1024, int(rows["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text())
        return min(total, limit), min(free, limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total, free
