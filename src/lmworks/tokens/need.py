"""How much memory the training of a tokenizer will take, told before it starts.

The trainers hold every distinct piece that a text is cut into once, with what stands where in it; so memory follows the
distinct pieces, not the text. How their number grows is read off the beginning of the texts (Heaps' law: half the text
against all of it), and what one costs was measured (BYTES, in bytes a character of it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

from lmworks.base.optional import require
from lmworks.tokens.tokenizer import UNK
from lmworks.tokens.train import Recipe, make_backend

BYTES = {"word": 40, "char": 40, "bpe": 140, "wordpiece": 140, "unigram": 200}
LOOKED_AT = 1_000_000  # characters at the beginning of the texts
FIXED = 150_000_000  # the interpreter and the library, and a piece of the text on its way


@dataclass(frozen=True)
class Need:
    """What the training will hold."""

    pieces: int  # distinct ones
    memory: int  # bytes


def estimate_need(plan: Recipe, texts: Iterable[str], characters: int) -> Need:
    """Return what training on texts of so many characters takes, judged by their beginning."""
    library = require("tokenizers", extra="text")
    cut = make_backend(plan, library.models.WordLevel({}, unk_token=UNK)).pre_tokenizer.pre_tokenize_str
    seen: set[str] = set()
    sizes: list[tuple[int, int]] = [(0, 0)]  # characters, and distinct pieces among them
    for text in texts:
        seen.update(piece for piece, _ in cut(text))
        sizes.append((sizes[-1][0] + len(text), len(seen)))
        if sizes[-1][0] >= LOOKED_AT:
            break
    read, found = sizes[-1]
    half, early = min(sizes, key=lambda size: abs(size[0] - read / 2))
    growth = log2(found / early) / log2(read / half) if 0 < early < found and 0 < half < read else 1.0
    pieces = round(found * max(1.0, characters / max(read, 1)) ** min(growth, 1.0))
    length = sum(map(len, seen)) / max(found, 1)
    return Need(pieces, FIXED + round(pieces * length * BYTES[plan.kind]))
