"""What a tokenizer makes of texts: how many tokens, what is unknown or lost, and how fast.

tokens a word     tokens / words; a word is a run of letters, digits and marks, or a Chinese character (fertility)
bytes a token     bytes of UTF-8 / tokens; comparable where languages have no words
unknown words     share of the words whose tokens, taken alone, hold the unknown token (the OOV rate)
unknown tokens    share of the tokens that are the unknown one
round trips       lines that decoding does not give back as they were
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from lmworks.base.optional import require
from lmworks.tokens.patterns import WORDS
from lmworks.tokens.tokenizer import Tokenizer

SIGNS = r"[^\p{L}\p{M}\p{N}\p{Pc}]"
ROUNDS = 3  # of the clock, in turns; the best counts
AT_ONCE = 4096  # lines that are encoded together


@dataclass(frozen=True)
class Measured:
    """How a tokenizer fares on some texts."""

    tokens: int
    words: int
    characters: int
    bytes: int
    lines: int
    unknown_tokens: int
    unknown_words: int
    failures: int  # lines that do not come back
    failure: str | None  # the first of them

    @property
    def tokens_per_word(self) -> float | None:
        """Fertility."""
        return self.tokens / self.words if self.words else None

    @property
    def bytes_per_token(self) -> float | None:
        """How much text a token stands for."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def oov_rate(self) -> float | None:
        """Share of the words that hold something unknown."""
        return self.unknown_words / self.words if self.words else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        rates = {
            "tokens_per_word": self.tokens_per_word,
            "bytes_per_token": self.bytes_per_token,
            "oov_rate": self.oov_rate,
            "unknown_token_rate": self.unknown_tokens / self.tokens if self.tokens else None,
            "round_trip_failure_rate": self.failures / self.lines if self.lines else None,
        }
        return {**rates, **asdict(self)}


def find_words(texts: Sequence[str]) -> Counter[str]:
    """Return the words of texts and how often they stand there; signs are no words."""
    regex = require("regex", extra="text")
    found = Counter(word for text in texts for word in regex.findall(WORDS, text))
    return Counter({word: times for word, times in found.items() if not regex.fullmatch(SIGNS, word)})


def measure(tokenizer: Tokenizer, lines: Sequence[str], words: Counter[str] | None = None) -> Measured:
    """Return what a tokenizer makes of lines of text, each without its line end; `words` are theirs, if known."""
    tokens = unknown = failures = unknown_words = 0
    failure: str | None = None
    unk = tokenizer.unk_id
    for start in range(0, len(lines), AT_ONCE):
        part = lines[start : start + AT_ONCE]
        for line, ids in zip(part, tokenizer.encode_batch(part), strict=True):
            tokens += len(ids)
            unknown += 0 if unk is None else ids.count(unk)
            if tokenizer.decode(ids, skip_special_tokens=False) != line:
                failures += 1
                failure = line if failure is None else failure
    words = find_words(lines) if words is None else words
    if unk is not None:
        alone = list(words)
        for start in range(0, len(alone), AT_ONCE):
            part = alone[start : start + AT_ONCE]
            for word, ids in zip(part, tokenizer.encode_batch(part), strict=True):
                unknown_words += words[word] * (unk in ids)
    return Measured(
        tokens=tokens,
        words=words.total(),
        characters=sum(map(len, lines)),
        bytes=sum(len(line.encode("utf-8", "replace")) for line in lines),
        lines=len(lines),
        unknown_tokens=unknown,
        unknown_words=unknown_words,
        failures=failures,
        failure=failure,
    )


def compare_speed(tokenizers: Sequence[Tokenizer], lines: Sequence[str]) -> list[float]:
    """Return how many times as fast as the first each one encodes the lines: the best of some rounds, in turns."""
    best = [float("inf")] * len(tokenizers)
    for _ in range(ROUNDS):
        for i, tokenizer in enumerate(tokenizers):
            start = perf_counter()
            tokenizer.encode_batch(lines)
            best[i] = min(best[i], perf_counter() - start)
    return [best[0] / max(seconds, 1e-9) for seconds in best]
