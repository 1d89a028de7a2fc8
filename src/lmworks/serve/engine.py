"""The process that holds the models: one loop that takes requests in, lets every model do one turn, and tells.

    in   ("ask", request, model, kind, payload, seconds)   ("cancel", request)   ("end",)
    out  ("piece", request, piece, None)   ("done", request, answer, took)   ("error", request, error, None)
         ("model", name, state, facts)   ("beat", counts)

It ends when the pipe to the server closes: no engine outlives its server. A thread of its own sends the beats, so a
long computation is not taken for a hang, while a stopped or deadlocked process falls silent. Nothing that a request
holds can end the loop: whatever goes wrong is told to whoever asked.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.types import Generation
from lmworks.evaluation.monitor import Seen, attach, check_runtime, prompt_scores, read_monitor
from lmworks.runtime.decoding import begin
from lmworks.runtime.predictor import Predictor, load
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.writing import Writer
from lmworks.serve.batches import Batches
from lmworks.serve.slots import LateError, Slots, Tell, Text, Took
from lmworks.tokens.look import make_speller

BEAT = 0.2  # seconds between two signs of life
IDLE = 0.2  # seconds to wait for a request where there is nothing to do
STUCK = 120.0  # seconds that one turn may take; an engine that computes longer counts as hung


@dataclass(frozen=True)
class Spec:
    """A model to serve."""

    name: str
    folder: str
    task: str | None = None
    dtype: str = "auto"
    runtime: str = "auto"
    slots: int = 8
    threads: int | None = None
    warm: bool = True  # loaded at the start, not when it is first asked for


Spelled = tuple[bytes, float, list[tuple[bytes, float]]]  # a token, its log-probability, and the likeliest others


@dataclass
class Piece:
    """A part of a text, and the tokens since the last one, with their probabilities where they were asked for."""

    text: str
    tokens: list[int]
    chosen: list[Spelled] | None = None


@dataclass
class Written:
    """What a decoder answers: the text and its tokens, with their probabilities where they were asked for."""

    generation: Generation
    prompt_tokens: int
    reused_tokens: int
    chosen: list[Spelled] | None = None
    ended: bool = False  # by an end token, which is the last one; not by a stop string or for its length


class Loaded:
    """A model in this process."""

    def __init__(self, spec: Spec, tell: Tell) -> None:
        self.spec, self.tell = spec, tell
        self.predictor: Predictor = load(
            spec.folder, spec.task, runtime=spec.runtime, dtype=spec.dtype, slots=spec.slots, threads=spec.threads
        )
        self.monitor = read_monitor(Path(spec.folder))
        if self.monitor is not None and self.monitor.facts["task"] == self.predictor.task:
            check_runtime(self.monitor, Path(spec.folder), self.predictor.runtime)
            if self.predictor.make is not None:
                attach(self.predictor, self.monitor)
        self.batches = None if self.predictor.make is None else Batches(self.predictor, tell)
        self.slots = Slots(self.predictor.runtime, spec.slots, self.tell_text) if self.batches is None else None
        self.warm_up()

    def warm_up(self) -> None:
        """Answer once, so that the first request pays for nothing."""
        if self.slots is not None:
            for _ in self.predictor.generate("", max_tokens=2, stream=True):
                pass
        elif self.predictor.task not in ("image-classification", "fill-mask", "question-answering"):
            self.predictor(["a"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the server tells about the model."""
        runtime, known = self.predictor.runtime, getattr(self.predictor.prepared, "facts", None)
        mask = self.predictor.tokenizer.mask_id if self.predictor.task == "fill-mask" else None
        return {
            "task": self.predictor.task, "runtime": runtime.name, "dtype": runtime.dtype,
            "max_input_length": runtime.max_length, "vocab_size": runtime.vocab_size,
            "labels": list(known.labels) if known else [], "problem_type": known.problem_type if known else None,
            "mask": None if mask is None else self.predictor.tokenizer.token(mask),
        }  # fmt: skip

    def ask(self, request: int, kind: str, payload: dict[str, Any], until: float) -> None:
        """Take a request of this kind: "answer", "write", "score" or "tokenize". Raises InputError."""
        began = time.time_ns()
        if kind == "tokenize":
            encodings = self.predictor.tokenizer.encode_inputs(payload["texts"])
            self.tell(request, "done", [len(one.ids) for one in encodings] if payload.get("count") else [
                [(id, token, *offset, bool(special)) for id, token, offset, special in zip(
                    one.ids, one.tokens, one.offsets, one.special_tokens_mask, strict=True)] for one in encodings
            ], Took(began, time.time_ns()))  # fmt: skip
        elif kind == "score":
            assert self.monitor is not None
            [score], [tokens] = prompt_scores(self.predictor, payload["texts"])
            strange = bool(score > self.monitor.threshold)
            seen = Seen([], 0, None, float(score), strange, int(tokens), None)
            self.tell(request, "done", [seen], Took(began, time.time_ns(), {"tokens": int(tokens)}))
        elif kind == "write":
            if self.slots is None:
                raise InputError(f"{self.spec.name} does not write texts", found=self.predictor.task)
            self.slots.add(request, self.begin(payload), until)
        elif self.batches is None:
            raise InputError(f"{self.spec.name} writes texts, it has no answers", found=self.predictor.task)
        else:
            self.batches.add(request, payload["examples"], payload["options"], until)

    def begin(self, payload: dict[str, Any]) -> Any:
        """Return the Writer of a request."""
        settings = dict(payload["settings"])
        own = {name: settings.pop(name) for name in ("max_tokens", "stop", "logprobs") if name in settings}
        eos = [] if payload.get("ignore_eos") else self.predictor.eos_ids
        return begin(
            self.predictor.tokenizer, payload["prompt"], max_length=self.predictor.runtime.max_length,
            sampling=Sampling(**settings), eos_ids=eos, turn=self.predictor.runtime.turn, **own,
        )  # fmt: skip

    def tell_text(self, request: int, what: str, value: Any, took: Took | None = None) -> None:
        """Tell about a text; a piece, and a text that is done, become what the server needs of them."""
        if isinstance(value, Text):
            writer = value.writer
            done = Generation("".join(writer.text), list(writer.tokens), None, writer.reason or "length")
            chosen = self.spelled(writer, 0)
            facts = {"prompt_tokens": len(value.prompt), "reused_tokens": value.reused, "tokens": len(done.tokens)}
            took = Took(value.began, time.time_ns(), facts)
            ended = bool(done.tokens) and done.tokens[-1] in writer.limits.ends
            value = Written(done, len(value.prompt), value.reused, chosen, ended)
        elif what == "piece":
            letters, text = value
            value = Piece(letters, text.writer.tokens[text.told :], self.spelled(text.writer, text.told))
        self.tell(request, what, value, took)

    def spelled(self, writer: Writer, start: int) -> list[Spelled] | None:
        """Return the tokens from `start` on as bytes, with their probabilities where they were asked for."""
        if writer.limits.logprobs is None:
            return None
        spell, chosen = self.spell, writer.chosen[start:]
        return [(spell(one.token), one.logprob, [(spell(token), p) for token, p in one.top]) for one in chosen]

    @cached_property
    def spell(self) -> Callable[[int], bytes]:
        """What gives the bytes of a token."""
        return make_speller(self.predictor.tokenizer)

    def turn(self) -> bool:
        """Do a little of whatever waits."""
        return self.batches.turn() if self.batches is not None else self.slots is not None and self.slots.turn()

    def cancel(self, request: int) -> None:
        """Forget a request."""
        (self.batches or self.slots).cancel(request)  # type: ignore[union-attr]

    @property
    def counts(self) -> dict[str, float]:
        """What the metrics are made of."""
        if self.batches is not None:
            one = self.batches
            return {"active": one.active, "batches": one.batches, "rows": one.rows, "tokens": one.tokens}
        assert self.slots is not None
        two = self.slots
        return {
            "active": two.active, "waiting": len(two.line), "slots": len(two.slots), "steps": two.steps,
            "read_tokens": two.read_tokens, "reused_tokens": two.reused_tokens, "written_tokens": two.written_tokens,
        }  # fmt: skip


