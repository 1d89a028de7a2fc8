"""One text as it is written: each logits that comes in chooses a token, whole characters come out, until it ends.

Shapes: V vocabulary, k alternatives of a token.

`push` does not ask for the next logits, so one loop can write many texts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from lmworks.base.types import Floats
from lmworks.runtime.sampling import Sampling, choose

NEAR = 8  # tokens of a prompt among which one is text by itself, as good as always
INCOMPLETE = "\ufffd"  # what decoding shows for bytes that do not (yet) make a character


class Decodes(Protocol):
    """The part of a tokenizer that generation needs."""

    @property
    def eos_id(self) -> int | None: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Characters:
    """Turn tokens into text that never ends inside a character.

    A token may hold a part of a UTF-8 sequence, which decoding shows as U+FFFD: as one (byte-level BPE), or as one for
    each byte of a whole run of such tokens, until its last character is complete (byte fallback). So U+FFFD at the end
    waits for the next token; `flush` gives it out when none comes. Decoders take the space off the first token of all:
    the text goes on after the tokens `before` it.
    """

    def __init__(self, tokenizer: Decodes, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []  # those since the text was last whole, after one more for context
        self.shown = 0  # characters of their text that were given out
        self.waiting = ""
        self.context: tuple[int, int] | None = None  # the last token that is text by itself, and its characters
        if any(self._stands_alone(token) for token in reversed(before[-NEAR:])):
            self._start_over()

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes, perhaps none."""
        self.tokens.append(token)
        new = self.tokenizer.decode(self.tokens)[self.shown :]
        piece = new.rstrip(INCOMPLETE)
        self.waiting = new[len(piece) :]
        self.shown += len(piece)
        self._stands_alone(token)
        if not self.waiting:
            self._start_over()
        return piece

    def _stands_alone(self, token: int) -> bool:
        """Say whether a token is text by itself, and so can be context; note it then."""
        text = self.tokenizer.decode([token])
        if text and INCOMPLETE not in text:
            self.context = token, len(text)
            return True
        return False

    def _start_over(self) -> None:
        """Forget what was given out, but for a token of context."""
        if self.context is not None:
            token, self.shown = self.context
            self.tokens = [token]

    def flush(self) -> str:
        """Return what still waits."""
        piece, self.waiting = self.waiting, ""
        return piece


class StopStrings:
    """Cut the text at the first stop string; hold back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop, self.held, self.found = stop, "", False

    def push(self, piece: str) -> str:
        """Add text; return what can be shown for certain. `found` turns true once a stop string is complete."""
        text, self.held = self.held + piece, ""
        starts = [at for word in self.stop if (at := text.find(word)) >= 0]
        if starts:
            self.found = True
            return text[: min(starts)]
        keep = max((overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back in vain."""
        piece, self.held = self.held, ""
        return piece


def overlap(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that begins `word`: ("abc", "bcd") -> 2."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


@dataclass(frozen=True)
class Limits:
    """How tokens become text, how they are chosen, and where they end."""

    tokenizer: Decodes
    sampling: Sampling
    tokens: int
    ends: frozenset[int]
    stop: Sequence[str] = ()
    logprobs: int | None = None  # how many alternatives of each token to note; None: no probabilities at all


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability (natural, before sampling changes it) and the likeliest alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # k of (token, log-probability), the likeliest first


class Writer:
    """One text. `reason` is None until it has ended: "stop" or "length"."""

    def __init__(self, history: list[int], limits: Limits) -> None:
        """`history`: the prompt's tokens, to which each new one is added."""
        self.history, self.limits = history, limits
        self.characters, self.stops = Characters(limits.tokenizer, history), StopStrings(limits.stop)
        self.rng = limits.sampling.make_rng()
        self.tokens: list[int] = []
        self.chosen: list[Chosen] = []
        self.text: list[str] = []
        self.reason: Literal["stop", "length"] | None = None

    def push(self, scores: Floats) -> str:
        """Choose the token that follows, by its logits (V,); return the text that can be shown for certain."""
        token = choose(scores, self.history, self.limits.sampling, self.rng)
        self.history.append(token)
        self.tokens.append(token)
        if self.limits.logprobs is not None:
            self.chosen.append(note(scores, token, self.limits.logprobs))
        piece = ""
        if token in self.limits.ends:
            self.reason = "stop"
        else:
            piece = self.stops.push(self.characters.push(token))
            if self.stops.found:
                self.reason = "stop"
            elif len(self.tokens) == self.limits.tokens:
                self.reason = "length"
        return self._give(piece + (self._finish() if self.reason else ""))

    def _finish(self) -> str:
        """Return what was held back; a stop string may be completed by the last characters."""
        piece = "" if self.stops.found else self.stops.push(self.characters.flush())
        if self.stops.found:
            self.reason = "stop"
        return piece + self.stops.flush()

    def _give(self, piece: str) -> str:
        if piece:
            self.text.append(piece)
        return piece


def note(scores: Floats, token: int, count: int) -> Chosen:
    """Return a token's log-probability under logits (V,), and those of the `count` likeliest."""
    raw = np.asarray(scores, np.float64)
    raw = raw - raw.max()
    logs = raw - np.log(np.exp(raw).sum())  # (V,)
    best = np.argsort(-logs, kind="stable")[:count].tolist()
    return Chosen(token, float(logs[token]), [(i, float(logs[i])) for i in best])
