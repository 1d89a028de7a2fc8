"""From a path to what training needs: cleaned documents, a split, and the facts for the receipt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lmworks.base.errors import InputError
from lmworks.text.clean import clean
from lmworks.text.read import Document, read_documents
from lmworks.text.split import split_documents

LEAST_BYTES = 2_000  # less text than this teaches nothing: a dozen sentences
BUILT_IN_BYTES = 1_200_000


@dataclass(frozen=True)
class Corpus:
    """Documents for training and validation; `floor` is the exact entropy of the validation part in bits, if known."""

    name: str
    train: list[Document]
    validation: list[Document]
    sha256: str
    floor: float | None = None

    @property
    def train_bytes(self) -> int:
        """Bytes of UTF-8 in the training part."""
        return count_bytes(self.train)

    @property
    def validation_bytes(self) -> int:
        """Bytes of UTF-8 in the validation part."""
        return count_bytes(self.validation)


def count_bytes(documents: list[Document]) -> int:
    """Return the UTF-8 bytes of all documents together."""
    return sum(len(document.text.encode("utf-8")) for document in documents)


def read_clean(path: Path, *, column: str | None = None) -> list[Document]:
    """Return the cleaned documents of a file or folder, without empty ones."""
    documents = [Document(document.name, clean(document.text)) for document in read_documents(path, column=column)]
    return [document for document in documents if document.text.strip()]


def read_corpus(path: Path | None, *, column: str | None = None, validation: float = 0.1, seed: int = 0) -> Corpus:
    """Read and clean a file or folder and split it; None gives the built-in constructed language."""
    if path is None:
        from lmworks.text.sample import Language, make_documents

        documents = make_documents(n_bytes=BUILT_IN_BYTES, seed=seed)
        name = Language().name
    else:
        documents = read_clean(path, column=column)
        name = path.stem if path.is_file() else path.resolve().name
    size = count_bytes(documents)
    if size < LEAST_BYTES:
        raise InputError(
            "too little text to train on",
            where=str(path),
            found=f"{size:,} bytes after cleaning",
            expected=f"at least {LEAST_BYTES:,}; a useful model needs about a million",
            fix="give a larger file, or a folder of files",
        )
    train, held_out = split_documents(documents, validation=validation, seed=seed)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode("utf-8") + b"\0")
    floor = None
    if path is None:
        floor = sum(Language().document_bits(document.text) for document in held_out)
    return Corpus(name, train, held_out, digest.hexdigest(), floor)
