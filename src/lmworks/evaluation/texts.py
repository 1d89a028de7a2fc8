"""What a language model thinks of texts of any size: sums over blocks of text, in flat memory.

A block ends with the first line end after BLOCK characters, and with its document; a token belongs to the block that
its last character is in, the end of a document to its last block. Blocks depend on the text alone, so models with
different tokenizers have the same ones. Examples for intervals are documents where there are MANY, else blocks.

    perplexity             exp(nats / tokens), ends of documents included
    perplexity per word    exp(nats / words), a word being what stands between blanks
    bits per byte          bits / bytes of the text in UTF-8
    bits per token         the cross-entropy; `entropy` is what the model itself expected it to be
    next-token accuracy    share of tokens that were the model's first choice

Per word and per byte are None where the tokenizer loses something. Shapes: N blocks, n tokens.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Ints
from lmworks.evaluation.perplexity import token_logprobs
from lmworks.evaluation.significance import Statistic, bootstrap_all
from lmworks.runtime.base import Runtime
from lmworks.tokens.batch import groups
from lmworks.tokens.tokenizer import Tokenizer

Float64 = NDArray[np.float64]
BLOCK, MANY = 1000, 30
WINDOWS = 64  # windows that are scored together
SUMS = ("nats", "tokens", "right", "entropy", "bytes", "words")
NATS, TOKENS, RIGHT, ENTROPY, BYTES, WORDS = range(len(SUMS))


def over(numerator: int, denominator: int, scale: float = 1.0) -> Statistic:
    """Return a sum over another one."""
    return lambda sums: sums[..., numerator] / sums[..., denominator] / scale


def to_perplexity(denominator: int) -> Statistic:
    """Return exp of the nats a token, or a word; infinite where a float cannot hold it."""
    mean = over(NATS, denominator)
    return lambda sums: np.where(mean(sums) < 700, np.exp(np.minimum(mean(sums), 700)), np.inf)


STATISTICS: dict[str, Statistic] = {
    "perplexity": to_perplexity(TOKENS),
    "perplexity_per_word": to_perplexity(WORDS),
    "bits_per_byte": over(NATS, BYTES, math.log(2)),
    "bits_per_token": over(NATS, TOKENS, math.log(2)),
    "entropy": over(ENTROPY, TOKENS, math.log(2)),
    "next_token_accuracy": over(RIGHT, TOKENS),
}
OF_ALL_TEXT = ("perplexity_per_word", "bits_per_byte")  # mean nothing where something was lost


@dataclass
class TextScores:
    """Sums of each block, (N, 6), and the document that it belongs to; `is_whole`: nothing was lost.

    `tokens` says which tokens there are: equal ones are the same.
    """

    numbers: array[float] = field(default_factory=lambda: array("d"))
    documents: array[int] = field(default_factory=lambda: array("q"))
    is_whole: bool = True
    tokens: str = ""

    @property
    def sums(self) -> Float64:
        """The sums of each block (N, 6)."""
        return np.array(self.numbers, np.float64).reshape(-1, len(SUMS))

    @property
    def units(self) -> tuple[str, Float64]:
        """What is drawn again for intervals: "documents" or "blocks", and their sums."""
        of = np.array(self.documents, np.int64)
        count = int(of[-1]) + 1 if len(of) else 0
        if count < MANY:
            return "blocks", self.sums
        found = np.zeros((count, len(SUMS)))
        np.add.at(found, of, self.sums)
        return "documents", found

    def open(self, text: str) -> list[int]:
        """Begin a document: make room for its blocks and return where each of them ends."""
        ends = block_ends(text)
        document = self.documents[-1] + 1 if self.documents else 0
        for start, end in zip([0, *ends], ends, strict=False):
            part = text[start:end]
            self.numbers.extend((0.0, 0.0, 0.0, 0.0, len(part.encode("utf-8", "replace")), len(part.split())))
            self.documents.append(document)
        return ends

    def add(self, blocks: Ints, **values: Any) -> None:
        """Add what tokens cost, (n,) each, to the sums of their blocks (n,)."""
        table = np.frombuffer(self.numbers, np.float64).reshape(-1, len(SUMS))
        for name, found in values.items():
            np.add.at(table[:, SUMS.index(name)], blocks, found)

    def values(self) -> dict[str, float | int | None]:
        """Return every measure by name, and what it was measured on; None for what is infinite or has no meaning."""
        total = self.sums.sum(0)
        found: dict[str, float | int | None] = {name: self.measure(name, total) for name in STATISTICS}
        return {**found, "tokens": int(total[TOKENS]), "words": int(total[WORDS]), "bytes": int(total[BYTES])}

    def measure(self, name: str, total: Float64) -> float | None:
        """Return one measure of the sums (6,)."""
        if name in OF_ALL_TEXT and not self.is_whole:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            found = float(STATISTICS[name](total[None])[0])
        return found if math.isfinite(found) else None

    def intervals(self, **how: Any) -> dict[str, list[float]]:
        """Return the interval of each measure that has a meaning; none where there are too few units to draw from."""
        _, units = self.units
        known = {name: measure for name, measure in STATISTICS.items() if self.measure(name, units.sum(0)) is not None}
        finite = np.where(np.isfinite(units), units, np.nan)  # 0 times infinite would warn
        return (
            {name: list(span) for name, span in bootstrap_all(finite, known, **how).items()} if len(units) > 1 else {}
        )


def block_ends(text: str) -> list[int]:
    """Return where each block of a text ends: after the first line end from BLOCK characters on, and at its end."""
    ends, start = [], 0
    while len(text) - start > BLOCK:
        found = text.find("\n", start + BLOCK - 1)
        if found < 0:
            break
        start = found + 1
        ends.append(start)
    return ends if ends and start == len(text) else [*ends, len(text)]


def score_texts(
    runtime: Runtime, tokenizer: Tokenizer, texts: Iterable[str], *, context: int | None = None
) -> TextScores:
    """Score texts as one stream, each token once: `token_logprobs` of all of them, a piece at a time.

    Raises InputError for a tokenizer without an end token, and LmworksError for logits that are not finite.
    """
    if tokenizer.eos_id is None:
        raise InputError("the tokenizer has no token that ends a document", expected="an eos_token")
    scores, context = TextScores(tokens=tokenizer.backend.to_str()), context or runtime.max_length
    stride = max(1, context // 2)
    chunk = stride * WINDOWS
    held, owners, known = np.array([tokenizer.eos_id]), np.zeros(1, np.int64), 0

    def score(ids: Ints, blocks: Ints) -> None:
        found = token_logprobs(runtime, ids, context=context, stride=stride, entropy=True)
        at, ones = blocks[1 + known :], np.ones(len(ids) - 1 - known)
        assert found.entropy is not None
        scores.add(at, nats=-found.logprobs[known:], tokens=ones, right=found.correct[known:],
                   entropy=found.entropy[known:])  # fmt: skip

    for ids, blocks in encode(tokenizer, texts, scores):
        held, owners = np.concatenate([held, ids]), np.concatenate([owners, blocks])
        while len(held) - 1 > context + chunk:  # the windows of all the text, WINDOWS at a time
            score(held[: context + chunk + 1], owners[: context + chunk + 1])
            held, owners, known = held[chunk + stride :], owners[chunk + stride :], context - stride
    if len(held) - 1 > known:
        score(held, owners)
    return scores


def encode(tokenizer: Tokenizer, texts: Iterable[str], scores: TextScores) -> Iterator[tuple[Ints, Ints]]:
    """Yield the tokens of each text and its end, with the number of the block that each belongs to."""
    for text in texts:
        first = len(scores.documents)
        ends, start = np.array(scores.open(text)), 0
        scores.is_whole = scores.is_whole and tokenizer.knows(text)
        for group in groups(tokenizer, [text]):
            found = tokenizer.encode_bare([piece for piece, _ in group])
            for (piece, last), encoding in zip(group, found, strict=True):
                places = start + np.array([end for _, end in encoding.offsets], np.int64)
                blocks = first + np.searchsorted(ends, places).clip(max=len(ends) - 1)
                start += len(piece)
                ids, at_end = [*encoding.ids, *[tokenizer.eos_id] * last], [first + len(ends) - 1] * last
                yield np.array(ids, np.int64), np.array([*blocks, *at_end], np.int64)


def lines_of(text: str) -> list[str]:
    """Return the lines of a document; what a last line end closes is no line."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def score_lines(text: str, nats: Float64, tokens: Ints, scores: TextScores) -> None:
    """Add a document whose `lines_of` cost so many nats in so many tokens, (lines,) each: an n-gram model's."""
    lines, first = lines_of(text), len(scores.documents)
    ends = np.array(scores.open(text))
    places = np.cumsum([len(line) + 1 for line in lines]).clip(max=ends[-1])
    scores.add(first + np.searchsorted(ends, places), nats=nats, tokens=tokens,
               right=np.full(len(lines), np.nan), entropy=np.full(len(lines), np.nan))  # fmt: skip
