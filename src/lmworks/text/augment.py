"""Small changes that leave a text's label as it is (Wei and Zou 2019, without synonyms: "EDA").

swap     two words change places
drop     words are left out
typo     two neighbouring letters inside a word change places
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from lmworks.text.duplicates import key

WORD = re.compile(r"\S+")
LONG_ENOUGH = 4  # letters of a word that can hold a slip: its first and last stay


def swap(words: list[str], count: int, rng: Random) -> None:
    """Let so many pairs of words change places."""
    for _ in range(count if len(words) > 1 else 0):
        a, b = rng.sample(range(len(words)), 2)
        words[a], words[b] = words[b], words[a]


def drop(words: list[str], count: int, rng: Random) -> None:
    """Empty so many words, but not all."""
    for place in rng.sample(range(len(words)), min(count, len(words) - 1)):
        words[place] = ""


def slip(words: list[str], count: int, rng: Random) -> None:
    """Let two letters change places in so many words."""
    fit = [i for i, word in enumerate(words) if len(word) >= LONG_ENOUGH and word.isalpha()]
    for place in rng.sample(fit, min(count, len(fit))):
        word = words[place]
        at = rng.randrange(1, len(word) - 2)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]


WAYS: dict[str, Callable[[list[str], int, Random], None]] = {"swap": swap, "drop": drop, "typo": slip}


def augment(text: str, way: str, *, share: float, seed: str) -> str:
    """Return the text with this share of its words changed, at least one; the same for the same seed and text."""
    words: list[str] = WORD.findall(text)
    if not words:
        return text
    blanks = WORD.split(text)
    WAYS[way](words, max(1, round(share * len(words))), Random(f"{seed} {way} {key(text)}"))
    parts = [blanks[0]]
    for word, blank in zip(words, blanks[1:], strict=True):
        if word:
            parts += [word, blank]
    return "".join(parts)