class Engine:
    """The loop."""

    def __init__(self, pipe: Connection, specs: Sequence[Spec]) -> None:
        self.pipe, self.specs = pipe, {spec.name: spec for spec in specs}
        self.inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.models: dict[str, Loaded] = {}
        self.failed: dict[str, LmworksError] = {}
        self.waiting: dict[str, list[tuple[Any, ...]]] = {}  # for a model that is loading
        self.sending = threading.Lock()
        self.turned = time.monotonic()

    def send(self, *message: Any) -> None:
        """Tell the server; without one there is nothing left to do."""
        with self.sending:
            try:
                self.pipe.send(message)
            except (BrokenPipeError, OSError):
                os._exit(0)

    def tell(self, request: int, what: str, value: Any, took: Took | None = None) -> None:
        """Tell about a request."""
        self.send(what, request, plain(value) if what == "error" else value, took)

    def receive(self) -> None:
        """Put what comes into the inbox, until the server is gone."""
        while True:
            try:
                self.inbox.put(self.pipe.recv())
            except (EOFError, OSError):
                os._exit(0)

    def beat(self) -> None:
        """Show that the process lives, and count."""
        while True:
            if time.monotonic() - self.turned < STUCK:
                self.send("beat", {name: model.counts for name, model in list(self.models.items())})
            time.sleep(BEAT)

    def run(self) -> None:
        """Work until the server is gone."""
        for work in (self.receive, self.beat):
            threading.Thread(target=work, daemon=True).start()
        for spec in self.specs.values():
            if spec.warm:
                self.load(spec.name)
        busy = False
        while True:
            self.take(wait=not busy)
            busy = False
            for model in list(self.models.values()):
                busy |= model.turn()
            self.turned = time.monotonic()

    def take(self, *, wait: bool) -> None:
        """Take everything out of the inbox; where there is nothing to do, wait a little for it."""
        try:
            message = self.inbox.get(timeout=IDLE) if wait else self.inbox.get_nowait()
            while True:
                self.handle(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            pass

    def handle(self, message: tuple[Any, ...] | None) -> None:
        """Do what a message asks for."""
        if message is None:
            return
        what, *rest = message
        if what == "ask":
            self.ask(message)
        elif what == "end":
            os._exit(0)
        elif what == "cancel":
            for model in self.models.values():
                model.cancel(rest[0])
            for name, line in self.waiting.items():
                self.waiting[name] = [one for one in line if one[1] != rest[0]]
        elif what == "loaded":
            name, model = rest
            if isinstance(model, Loaded):
                self.models[name] = model
                self.send("model", name, "ready", model.facts)
            else:
                self.failed[name] = model
                self.send("model", name, "failed", {"problem": model})
            for one in self.waiting.pop(name, []):
                self.ask(one)

    def ask(self, message: tuple[Any, ...]) -> None:
        """Give a request to its model, which is loaded if it is not yet."""
        _, request, name, kind, payload, seconds = message
        try:
            if name in self.failed:
                raise self.failed[name]
            if name not in self.models:
                self.load(name)
                self.waiting[name].append(message)
                return
            self.models[name].ask(request, kind, payload, time.monotonic() + seconds)
        except BaseException as error:  # tokenizers can raise a BaseException: no text may end the loop
            self.tell(request, "error", error)

    def load(self, name: str) -> None:
        """Begin to load a model, in a thread; the others go on."""
        if name in self.waiting:
            return
        self.waiting[name] = []
        self.send("model", name, "loading", {})

        def work() -> None:
            try:
                found: Any = Loaded(self.specs[name], self.tell)
            except BaseException as error:
                found = plain(error)
            self.inbox.put(("loaded", name, found))

        threading.Thread(target=work, daemon=True).start()


def plain(error: BaseException) -> LmworksError:
    """Return an error that any process can read: ours as it is, others by their kind, without what a text may hold."""
    if isinstance(error, LmworksError):
        kind = next(kind for kind in (LateError, InputError, LmworksError) if isinstance(error, kind))
        return kind(error.what, where=error.where, found=error.found, expected=error.expected, fix=error.fix)
    if isinstance(error, MemoryError):
        return LmworksError("the machine has not enough memory for this request")
    return LmworksError(f"the model failed: {type(error).__name__}")


def main(pipe: Connection, specs: Sequence[Spec], nice: int = 0) -> None:
    """Run the engine in a process of its own; the server decides when it ends."""
    if nice and hasattr(os, "nice"):
        os.nice(nice)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Engine(pipe, specs).run()
