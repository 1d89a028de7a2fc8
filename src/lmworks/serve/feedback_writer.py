"""One thread that writes feedback: what waits is committed together, and nobody is told before the commit.

While the database is away, whoever comes is told so at once, and the thread asks every second whether it is back.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from lmworks.base.errors import InputError, LmworksError, did_you_mean
from lmworks.base.optional import require
from lmworks.serve.engine import Spec
from lmworks.serve.feedback import ANSWERS, Given, Row, Store, find_answer, make_answer, ping
from lmworks.serve.feedback_database import SECONDS, Away, DiskFull, storable
from lmworks.serve.refusals import Refused
from lmworks.serve.service import labels_of

require("sqlalchemy", extra="feedback")
from sqlalchemy import Connection  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

Work = Callable[[Connection], Any]
TOGETHER = 256  # jobs of a commit
AGAIN = 1.0  # seconds between two looks for a database that is away
PATIENCE = 10.0  # seconds in which feedback must be kept
HURRY = 2.0  # seconds that an answer waits for its id


@dataclass
class Job:
    """What is to be done in a transaction, and whom to tell."""

    work: Work
    future: Future[Any] = field(default_factory=Future)


class Writer:
    """The thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # why the database is away
        self.problem = None if store.made else Away("the feedback store is away", where=store.name)
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write."""
        self.thread = threading.Thread(target=self.run, name="lmworks-feedback", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Write what waits, and end."""
        self.jobs.put(None)
        if self.thread is not None:
            self.thread.join(PATIENCE)
        self.store.close()

    async def do(self, work: Work, seconds: float) -> Any:
        """Return what `work` returns, once it is committed. Raises what it raises, Away, DiskFull, LmworksError."""
        if self.problem is not None:
            raise Away(self.problem.what, where=self.store.name)
        job = Job(work)
        self.jobs.put(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.future), seconds)
        except TimeoutError:
            raise Away("the feedback store is slow", where=self.store.name) from None

    def run(self) -> None:
        """Write until told to end."""
        while True:
            batch: list[Job | None] = []
            try:
                batch.append(self.jobs.get(timeout=None if self.problem is None else AGAIN))
                while len(batch) < TOGETHER and batch[-1] is not None:
                    batch.append(self.jobs.get_nowait())
            except queue.Empty:
                pass
            jobs = [job for job in batch if job is not None and job.future.set_running_or_notify_cancel()]
            if jobs:
                self.commit(jobs)
            elif self.problem is not None:
                self.look()
            if None in batch:
                return

    def look(self) -> None:
        """See whether the database is back."""
        try:
            with self.store.begin(reads=True) as connection:
                ping(connection)
            self.problem = None
        except Exception:  # whatever it is, it is looked at again
            pass

    def commit(self, jobs: Sequence[Job]) -> None:
        """Do jobs in one transaction; tell each what came of it, after the commit."""
        done: list[tuple[Job, Any, Exception | None]] = []
        try:
            with self.store.begin() as connection:
                for job in jobs:
                    try:
                        done.append((job, job.work(connection), None))
                    except SQLAlchemyError:
                        raise
                    except Exception as error:  # it refuses before it writes
                        done.append((job, None, error))
        except Exception as error:
            if isinstance(error, Away):
                self.problem = error
            elif len(jobs) > 1:  # one job may spoil it for all
                for job in jobs:
                    self.commit([job])
                return
            done = [(job, None, error) for job in jobs]
        else:
            self.problem = None
        for job, value, problem in done:
            if problem is None:
                job.future.set_result(value)
            else:
                job.future.set_exception(problem)


class Recorder:
    """Answers get an id and are kept; what people say of them is checked and kept."""

    def __init__(self, place: str | Path, specs: Sequence[Spec], registry: CollectorRegistry) -> None:
        """Raises InputError for a store that cannot be opened, and where nothing is served that feedback is for."""
        self.labels = {spec.name: labels for spec in specs if (labels := labels_of(spec))}
        if not self.labels:
            raise InputError("--feedback needs a classifier that gives each text one of several labels",
                             found=", ".join(spec.name for spec in specs))  # fmt: skip
        store = Store(place, create=True, seconds=SECONDS, later=True)
        if not store.made:
            sys.stderr.write(f"feedback: nobody answers at {store.name}, which is asked every second\n")
        self.writer = Writer(store)
        self.given = Counter(
            "lmworks_feedback", "Feedback by what is right, and whether the model had said so",
            ("model", "label", "agrees"), registry=registry,
        )  # fmt: skip
        self.unkept = Counter("lmworks_answers_unkept", "Answers without an id", ("model",), registry=registry)
        for model, labels in self.labels.items():
            self.unkept.labels(model)
            for label in labels:
                for agrees in AGREES.values():
                    self.given.labels(model, label, agrees)

    async def record(self, model: str, examples: Sequence[Any], answers: Sequence[dict[str, Any]]) -> None:
        """Keep answers and give each its id; null where the store is away: people are answered all the same."""
        if model not in self.labels:
            return
        rows = [
            make_answer(model, example, answer["label"], answer["score"])
            for example, answer in zip(examples, answers, strict=True)
        ]
        try:
            await self.writer.do(lambda connection: self.writer.store.put(connection, ANSWERS, rows), HURRY)
        except Exception:
            self.unkept.labels(model).inc(len(rows))
            rows = [{**row, "id": None} for row in rows]
        for row, answer in zip(rows, answers, strict=True):
            answer["id"] = row["id"]

    async def accept(self, label: str, *, id: str | None = None, answer: Row | None = None) -> dict[str, Any]:
        """Keep what is right for an answer by its id, or for a text that nobody asked. Raises Refused."""

        def work(connection: Connection) -> Given:
            found = answer if id is None else find_answer(connection, storable(id))
            if found is None:
                raise Refused(404, "there is no answer with this id", param="id", code="unknown_id")
            self.check(found["model"], label)
            if id is None:
                self.writer.store.put(connection, ANSWERS, [found])
            return self.writer.store.give(connection, found, label)

        try:
            given: Given = await self.writer.do(work, PATIENCE)
        except Away:
            raise Refused(503, "the feedback store is away: nothing was kept, send it again",
                          code="feedback_unavailable", type="server_error") from None  # fmt: skip
        except DiskFull:
            raise Refused(507, "the disk of the feedback store is full: nothing was kept", code="feedback_disk_full",
                          type="server_error") from None  # fmt: skip
        except LmworksError:
            raise Refused(500, "the feedback store refuses this: nothing was kept", type="server_error") from None
        model = given.answer["model"]
        if given.fresh:
            self.given.labels(model, label, AGREES[given.agrees]).inc()
        return {"id": given.id, "answer": given.answer["id"], "model": model, "label": label, "agrees": given.agrees}

    def check(self, model: str, label: str) -> None:
        """Raise Refused for a model that is not served, or a label that it does not have."""
        if model not in self.labels:
            raise Refused(404, f"no feedback is taken for the model {model}", param="model", code="model_not_found")
        labels = self.labels[model]
        if label not in labels:
            more = " …" if len(labels) > 10 else ""
            near = did_you_mean(label, labels) or f" it has {', '.join(labels[:10])}{more}"
            raise Refused(400, f"{model} has no label {label!r}:{near}", param="label", code="unknown_label")


AGREES = {True: "yes", False: "no", None: "unknown"}  # unknown: the model was not asked, or abstained
