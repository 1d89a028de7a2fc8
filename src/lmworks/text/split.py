"""Share documents out, or keep a part for validation: the same for the same seed, and no text on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.text.duplicates import scramble
from lmworks.text.read import Document

FEW = 20  # with fewer documents than this, each gives its own last part


def split_documents(
    documents: Sequence[Document], *, validation: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (training, validation), each in the order of `documents`.

    Of many documents, whole ones are drawn by a hash of seed and text until they hold `validation` of all characters,
    so that exact duplicates stay together and the order of the files does not matter. Of few documents, or where one
    outweighs the validation part, the last `validation` of each is kept: a single text is cut at exactly that
    character, several at the line end or blank before it. Raises InputError where a side would be empty.
    """
    if not 0 < validation < 1:
        raise InputError("the validation share is out of range", found=str(validation), expected="between 0 and 1")
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.text] = sizes.get(document.text, 0) + len(document.text)
    wanted = validation * sum(sizes.values())
    if len(sizes) < FEW or max(sizes.values()) > wanted:
        sides = [cut(document, validation, exactly=len(documents) == 1) for document in documents]
        train, held_out = [a for a, _ in sides if a.text], [b for _, b in sides if b.text]
    else:
        drawn = draw(sizes, wanted, seed)
        train = [document for document in documents if document.text not in drawn]
        held_out = [document for document in documents if document.text in drawn]
    if not train or not held_out:
        raise InputError("too little text to keep some for validation", found=f"{sum(sizes.values())} characters")
    return train, held_out


def draw(sizes: dict[str, int], wanted: float, seed: int) -> set[str]:
    """Return the texts that come first by hash and together hold up to `wanted` characters."""
    salt = seed.to_bytes(16, "little", signed=True)
    drawn: set[str] = set()
    for text in sorted(sizes, key=lambda text: blake2b(text.encode("utf-8", "surrogatepass"), salt=salt).digest()):
        if sizes[text] <= wanted:
            drawn.add(text)
            wanted -= sizes[text]
    return drawn


def cut(document: Document, validation: float, *, exactly: bool) -> tuple[Document, Document]:
    """Cut a document before its last `validation` characters, or after the line end or blank before that place."""
    text = document.text
    at = int(len(text) * (1 - validation))
    if not exactly:
        at = 1 + text.rfind("\n", at // 2, at) or 1 + text.rfind(" ", at // 2, at) or at
    return replace(document, text=text[:at]), replace(document, text=text[at:])


def share_out(
    groups: NDArray[np.int64],
    keys: NDArray[np.uint64],
    strata: NDArray[np.int64],
    shares: Sequence[float],
    *,
    seed: int = 0,
) -> NDArray[np.int8]:
    """Return the number of each document's share, such that a group (named by its first document) stays together.

    Groups come in the order of a hash of seed and text; each goes where most documents are missing, of its stratum (its
    first document's) and in all, so that every stratum is shared out alike. [documents], as all arguments.
    """
    sizes = np.bincount(groups, minlength=len(groups))
    firsts = np.flatnonzero(sizes)
    salt = np.uint64(int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    order = firsts[np.argsort(scramble(keys[firsts] ^ salt), kind="stable")]
    held = [[0.0] * len(shares) for _ in range(int(strata.max(initial=0)) + 1)]  # documents of a stratum, by share
    total = [0.0] * len(shares)
    chosen = np.zeros(len(groups), np.int8)
    for group, stratum, size in zip(order.tolist(), strata[order].tolist(), sizes[order].tolist(), strict=True):
        row = held[stratum]
        here, everywhere = sum(row) + size, sum(total) + size
        missing = [s * (here + everywhere) - a - b for s, a, b in zip(shares, row, total, strict=True)]
        best = missing.index(max(missing))
        row[best] += size
        total[best] += size
        chosen[group] = best
    return chosen[groups]
