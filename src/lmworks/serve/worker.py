"""One thread that owns the model: requests wait in a line, their text comes back to the event loop piece by piece."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from typing import Any

from lmworks.base.errors import LmworksError
from lmworks.base.types import Generation
from lmworks.runtime.predictor import Predictor

WAITING = 64  # requests in line; one more is refused


class Full(LmworksError):
    """Too many requests wait already."""


class Job:
    """One prompt, and the way back to whoever waits for its text."""

    def __init__(self, prompt: str, settings: dict[str, Any]) -> None:
        self.prompt, self.settings = prompt, settings
        self.cancelled = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[str | Generation | BaseException] = asyncio.Queue()

    def tell(self, item: str | Generation | BaseException) -> None:
        """Hand something to the event loop, from the model's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Worker:
    """The thread. A request whose client went away is dropped at its next token."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.line: queue.Queue[Job | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self.work, name="lmworks-model", daemon=True)
        self.thread.start()

    async def run(self, prompt: str, settings: dict[str, Any]) -> AsyncGenerator[str | Generation, None]:
        """Yield pieces of text, then the Generation. Raises Full, and whatever generating raises."""
        job = Job(prompt, settings)
        try:
            self.line.put_nowait(job)
        except queue.Full:
            raise Full("the server is busy", found=f"{WAITING} requests waiting", fix="try again later") from None
        try:
            while True:
                item = await job.pieces.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Generation):
                    return
        finally:
            job.cancelled.set()

    def work(self) -> None:
        """Answer one job after the other until None comes."""
        while (job := self.line.get()) is not None:
            try:
                self.answer(job)
            except BaseException as error:
                job.tell(error)

    def answer(self, job: Job) -> None:
        """Generate for one job."""
        if job.cancelled.is_set():
            return
        stream = self.predictor.generate(job.prompt, stream=True, **job.settings)
        for piece in stream:
            job.tell(piece)
            if job.cancelled.is_set():
                stream.close()
                return
        job.tell(stream.result)

    def close(self) -> None:
        """End the thread once what it works on is done."""
        while True:
            try:
                self.line.get_nowait()
            except queue.Empty:
                break
        self.line.put(None)
        self.thread.join(10)
