"""The server's side of the engine: requests go out, answers come back, and an engine that dies or hangs is replaced.

Ready means: the engine gave a sign of life just now, and every model that is loaded at the start is. When the engine is
replaced, requests that have not been answered in part are asked again, once; a text that was streaming ends in an
error, since nobody may be shown two beginnings.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, LmworksError, from_os_error
from lmworks.base.leaving import deaf_children
from lmworks.serve.engine import Spec, main
from lmworks.serve.slots import Took

SILENT = 1.2  # seconds without a sign of life after which the server is not ready
GONE = 2.5  # seconds after which the engine is replaced
STARVED = 10.0  # the same, and for readiness too, of an engine that would speak if it were given a processor
STARTING, SLOWEST = 60.0, 600.0  # seconds that the first sign of life may take; that it may while it is working on it
LOOK = 0.1  # seconds between two looks at the engine
RETRIES = 1  # times that a request is asked again
QUEUE = 256  # requests in the engine; one more is refused
SECONDS = 120.0  # that a request may take


class Full(LmworksError):
    """Too many requests wait already."""


class Down(LmworksError):
    """There is no engine to ask just now."""


@dataclass
class Model:
    """What is known about a served model."""

    spec: Spec
    state: str = "cold"  # cold, loading, ready, failed
    facts: dict[str, Any] = field(default_factory=dict)
    problem: LmworksError | None = None  # why it cannot be loaded
    counts: dict[str, float] = field(default_factory=dict)  # of the engine that is
    past: dict[str, float] = field(default_factory=dict)  # of those that were
    home: Supervisor | None = field(default=None, repr=False)  # whose engine holds it


@dataclass
class Ticket:
    """A request on its way: what was asked, and where its answers arrive."""

    number: int
    message: tuple[Any, ...]
    since: int = field(default_factory=time.time_ns)
    answers: asyncio.Queue[tuple[str, Any]] = field(default_factory=asyncio.Queue)
    begun: bool = False  # a part of the answer has been given out
    asked: int = 1
    took: Took | None = None  # once it is answered


def wants_processor(pid: int | None) -> bool:
    """Whether a thread of a process could run, or waits for a disk; False where the system does not tell."""
    with suppress(OSError):  # no file can be opened just now
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            with suppress(OSError):
                if stat.read_text("utf-8", "replace").rpartition(")")[2].split()[0] in "RD":
                    return True
    return False


def log(line: str) -> None:
    """Write a line for people; nobody may be there to read it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")


