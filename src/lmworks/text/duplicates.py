"""Exact and near duplicates of a corpus of any size: MinHash in flat memory, the bulk of the data on the disk.

A document is the set of its windows of 8 characters, in lower case and with single blanks. One hash a window, thrown
into 120 bins; the least of each bin is the signature (one-permutation hashing: Li, Owen and Zhang 2012; an empty bin
borrows one: Shrivastava 2017). Two signatures agree in a share of bins that estimates the Jaccard similarity

    J(a, b) = |a ∩ b| / |a ∪ b|        standard error √(J (1 − J) / 120), at most 0.046

Documents that agree in all rows of a band are candidates (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3); r
rows are as many as find nine in ten pairs at the threshold t: 1 − (1 − t^r)^(120 / r) ≥ 0.9. A candidate whose whole
signature agrees in a share t is a duplicate, and so is a duplicate's duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

BINS = 120
WINDOW = 8  # characters
EMPTY = np.uint32(0xFFFFFFFF)
FACTOR = 0x9E3779B97F4A7C15  # odd: 2⁶⁴ divided by the golden ratio
BLOCK = 1 << 17  # characters that are hashed at once
SORTED = 1 << 21  # keys that are sorted at once: 32 MB with their places, and as much again to sort them
ROWS = 1 << 15  # signatures that are read at once
MOST_TRIED = 32  # different documents of one bucket that others are compared with
UINT = NDArray[np.uint64]


def key(text: str) -> int:
    """Return 64 bits that equal texts share; two others of 10⁸ do with a chance of 0.0003."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def scramble(values: UINT) -> UINT:
    """Return well mixed bits of each number (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sign(texts: Sequence[str]) -> NDArray[np.uint16]:
    """Return the signature of each text, [texts, 120]."""
    least = np.full(len(texts) * BINS, EMPTY)
    held: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        plain = " ".join(text.lower().split()).ljust(WINDOW)
        for start in range(0, len(plain) - WINDOW + 1, BLOCK):
            piece = plain[start : start + BLOCK + WINDOW - 1]
            held.append((number, piece))
            size += len(piece)
            if size >= BLOCK:
                fill(least, held)
                held, size = [], 0
    fill(least, held)
    table = least.reshape(len(texts), BINS)
    borrow(table)
    return table.astype(np.uint16)


def fill(least: NDArray[np.uint32], pieces: Sequence[tuple[int, str]]) -> None:
    """Lower the bins of each piece's document to the hashes of its windows."""
    if not pieces:
        return
    joined = "".join(piece for _, piece in pieces).encode("utf-32-le", "surrogatepass")
    windows = np.frombuffer(joined, np.uint32).astype(np.uint64)
    for width in (1, 2, 4):  # the hash of 2w characters from that of w
        windows = windows[:-width] * np.uint64(pow(FACTOR, width, 1 << 64)) + windows[width:]
    lengths = [len(piece) for _, piece in pieces]
    owners = np.repeat([number for number, _ in pieces], lengths)
    ends = np.cumsum(lengths)
    inside = np.ones(ends[-1], bool)
    for back in range(1, WINDOW):  # windows that reach into the next piece
        inside[ends - back] = False
    inside = inside[: len(windows)]
    hashes = scramble(windows[inside])
    bins = ((hashes >> np.uint64(32)) * np.uint64(BINS)) >> np.uint64(32)
    places = owners[: len(inside)][inside] * BINS + bins.astype(np.int64)
    np.minimum.at(least, places, hashes.astype(np.uint32))


def borrow(table: NDArray[np.uint32]) -> None:
    """Fill each empty bin from one that the bin's own sequence of draws meets first; the same for every document."""
    full = table != EMPTY
    documents, bins = np.nonzero(~full)
    for attempt in range(1, 4 * BINS):
        if not len(documents):
            return
        draws = (scramble(bins.astype(np.uint64) + np.uint64(attempt << 32)) % np.uint64(BINS)).astype(np.int64)
        found = full[documents, draws]
        table[documents[found], bins[found]] = table[documents[found], draws[found]]
        documents, bins = documents[~found], bins[~found]
    table[documents, bins] = table[documents].min(axis=1)


