"""Many texts written at once by one model: continuous batching.

Each text has a slot of the runtime's cache. A turn reads at most one part of one prompt, and then one token of every
text: a long prompt never stops the others, and a text that ends makes room at once. A slot keeps what it has read, so
a prompt that begins like an earlier one (a conversation that goes on) reads only what is new.

An int8 graph scales its numbers over all rows of a call; there each text steps alone, and only what was read in the
very same parts is kept, so that nobody's answer depends on who else is writing, or has asked before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, time_ns
from typing import Any, Protocol

from lmworks.base.errors import LmworksError
from lmworks.base.types import Floats
from lmworks.runtime.base import Runtime
from lmworks.runtime.writing import Writer

PART = 256  # tokens of a prompt in one turn
WORTH = 16  # tokens that two prompts must share before a slot is chosen for them
LATE = "the request took longer than it may"
ALONE = ("int8", "uint8")  # dtypes whose answers depend on the other rows of a call


@dataclass
class Took:
    """When the engine worked on a request, in nanoseconds since 1970, and on how much."""

    began: int = 0
    ended: int = 0
    facts: dict[str, int] = field(default_factory=dict)


class Tell(Protocol):
    """Hears of a request: "piece" (its letters, and the text that it goes on), "done" or "error", and what."""

    def __call__(self, request: int, what: str, value: Any, took: Took | None = None) -> None: ...


@dataclass
class Text:
    """One text that somebody waits for."""

    request: int
    writer: Writer
    prompt: list[int]
    until: float  # on the monotonic clock; later it is not worth writing
    read: int = 0  # tokens of the prompt that the slot holds
    reused: int = 0  # those that it held before
    began: int = 0  # when it got its slot, in nanoseconds since 1970
    last: Floats | None = None  # logits (V,) after the prompt, until the first token is chosen
    told: int = 0  # tokens that were told with a piece


@dataclass
class Slot:
    """A row of the cache: the tokens that it holds, and who uses it."""

    held: list[int] = field(default_factory=list)
    text: Text | None = None
    parts: int = 0  # tokens of those held that were read as whole parts of a prompt
    used: int = 0  # when it was last given to a text, in nanoseconds since 1970


class Slots:
    """Texts in line and texts in slots."""

    def __init__(self, runtime: Runtime, count: int, tell: Tell) -> None:
        self.runtime, self.tell = runtime, tell
        self.slots = [Slot() for _ in range(count)]
        self.line: deque[Text] = deque()
        self.extend = getattr(runtime, "extend", None)
        self.read_tokens = self.reused_tokens = self.written_tokens = self.steps = 0

    def add(self, request: int, writer: Writer, until: float) -> None:
        """Put a text in line."""
        self.line.append(Text(request, writer, list(writer.history), until))

    def cancel(self, request: int) -> None:
        """Forget a text; its slot is free at once."""
        self.line = deque(text for text in self.line if text.request != request)
        for slot in self.slots:
            if slot.text is not None and slot.text.request == request:
                slot.text = None

    @property
    def active(self) -> int:
        """How many texts are in slots."""
        return sum(slot.text is not None for slot in self.slots)

    def turn(self) -> bool:
        """Let texts in, read a part of a prompt, write a token of each text; say whether anything was done."""
        self._drop_late()
        while self.line and any(slot.text is None for slot in self.slots):
            self._seat(self.line.popleft())
        reading = [slot for slot in self.slots if slot.text is not None and slot.text.read < len(slot.text.prompt)]
        if reading:
            self._guard([min(reading, key=lambda slot: slot.text.request if slot.text else 0)], self._read)
        writing = [
            slot for slot in self.slots
            if slot.text is not None and slot.text.read == len(slot.text.prompt) and slot.text.last is None
        ]  # fmt: skip
        if writing:
            alone = self.runtime.dtype in ALONE
            for group in [[slot] for slot in writing] if alone else [writing]:
                self._guard(group, self._step)
        for slot in reading:  # a prompt read to its end gives its first token in the same turn
            if slot.text is not None and slot.text.last is not None:
                self._guard([slot], self._begin)
        return bool(reading or writing)

    def _guard(self, slots: list[Slot], work: Callable[[list[Slot]], None]) -> None:
        """Do something for slots; an error ends their texts, and theirs alone."""
        try:
            work(slots)
        except Exception as error:
            for slot in slots:
                if slot.text is not None:
                    self.tell(slot.text.request, "error", error)
                slot.text, slot.held = None, []

    def _drop_late(self) -> None:
        now = monotonic()
        late = [text for text in self.line if text.until < now]
        late += [slot.text for slot in self.slots if slot.text is not None and slot.text.until < now]
        for text in late:
            self.tell(text.request, "error", LateError(LATE, fix="try again later, or ask for less"))
            self.cancel(text.request)

    def _seat(self, text: Text) -> None:
        """Give a text the free slot that holds most of its beginning; the last token is always read again.

        One that begins like nothing takes the slot that was used longest ago: the others may still be gone on with.
        """
        free = [slot for slot in self.slots if slot.text is None]
        slot = min(free, key=lambda one: one.used)
        if self.extend is not None:
            best = max(free, key=lambda one: self._known(one, text.prompt))
            count = self._known(best, text.prompt)
            if count >= WORTH and (self.runtime.rewinds or count == len(best.held)):
                slot, text.read, text.reused = best, count, count
        del slot.held[text.read :]
        slot.text, slot.parts = text, text.read
        slot.used = text.began = time_ns()
        self.reused_tokens += text.reused

    def _known(self, slot: Slot, prompt: list[int]) -> int:
        """Return how many tokens of a prompt need not be read again in a slot."""
        count = min(shared(slot.held, prompt), len(prompt) - 1)
        return min(count, slot.parts) // PART * PART if self.runtime.dtype in ALONE else count

    def _read(self, slots: list[Slot]) -> None:
        """Read the next part of a slot's prompt."""
        [slot] = slots
        text, place = slot.text, self.slots.index(slot)
        assert text is not None
        if self.extend is None:
            part, logits = text.prompt, self.runtime.prefill([place], [text.prompt])[0]
        else:
            part = text.prompt[text.read : text.read + PART]
            logits = self.extend(place, part, at=text.read)
        text.read += len(part)
        slot.held += part
        slot.parts = text.read // PART * PART
        self.read_tokens += len(part)
        if text.read == len(text.prompt):
            text.last = logits

    def _begin(self, slots: list[Slot]) -> None:
        """Choose the first token of a text."""
        [slot] = slots
        text = slot.text
        assert text is not None
        assert text.last is not None
        logits, text.last = text.last, None
        self._push(slot, text, logits)

    def _step(self, slots: list[Slot]) -> None:
        """Read the last token of each text, choose the next one."""
        tokens = [slot.text.writer.tokens[-1] for slot in slots if slot.text is not None]
        rows = self.runtime.step([self.slots.index(slot) for slot in slots], tokens)  # (n, V)
        self.steps += 1
        for slot, token, logits in zip(slots, tokens, rows, strict=True):
            assert slot.text is not None
            slot.held.append(token)
            try:
                self._push(slot, slot.text, logits)
            except Exception as error:
                self.tell(slot.text.request, "error", error)
                slot.text = None

    def _push(self, slot: Slot, text: Text, logits: Floats) -> None:
        piece = text.writer.push(logits)
        self.written_tokens += 1
        if piece:
            self.tell(text.request, "piece", (piece, text))
            text.told = len(text.writer.tokens)
        if text.writer.reason is not None:
            self.tell(text.request, "done", text)
            slot.text = None


class LateError(LmworksError):
    """A request that waited longer than it may."""


def shared(one: list[int], other: list[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    least = min(len(one), len(other))
    return next((i for i in range(least) if one[i] != other[i]), least)