class Supervisor:
    """One engine, whichever process it is just now."""

    def __init__(
        self, specs: Sequence[Spec], *, most: int = QUEUE, seconds: float = SECONDS, nice: int = 0
    ) -> None:  # fmt: skip
        """`nice` 1 to 19: the engine gives way to other processes."""
        self.models = {spec.name: Model(spec, home=self) for spec in specs}
        self.most, self.seconds, self.nice = most, seconds, nice
        self.tickets: dict[int, Ticket] = {}
        self.numbers = itertools.count(1)
        self.heard = 0.0  # when the engine last gave a sign of life
        self.restarts = 0
        self.on_failure: Callable[[], None] = lambda: None  # a model that is loaded at the start cannot be
        self.recheck: Callable[[], None] = lambda: None  # raises LmworksError where nothing may be loaded again
        self.on_end: Callable[[Ticket, str, str], None] | None = None  # a request's, with its model and kind
        self.down = False  # silent for too long, at the last look: whoever asks is turned away at once
        self.leaving = False  # told to end: no longer ready, though it still answers
        self.closing = False
        self.watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine and watch it. Raises InputError where no process is to be had."""
        self.loop = asyncio.get_running_loop()
        try:
            self.spawn()
        except OSError as error:
            raise from_os_error(error, "the engine cannot be started") from None
        self.watching = asyncio.create_task(self.watch())

    def spawn(self) -> None:
        """Start an engine process and the thread that listens to it."""
        self.started, self.heard = time.monotonic(), 0.0
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        specs = [model.spec for model in self.models.values()]
        process = context.Process(target=main, args=(there, specs, self.nice), name="lmworks-engine", daemon=True)
        with deaf_children():
            process.start()
        there.close()
        self.pipe, self.process = here, process  # one that was not started would be nobody's to end
        self.outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        sender = threading.Thread(target=self.send, args=(here, self.outbox), daemon=True)
        sender.start()
        threading.Thread(target=self.listen, args=(here, self.outbox, sender), daemon=True).start()

    def send(self, pipe: Any, outbox: queue.SimpleQueue[tuple[Any, ...] | None]) -> None:
        """Send what is said: an engine that does not read must not hold up the event loop."""
        while (message := outbox.get()) is not None:
            try:
                pipe.send(message)
            except (OSError, ValueError):
                return  # it is gone, will be replaced, and asked again

    def listen(
        self, pipe: Any, outbox: queue.SimpleQueue[tuple[Any, ...] | None], sender: threading.Thread
    ) -> None:  # fmt: skip
        """Hand what the engine tells to the event loop, until it is gone; close the pipe when nobody writes to it."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                outbox.put(None)
                sender.join()
                pipe.close()
                return
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.hear, pipe, message)

    def hear(self, pipe: Any, message: tuple[Any, ...]) -> None:
        """Take in what the engine told."""
        if pipe is not self.pipe:
            return  # an engine that was replaced
        self.heard, self.down = time.monotonic(), False
        what, *rest = message
        if what == "model":
            name, state, facts = rest
            model = self.models[name]
            model.state = state
            model.facts = facts if state == "ready" else model.facts
            if state == "failed":
                model.problem = facts["problem"]
                if model.spec.warm:
                    self.on_failure()
        elif what == "beat":
            for name, counts in rest[0].items():
                self.models[name].counts = counts
        elif (ticket := self.tickets.get(rest[0])) is not None:
            ticket.begun |= what == "piece"
            ticket.took = rest[2]
            ticket.answers.put_nowait((what, rest[1]))

    @property
    def alive(self) -> bool:
        """Whether the engine gave a sign of life just now, or could not."""
        return self.spoke(SILENT)

    def spoke(self, seconds: float) -> bool:
        """Whether the engine gave a sign of life in these seconds; one that waits for a processor has more of them.

        On a machine that others overload, to replace such an engine would cost more and help nobody.
        """
        silent = time.monotonic() - self.heard
        return silent < seconds or (silent < STARVED and wants_processor(self.process.pid))

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return not self.problem

    @property
    def problem(self) -> str:
        """Return why requests are not answered now, or nothing."""
        if self.leaving or self.closing:
            return "the server is shutting down"
        if not self.alive:
            return "the engine is starting" if self.restarts == 0 and not self.heard else "the engine is being replaced"
        for name, model in self.models.items():
            if model.spec.warm and model.state != "ready":
                return f"{name} is {'not usable' if model.state == 'failed' else 'loading'}"
        return ""

    async def watch(self) -> None:
        """Replace an engine that has died or fallen silent."""
        while True:
            await asyncio.sleep(LOOK)
            now, self.down = time.monotonic(), not self.alive
            spent = now - self.started
            slow = spent > STARTING and not (spent < SLOWEST and wants_processor(self.process.pid))
            if not self.process.is_alive() or (slow if not self.heard else not self.spoke(GONE)):
                try:
                    await self.replace()
                except LmworksError as error:
                    self.give_up(error)
                    return
                except Exception as error:  # no file, process or memory is to be had: there may be, a moment later
                    log(f"The engine cannot be started: {error}")
                    self.let_down("no engine can be started")

    def give_up(self, problem: LmworksError) -> None:
        """Do without an engine, as what it would load is not what it was."""
        self.let_down(problem.what)
        for model in self.models.values():
            model.state, model.problem = "failed", problem
        self.on_failure()

    def let_down(self, why: str, *tickets: Ticket) -> None:
        """Answer requests, or all of them, that no engine works on."""
        for ticket in tickets or self.tickets.values():
            ticket.answers.put_nowait(("error", Down(why, fix="try again")))

    async def replace(self) -> None:
        """Kill the engine, start another, and ask again what was not answered in part. Raises what `recheck` does."""
        self.heard = 0.0
        self.restarts += 1
        process = self.process
        self.outbox.put(None)
        process.kill()
        await asyncio.to_thread(process.join, 5)
        if time.monotonic() - self.started < 1:
            await asyncio.sleep(1)  # one that dies at once is not started in a tight circle
        await asyncio.to_thread(self.recheck)
        log("The engine stopped and is started again.")
        for model in self.models.values():
            for key, value in model.counts.items():
                model.past[key] = model.past.get(key, 0.0) + value
            model.state, model.counts = "cold", {}
        self.spawn()
        for ticket in list(self.tickets.values()):
            if ticket.begun or ticket.asked > RETRIES:
                self.let_down("the engine stopped while it worked on this", ticket)
            else:
                ticket.asked += 1
                self.say(ticket.message)

    def say(self, message: tuple[Any, ...]) -> None:
        """Tell the engine something."""
        self.outbox.put(message)

    def find(self, name: str | None, task: Sequence[str]) -> Model:
        """Return the model of this name, or the first that does one of these tasks. Raises InputError."""
        if name is not None and name in self.models:
            found = self.models[name]
            doing = found.spec.task
            if task and doing not in task:
                raise InputError(f"the model {name} does another task", found=str(doing), expected=" or ".join(task))
            return found
        if name is not None:
            raise InputError(f"there is no model {name!r}", expected=", ".join(self.models))
        for model in self.models.values():
            if not task or model.spec.task in task:
                return model
        raise InputError("no model here does this task", expected=" or ".join(task))

    async def ask(self, model: Model, kind: str, payload: dict[str, Any]) -> AsyncGenerator[tuple[str, Any], None]:
        """Yield ("piece", a Piece) … and then ("done", answer). Raises Full, Down, and what the model raised."""
        if len(self.tickets) >= self.most:
            raise Full("the server is busy", found=f"{len(self.tickets)} requests waiting", fix="try again later")
        if not self.alive or self.closing:
            raise Down(self.problem or "the engine is not ready", fix="try again in some seconds")
        number = next(self.numbers)
        ticket = Ticket(number, ("ask", number, model.spec.name, kind, payload, self.seconds))
        self.tickets[number] = ticket
        done = False
        try:
            self.say(ticket.message)
            while True:
                what, value = await ticket.answers.get()
                if what == "error":
                    done = True
                    raise value
                done = what == "done"
                yield what, value
                if done:
                    return
        finally:
            del self.tickets[number]
            if not done:
                self.say(("cancel", number))
            if self.on_end is not None:
                self.on_end(ticket, model.spec.name, kind)

    async def get(self, model: Model, kind: str, payload: dict[str, Any]) -> Any:
        """Return the answer of a request."""
        async with aclosing(self.ask(model, kind, payload)) as parts:
            async for what, value in parts:
                if what == "done":
                    return value
        raise AssertionError("an answer ends with its last part")

    async def close(self) -> None:
        """End the engine, if it was started."""
        self.closing = True
        if self.watching is None:
            return
        self.watching.cancel()
        self.say(("end",))
        self.outbox.put(None)
        await asyncio.to_thread(self.process.join, 2)
        if self.process.is_alive():
            self.process.kill()
            await asyncio.to_thread(self.process.join, 2)
