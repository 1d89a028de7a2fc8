"""Work on batches in several processes: results in order, few batches at a time, and no process outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from lmworks.base.errors import InputError, LmworksError

Batch = TypeVar("Batch")
Result = TypeVar("Result")
WAITING = 1  # batches that wait for each worker, so that none is idle while results are written


def map_batches(
    function: Callable[[Batch], Result], batches: Iterable[Batch], *, workers: int = 1
) -> Generator[Result, None, None]:
    """Yield `function` of each batch, in order; both travel to the workers by pickle.

    At most `2 · workers` batches are held at a time, however many there are. A single batch is worked on right here.
    Raises InputError for fewer than one worker.
    """
    if workers < 1:
        raise InputError("somebody has to work", found=f"--workers {workers}", expected="1 or more")
    rest = iter(batches)
    first = list(islice(rest, 2))
    if workers <= 1 or len(first) < 2:
        yield from map(function, chain(first, rest))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent)
    pending: deque[Future[Result]] = deque()
    try:
        for batch in chain(first, rest):
            pending.append(pool.submit(function, batch))
            if len(pending) > workers * (1 + WAITING):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise LmworksError(
            "a worker process was killed", found="most likely too little memory", fix="use fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def end_with(sentinel: int) -> None:
    """Wait until the parent is gone, and end this process."""
    wait([sentinel])
    os._exit(1)


@contextmanager
def show_progress(doing: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to tell how many more bytes are done; a bar appears if standard error is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: tuple[Any, ...] = (
        TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done: bar.advance(task, done)
