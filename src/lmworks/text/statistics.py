"""What a corpus is made of: sizes, words, lengths, repetition, and rules of quality; batches add up, in flat memory.

type/token       types / words; by segments of 1,000 words too, as it falls with the length of a text
distinct-n       different n-grams / n-grams (Li et al. 2016)
rules            those of Rae et al. 2021 (Gopher, appendix A1) that hold for any language

Different lines and n-grams are counted by a sample of their hashes (Gibbons 2001), exactly up to LIMIT of them, and
beyond with a standard error of about √(2/LIMIT) = 0.3 %.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.text.clean import mend_surrogates
from lmworks.text.duplicates import FACTOR, key, scramble
from lmworks.text.language import identify
from lmworks.text.stream import Record

WORD = re.compile(r"\w+(?:['’]\w+)*")
SEGMENT = 1000  # words
LIMIT = 1 << 18
MOST_TYPES = 1_000_000  # words whose counts are held; beyond, those seen once are forgotten
NGRAMS = (1, 2, 3)
ELLIPSES, BULLETS = ("...", "…"), ("•", "‣", "●", "-", "*", "–")
UINT = NDArray[np.uint64]


@dataclass
class Distinct:
    """How many different hashes there are, from those that end in `level` zero bits."""

    kept: UINT = field(default_factory=lambda: np.zeros(0, np.uint64))
    level: int = 0
    total: int = 0

    def add(self, hashes: UINT, total: int, level: int = 0) -> None:
        """Take hashes, with repeats or without; `total` is how many they were with repeats."""
        self.level, self.total = max(self.level, level), self.total + total
        self.kept = np.union1d(self.thin(self.kept), self.thin(hashes))
        while len(self.kept) > LIMIT:
            self.level += 1
            self.kept = self.thin(self.kept)

    def thin(self, hashes: UINT) -> UINT:
        """Return the hashes of this level."""
        kept: UINT = hashes[hashes & np.uint64((1 << self.level) - 1) == 0]
        return kept

    @property
    def count(self) -> int:
        """How many different ones there are."""
        return len(self.kept) << self.level

    @property
    def share(self) -> float | None:
        """Different ones for each one."""
        return min(1.0, self.count / self.total) if self.total else None


@dataclass
class Measures:
    """What was counted so far."""

    sizes: Counter[str] = field(default_factory=Counter)  # documents, characters, bytes, words, lines, segments
    words: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # words of a document
    failed: Counter[str] = field(default_factory=Counter)  # documents, by rule
    languages: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)
    segment_types: int = 0
    lines: Distinct = field(default_factory=Distinct)
    ngrams: dict[int, Distinct] = field(default_factory=lambda: {n: Distinct() for n in NGRAMS})
    forgot: bool = False

    def add(self, other: Measures) -> None:
        """Count what another batch counted."""
        for name in ("sizes", "words", "lengths", "failed", "languages", "encodings"):
            getattr(self, name).update(getattr(other, name))
        self.segment_types += other.segment_types
        self.lines.add(other.lines.kept, other.lines.total, other.lines.level)
        for n, found in other.ngrams.items():
            self.ngrams[n].add(found.kept, found.total, found.level)
        if len(self.words) > MOST_TYPES:
            self.words = Counter({word: count for word, count in self.words.items() if count > 1})
            self.forgot = True


def to_words(text: str) -> list[str]:
    """Return the words of a text in lower case; a script without blanks gives its clauses."""
    return WORD.findall(text.lower())


@lru_cache(maxsize=1 << 17)
def hash_word(word: str) -> int:
    """Return a word's 64 bits."""
    return key(word)


def measure(batch: Sequence[Record], *, languages: bool) -> Measures:
    """Count some documents."""
    found = Measures()
    hashes, ends, lines = [], [], []
    for document in batch:
        text, words = mend_surrogates(document.text), to_words(document.text)
        rows = [row for line in text.split("\n") if (row := line.strip())]
        found.sizes.update(
            documents=1, characters=len(text), bytes=len(text.encode()), words=len(words), lines=len(rows)
        )
        found.words.update(words)
        found.lengths[len(words)] += 1
        found.encodings[document.encoding] += 1
        found.failed.update(name for name, fails in RULES.items() if fails(words, rows))
        if languages:
            found.languages[identify(text)] += 1
        for start in range(0, len(words) - SEGMENT + 1, SEGMENT):
            found.sizes["segments"] += 1
            found.segment_types += len(set(words[start : start + SEGMENT]))
        lines += rows
        hashes += [hash_word(word) for word in words]
        ends.append(len(hashes))
    found.lines.add(np.array([hash_word(line) for line in lines], np.uint64), len(lines))
    add_ngrams(found, np.array(hashes, np.uint64), np.array(ends))
    return found


def add_ngrams(found: Measures, words: UINT, ends: NDArray[np.int64]) -> None:
    """Count the n-grams of documents that end at these words; none reaches into the next document."""
    grams = scramble(words)
    starts = np.ones(len(words), bool)
    for n in NGRAMS:
        if n > 1:
            grams = scramble(grams[:-1] * np.uint64(FACTOR) + words[n - 1 :]) if len(grams) else grams
            starts[ends[ends >= n - 1] - (n - 1)] = False
        inside = grams[starts[: len(grams)]]
        found.ngrams[n].add(inside, len(inside))


def repeats(n: int, most: float) -> Callable[[Sequence[str], Sequence[str]], bool]:
    """Return a rule: the most frequent n-gram, if it is seen twice, has more than this share of all letters."""

    def fails(words: Sequence[str], lines: Sequence[str]) -> bool:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        if not counts:
            return False
        gram, count = counts.most_common(1)[0]
        return count > 1 and count * sum(map(len, gram)) > most * sum(map(len, words))

    return fails


def share_of(lines: Sequence[str], wanted: Callable[[str], Any]) -> float:
    """Return the share of lines that are as wanted."""
    return sum(1 for line in lines if wanted(line)) / max(1, len(lines))


RULES: dict[str, Callable[[Sequence[str], Sequence[str]], bool]] = {
    "fewer than 50 words": lambda words, lines: len(words) < 50,
    "more than 100,000 words": lambda words, lines: len(words) > 100_000,
    "mean word shorter than 3 or longer than 10 letters": lambda words, lines: (
        bool(words) and not 3 <= sum(map(len, words)) / len(words) <= 10
    ),
    "a # or … for fewer than ten words": lambda words, lines: (
        sum(line.count("#") + line.count("…") + line.count("...") for line in lines) > 0.1 * len(words)
    ),
    "over 90 % of lines begin with a bullet": lambda words, lines: (
        share_of(lines, lambda s: s.startswith(BULLETS)) > 0.9
    ),
    "over 30 % of lines end in …": lambda words, lines: share_of(lines, lambda s: s.endswith(ELLIPSES)) > 0.3,
    "over 20 % of words without a letter": lambda words, lines: (
        sum(any(c.isalpha() for c in word) for word in words) < 0.8 * len(words)
    ),
    "over 30 % of lines repeat another": lambda words, lines: len(set(lines)) < 0.7 * len(lines),
    "one pair of words has over 20 % of the text": repeats(2, 0.20),
    "three words in a row have over 18 %": repeats(3, 0.18),
    "four words in a row have over 16 %": repeats(4, 0.16),
}
