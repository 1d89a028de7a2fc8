"""Told to end before there is anything to end: a server that is still starting goes at once, with exit code 0."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """End the process with exit code 0 on Ctrl-C and SIGTERM, inside the block and until it listens for them itself."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int, frame: Any) -> None:
    """End here: an exception could be lost in the import of a library, and there is nothing yet to close."""
    os._exit(0)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes that are started inside the block hear neither Ctrl-C nor SIGTERM, from their first instruction.

    A terminal sends Ctrl-C to all of its processes; one that cannot ignore it yet would end in a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    with suppress(OSError):  # to have no process may be what the block is about to find out
        resource_tracker.ensure_running()  # started inside, it would take the mask off
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