def choose_rows(threshold: float) -> int:
    """Return the rows of a band: the most that still find nine in ten pairs of that similarity."""
    fits = [rows for rows in range(1, BINS + 1) if BINS % rows == 0]
    return max(rows for rows in fits if rows == 1 or 1 - (1 - threshold**rows) ** (BINS // rows) >= 0.9)


class Fingerprints:
    """The keys and signatures of a corpus, in files; `groups` tells which belong together, and sets `exact`."""

    def __init__(self, folder: Path, *, threshold: float | None) -> None:
        """`threshold` is the similarity of near duplicates; None looks for exact ones only."""
        self.threshold, self.count, self.exact = threshold, 0, 0
        self.keys = (folder / "keys").open("w+b")
        self.signatures = (folder / "signatures").open("w+b")

    def __enter__(self) -> Fingerprints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keys.close()
        self.signatures.close()

    def add(self, keys: UINT, signatures: NDArray[np.uint16] | None) -> None:
        """Take the next documents' keys [n] and, where near duplicates are looked for, signatures [n, 120]."""
        self.count += len(keys)
        self.keys.write(keys.tobytes())
        if signatures is not None:
            self.signatures.write(signatures.tobytes())

    def groups(self) -> NDArray[np.int64]:
        """Return for each document the first one of its group, itself if it is new; 8 bytes a document are held."""
        first = np.arange(self.count)
        for members in self.alike(None, first):
            first[members[1:]] = members[0]
            self.exact += len(members) - 1
        if self.threshold is None:
            return first
        exact = first.copy()
        rows = choose_rows(self.threshold)
        for band in range(0, BINS, rows):
            for members in self.alike(slice(band, band + rows), exact):
                self.unite(first, members)
        for i in range(self.count):
            first[i] = first[first[i]] if exact[i] == i else first[exact[i]]  # parents come earlier, and are done
        return first

    def alike(self, band: slice | None, first: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield the places, in order, of documents with one key, or one band, that are not exact copies."""
        shares = 1 + self.count // SORTED
        for share in range(shares):
            found_keys, found_places = [], []
            for start, keys in self.read(band):
                places = np.arange(start, start + len(keys))
                kept = first[places] == places
                if shares > 1:
                    kept &= (keys >> np.uint64(32)) % np.uint64(shares) == share
                found_keys.append(keys[kept])
                found_places.append(places[kept])
            keys, places = np.concatenate(found_keys), np.concatenate(found_places)
            del found_keys, found_places
            order = np.argsort(keys, kind="stable")
            keys, places = keys[order], places[order]
            begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
            sizes = np.diff(np.append(begins, len(keys)))
            for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
                yield places[begin : begin + size]

    def read(self, band: slice | None) -> Iterator[tuple[int, UINT]]:
        """Yield (place of the first, keys) of some documents at a time: their own, or those of a band."""
        file, width = (self.keys, 8) if band is None else (self.signatures, 2 * BINS)
        file.flush()
        file.seek(0)
        start = 0
        while data := file.read(ROWS * width):
            if band is None:
                keys = np.frombuffer(data, np.uint64)
            else:
                rows = np.frombuffer(data, np.uint16).reshape(-1, BINS)[:, band].astype(np.uint64)
                keys = np.zeros(len(rows), np.uint64)
                for j in range(rows.shape[1]):
                    keys = scramble(keys * np.uint64(FACTOR) + rows[:, j] + np.uint64(1))
            yield start, keys
            start += len(keys)
        if not start:
            yield 0, np.zeros(0, np.uint64)

    def unite(self, first: NDArray[np.int64], members: NDArray[np.int64]) -> None:
        """Put those members of a bucket into one group whose whole signatures agree."""
        roots = [find(first, member) for member in members.tolist()]
        if len(set(roots)) == 1:
            return
        signatures = np.stack([self.signature(member) for member in members.tolist()])  # [members, 120]
        left = np.arange(len(members))
        for _ in range(MOST_TRIED):
            agree = (signatures[left] == signatures[left[0]]).mean(axis=1) >= self.threshold
            for member in members[left[agree]].tolist():
                a, b = find(first, int(members[left[0]])), find(first, member)
                first[max(a, b)] = min(a, b)
            left = left[~agree]
            if len(left) < 2:
                return

    def signature(self, place: int) -> NDArray[np.uint16]:
        """Return one document's signature, [120]."""
        self.signatures.seek(place * 2 * BINS)
        return np.frombuffer(self.signatures.read(2 * BINS), np.uint16)


def find(first: NDArray[np.int64], place: int) -> int:
    """Return the first document of a group, and shorten the way to it."""
    root = place
    while first[root] != root:
        root = int(first[root])
    while first[place] != root:
        first[place], place = root, int(first[place])
    return root
