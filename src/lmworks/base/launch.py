"""What a launcher (torchrun, Ray Train) says of this process, in its environment: its rank among how many. Torch-free.

A rank is one of the processes that train one model together, one a device; rank 0 alone writes and speaks.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NEEDED = (*PLACE, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process: of `world` in all, and of `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def read_launch() -> Launch:
    """Return the place of this process; that of a single one where no launcher started it."""
    if any(not os.environ.get(name) for name in NEEDED):
        return Launch()
    return Launch(*(int(os.environ[name]) for name in PLACE))


def end(code: int) -> NoReturn:
    """End this process; one of several without taking it apart, in which gloo's threads now and then abort it."""
    if read_launch().world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
