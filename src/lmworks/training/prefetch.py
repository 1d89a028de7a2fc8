"""Batches made ahead of the step, by threads: `batch(step)` is a pure function, so the result is the same.

Threads rather than processes: torch, Pillow and NumPy give up Python's lock while they compute, a thread's error is the
original one, and no process can die or be left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from lmworks.base.types import Batch

AHEAD = 2  # batches a worker has ready, or in the making


class Prefetch:
    """Returns `make(step)` for steps that mostly follow each other, up to `last`; with no workers when it is asked."""

    def __init__(self, make: Callable[[int], Batch], *, workers: int = 0, last: int | None = None) -> None:
        self.make, self.workers, self.last = make, workers, last
        self.pool: ThreadPoolExecutor | None = None
        self.coming: dict[int, Future[Batch]] = {}

    def __enter__(self) -> Prefetch:
        if self.workers:
            self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)  # waits for at most one batch a worker
        self.pool, self.coming = None, {}

    def __call__(self, step: int) -> Batch:
        """Return this step's batch, and see that the next ones are on their way; raises what making it raised."""
        if self.pool is None:
            return self.make(step)
        end = step + 1 + AHEAD * self.workers
        steps = range(step, end if self.last is None else max(step + 1, min(end, self.last)))
        self.coming = {n: self.coming.get(n) or self.pool.submit(self.make, n) for n in steps}
        return self.coming.pop(step).result()
