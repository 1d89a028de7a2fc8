"""Byte-pair encoding, written out to be read: how merges are learned, and how a text is cut by them.

A text is cut into words as GPT-2 cuts it, a word into bytes. The pair of neighbours that stands most often in all words
becomes one piece, and so on. Of pairs that are equally frequent the tokenizers library takes the one whose left piece
has the lower id, then whose right piece has; ids go to the bytes first, printable ones before the others, and then to
new pieces as they are made. `learn` keeps that rule, and its merges are the library's (a test compares them).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from lmworks.base.optional import require

Pair = tuple[bytes, bytes]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]  # shown as the letters from 256 on, in order
ORDER = [*PRINTABLE, *HIDDEN]  # the bytes by their ids


def cut(text: str) -> list[list[bytes]]:
    """Return the words of a text in bytes: "so low" -> [[b"s", b"o"], [b" ", b"l", b"o", b"w"]]."""
    words = (word.encode("utf-8") for word in require("regex", extra="text").findall(WORDS, text))
    return [[word[i : i + 1] for i in range(len(word))] for word in words]


def join(pieces: Sequence[bytes], pair: Pair) -> list[bytes]:
    """Join the pair wherever it stands, from the left: a a a -> aa a."""
    joined, i = [], 0
    while i < len(pieces):
        both = tuple(pieces[i : i + 2]) == pair
        joined.append(b"".join(pair) if both else pieces[i])
        i += 2 if both else 1
    return joined


def learn(texts: Iterable[str], merges: int, *, min_frequency: int = 2) -> list[Pair]:
    """Return the pairs to join, in order; fewer than `merges` where none is frequent enough."""
    seen = Counter(tuple(word) for text in texts for word in cut(text))
    words = [(list(word), times) for word, times in seen.items()]
    counts, places = Counter[Pair](), defaultdict[Pair, set[int]](set)  # how often a pair stands, and in which words
    for place, (word, times) in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times
            places[pair].add(place)
    ids = {bytes([byte]): id for id, byte in enumerate(ORDER)}
    learned: list[Pair] = []
    while counts and len(learned) < merges:
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        if counts[best] < min_frequency:
            break
        learned.append(best)
        ids.setdefault(b"".join(best), len(ids))
        for place in places.pop(best):
            word, times = words[place]
            for pair in pairwise(word):
                counts[pair] -= times
            word = join(word, best)
            words[place] = word, times
            for pair in pairwise(word):
                counts[pair] += times
                places[pair].add(place)
        counts.pop(best)
    return learned


def encode(text: str, merges: Sequence[Pair]) -> list[bytes]:
    """Return the pieces of a text: in each word the pair that was learned first is joined first."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces: list[bytes] = []
    for word in cut(text):
        while known := [pair for pair in pairwise(word) if pair in ranks]:
            word = join(word, min(known, key=ranks.__getitem__))
        pieces += word
    return pieces
