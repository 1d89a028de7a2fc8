"""The one generation loop, over any runtime: prefill, choose, step, and text that arrives in whole characters.

A stream yields pieces of text; joined, they are exactly `stream.result.text`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.types import Floats, Generation
from lmworks.runtime.base import Runtime, check_length
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.trace import stage
from lmworks.runtime.writing import Decodes, Limits, Writer

LogitsAfter = Generator[Floats, int, None]  # token sent -> logits (V,) of what follows


class TextStream(Iterator[str]):
    """Pieces of text as the model writes them; `result` holds what was written so far, also after `close()`."""

    def __init__(self, logits: LogitsAfter, writer: Writer) -> None:
        self.writer = writer
        self._seconds = 0.0  # spent on every token but the first; the reader's own time does not count
        self._pieces = self._write(logits)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop writing."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The text, the tokens (an end token included), the speed without the first token, why it ended."""
        tokens = self.writer.tokens
        speed = (len(tokens) - 1) / self._seconds if self._seconds > 0 else None
        return Generation("".join(self.writer.text), list(tokens), speed, self.writer.reason or "length")

    def _write(self, logits: LogitsAfter) -> Generator[str, None, None]:
        writer = self.writer
        while writer.reason is None:
            first = not writer.tokens
            started = time.perf_counter()
            scores = next(logits) if first else logits.send(writer.tokens[-1])  # (V,)
            with stage("decode"):
                piece = writer.push(scores)
            self._seconds += 0.0 if first else time.perf_counter() - started
            if piece:
                yield piece


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
    writer = begin(
        tokenizer, prompt, max_length=runtime.max_length, sampling=sampling, max_tokens=max_tokens, eos_ids=eos_ids,
        stop=stop, turn=runtime.turn,
    )  # fmt: skip
    logits = (cached_logits if use_cache else uncached_logits)(runtime, list(writer.history), slot)
    return TextStream(logits, writer)


def begin(
    tokenizer: Decodes, prompt: str | Sequence[int], *, max_length: int, sampling: Sampling | None = None,
    max_tokens: int = 128, eos_ids: int | Sequence[int] | None = None, stop: str | Sequence[str] = (),
    logprobs: int | None = None, turn: int | None = None,
) -> Writer:  # fmt: skip
    """Return the Writer of a prompt, whose tokens are its history; the arguments are those of `generate`.

    A text that begins with at most `turn` tokens ends there: the keys in its cache would be those of a short text.
    """
    if max_tokens < 1:
        raise InputError("max_tokens is out of range", found=str(max_tokens), expected="1 or more")
    words = [stop] if isinstance(stop, str) else list(stop)
    if not all(words):
        raise InputError("a stop string is empty", fix="leave it out, or give the text to stop at")
    default = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ends = default if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else eos_ids
    with stage("tokenise"):
        ids = (tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)) or default
    check_length(len(ids), max_length)
    if turn is not None and len(ids) <= turn:
        max_length = min(max_length, turn)
    tokens = min(max_tokens, max_length - len(ids) + 1)  # the last token is written, never read
    return Writer(ids, Limits(tokenizer, sampling or Sampling(), tokens, frozenset(ends), words, logprobs))


def cached_logits(runtime: Runtime, prompt: Sequence[int], slot: int) -> LogitsAfter:
    """Yield the logits (V,) after the prompt, then after each token that is sent."""
    with stage("prefill"):
        logits = runtime.prefill([slot], [prompt])[0]
    while True:
        token = yield logits
        with stage("step"):
            logits = runtime.step([slot], [token])[0]


def uncached_logits(runtime: Runtime, prompt: Sequence[int], _: int) -> LogitsAfter:
    """Do the same, from the whole sequence each time."""
    row = list(prompt)
    while True:
        input_ids = np.array([row], dtype=np.int64)  # (1, T)
        batch = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        token = yield runtime.run(batch)["logits"][0, -1]
        row.append(token)
