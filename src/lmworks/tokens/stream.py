"""Texts of any size for the training of a tokenizer: cleaned pieces of files, all of them or a seeded sample.

Plain text is cut before line ends, where none of our tokenizers joins anything, so that the pieces teach what the whole
file would. A document, when documents are drawn, is a row of a table, a page, or a line of plain text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from lmworks.base.errors import InputError
from lmworks.text.clean import clean
from lmworks.text.open import missing
from lmworks.text.read import READERS, Part, find_files, open_parts

PIECE = 1 << 16  # characters that are handed over at once
LONGEST = 1 << 20  # a line that is longer is cut at a blank, or anywhere
LINE_END = re.compile(r"(?<=\S)(?=[\r\n])")


class Texts:
    """The cleaned texts of files and folders, read anew each time they are asked for; memory stays flat.

    `sample` below 1 keeps that share of the documents, from 1 on that many of them, all with equal chances. After a
    pass `characters` and `sha256` say what it gave, `encodings` how the files were written.
    """

    def __init__(
        self, paths: Iterable[str | Path], *, column: str | None = None, sample: float | None = None, seed: int = 0
    ) -> None:
        """Find the files; raise InputError for one that is not there, or a sample that cannot be drawn."""
        if sample is not None and (sample <= 0 or (sample > 1 and sample != int(sample))):
            raise InputError(
                "this sample cannot be drawn", found=f"{sample:g}", expected="a share below 1, or a number of documents"
            )
        self.files = [file for path in paths for file in list_files(Path(path))]
        self.column, self.sample, self.seed = column, sample, seed
        self.characters, self.sha256, self.encodings = 0, "", set[str]()

    @property
    def bytes(self) -> int:
        """The size of the files, unknown (0) for standard input and much smaller where they are packed."""
        return sum(file.stat().st_size for file in self.files if file.is_file())

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces; raise InputError where there is no text."""
        digest, self.characters = hashlib.sha256(), 0
        for piece in self.draw():
            if piece:
                self.characters += len(piece)
                digest.update(piece.encode("utf-8") + b"\0")
                yield piece
        self.sha256 = digest.hexdigest()
        if not self.characters:
            fix = "give other files" if self.sample is None else "a larger --sample, or another --seed: none was drawn"
            raise InputError("there is no text here", where=", ".join(map(str, self.files)), fix=fix)

    def draw(self) -> Iterator[str]:
        """Yield all pieces, or those of the documents that are drawn, in their order."""
        if self.sample is None:
            yield from self.read(PIECE)
        elif self.sample < 1:
            rng = random.Random(self.seed)
            yield from (text for text in self.read(1) if rng.random() < self.sample)
        else:
            yield from reservoir(self.read(1), int(self.sample), self.seed)

    def read(self, size: int) -> Iterator[str]:
        """Yield every text, plain ones in pieces of at least `size` characters."""
        for file in self.files:

            def plain(stream: TextIO, path: Path, column: str | None) -> Iterator[Part]:
                return (Part("", piece) for piece in cut(chunks(stream), size))

            parts, encoding = open_parts(file, self.column, plain=plain)
            self.encodings.add(encoding)
            yield from (text for text in (clean(part.text) for part in parts) if not text.isspace())


def list_files(path: Path) -> list[Path]:
    """Return the file, or the readable files of a folder; raise InputError where there is none."""
    if path.is_dir():
        found = list(find_files(path))
        if not found:
            raise InputError("no text files here", where=str(path), expected=", ".join(sorted(READERS)))
        return found
    if not path.exists() and str(path) != "-":
        raise missing(path)
    return [path]


def chunks(stream: TextIO) -> Iterator[str]:
    """Yield what a stream holds, a piece at a time."""
    while chunk := stream.read(PIECE):
        yield chunk


def cut(parts: Iterable[str], size: int, longest: int = LONGEST) -> Iterator[str]:
    """Join parts of a text and cut them again before line ends, into pieces of at least `size` characters."""
    rest = ""
    for part in parts:
        rest += part
        start = 0
        for end in (found.start() for found in LINE_END.finditer(rest)):
            if end - start >= size:
                yield rest[start:end]
                start = end
        rest = rest[start:]
        while len(rest) > longest:
            end = 1 + rest.rfind(" ", longest // 2, longest) or longest
            yield rest[:end]
            rest = rest[end:]
    yield rest


def reservoir(texts: Iterable[str], count: int, seed: int) -> Iterator[str]:
    """Yield `count` of the texts, all with equal chances, in their order (Vitter 1985, algorithm R)."""
    rng = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for i, text in enumerate(texts):
        if i < count:
            kept.append((i, text))
        elif (place := rng.randrange(i + 1)) < count:
            kept[place] = (i, text)
    yield from (text for _, text in sorted(kept))
