"""The one generation loop, over any runtime: prefill, choose, step, and text that arrives in whole characters.

A stream yields pieces of text; joined, they are exactly `stream.result.text`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.types import Floats, Generation
from lmworks.runtime.base import Runtime, check_length
from lmworks.runtime.sampling import Sampling, choose

LogitsAfter = Generator[Floats, int, None]  # token sent -> logits (V,) of what follows

INCOMPLETE = "\ufffd"  # what decoding shows for bytes that do not (yet) make a character


class Decodes(Protocol):
    """The part of a tokenizer that generation needs."""

    @property
    def eos_id(self) -> int | None: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Characters:
    """Turn tokens into text that never ends inside a character.

    A token of a byte-level BPE may hold a part of a UTF-8 sequence. Decoding shows such a part as one U+FFFD at the end
    of the text, so a last character that is one waits for the next token; `flush` gives it out when none comes.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []  # those since the text was last whole, after one more for context
        self.shown = 0  # characters of their text that were given out
        self.waiting = ""

    def push(self, token: int) -> str:
        """Add a token; return the characters that it completes, perhaps none."""
        self.tokens.append(token)
        new = self.tokenizer.decode(self.tokens)[self.shown :]
        end = len(new) - new.endswith(INCOMPLETE)
        piece, self.waiting = new[:end], new[end:]
        self.shown += end
        if not self.waiting:  # start over, but keep a token of context: some decoders look at the one before
            self.tokens = [token]
            self.shown = len(self.tokenizer.decode(self.tokens))
        return piece

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


class TextStream(Iterator[str]):
    """Pieces of text as the model writes them; `result` holds what was written so far, also after `close()`."""

    def __init__(self, logits: LogitsAfter, history: list[int], limits: Limits) -> None:
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._seconds = 0.0  # spent on every token but the first; the reader's own time does not count
        self._reason: Literal["stop", "length"] = "length"
        self._pieces = self._write(logits, history, limits)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop writing."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The text, the tokens (an end token included), the speed without the first token, why it ended."""
        speed = (len(self._tokens) - 1) / self._seconds if self._seconds > 0 else None
        return Generation("".join(self._text), list(self._tokens), speed, self._reason)

    def _write(self, logits: LogitsAfter, history: list[int], limits: Limits) -> Generator[str, None, None]:
        characters, stops, rng = Characters(limits.tokenizer), StopStrings(limits.stop), limits.sampling.make_rng()
        for count in range(limits.tokens):
            started = time.perf_counter()
            scores = logits.send(history[-1]) if count else next(logits)  # (V,)
            token = choose(scores, history, limits.sampling, rng)
            self._seconds += time.perf_counter() - started if count else 0.0
            history.append(token)
            self._tokens.append(token)
            if token in limits.ends:
                self._reason = "stop"
                break
            yield from self._show(stops.push(characters.push(token)))
            if stops.found:
                break
        if not stops.found:
            yield from self._show(stops.push(characters.flush()))
        if stops.found:
            self._reason = "stop"
        yield from self._show(stops.flush())

    def _show(self, piece: str) -> Iterator[str]:
        if piece:
            self._text.append(piece)
            yield piece


@dataclass(frozen=True)
class Limits:
    """How tokens become text, how they are chosen, and where they end."""

    tokenizer: Decodes
    sampling: Sampling
    tokens: int
    ends: frozenset[int]
    stop: list[str]


def generate(
    runtime: Runtime,
    tokenizer: Decodes,
    prompt: str | Sequence[int],
    *,
    sampling: Sampling | None = None,
    max_tokens: int = 128,
    eos_ids: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    use_cache: bool = True,
    slot: int = 0,
) -> TextStream:
    """Continue `prompt` (text, or token ids) and stream the text.

    It ends at a token of `eos_ids` (default: the tokenizer's) or a string of `stop`, which is cut off ("stop"), after
    `max_tokens`, or when the model's positions are used up ("length"). An empty text begins with the end token, as
    every document of the training stream does. `use_cache=False` runs the whole sequence for each token: the same
    tokens, slower (int8 rounds by call: there nearly the same). Raises InputError for a prompt longer than the model,
    before any piece is asked for.
    """
    if max_tokens < 1:
        raise InputError("max_tokens is out of range", found=str(max_tokens), expected="1 or more")
    words = [stop] if isinstance(stop, str) else list(stop)
    if not all(words):
        raise InputError("a stop string is empty", fix="leave it out, or give the text to stop at")
    default = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ends = default if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else eos_ids
    ids = (tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)) or default
    check_length(len(ids), runtime.max_length)
    tokens = min(max_tokens, runtime.max_length - len(ids) + 1)  # the last token is written, never read
    logits = cached_logits(runtime, ids, slot) if use_cache else uncached_logits(runtime, ids)
    return TextStream(logits, ids, Limits(tokenizer, sampling or Sampling(), tokens, frozenset(ends), words))


def cached_logits(runtime: Runtime, prompt: Sequence[int], slot: int) -> LogitsAfter:
    """Yield the logits (V,) after the prompt, then after each token that is sent."""
    token = yield runtime.prefill([slot], [prompt])[0]
    while True:
        token = yield runtime.step([slot], [token])[0]


def uncached_logits(runtime: Runtime, prompt: Sequence[int]) -> LogitsAfter:
    """Do the same, from the whole sequence each time."""
    row = list(prompt)
    while True:
        input_ids = np.array([row], dtype=np.int64)  # (1, T)
        batch = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        token = yield runtime.run(batch)["logits"][0, -1]
        row.append(token)
