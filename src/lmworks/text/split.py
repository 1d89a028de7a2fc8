"""Keep a part of the documents for validation: the same part for the same seed, and no document on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmworks.base.errors import InputError
from lmworks.text.read import Document

FEW = 20  # with fewer documents than this, each gives its own last part


def split_documents(
    documents: Sequence[Document], *, validation: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (training, validation); exact duplicates stay on one side.

    Many documents are shuffled by the seed and taken whole until `validation` of all characters is reached. Of few
    documents, the last `validation` of each is kept, so a single file is cut once, as is usual for books.
    """
    if not 0 < validation < 1:
        raise InputError("the validation share is out of range", found=str(validation), expected="between 0 and 1")
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.text, []).append(document)
    if len(groups) < FEW:
        pairs = [cut(documents_of[0], 1 - validation) for documents_of in groups.values()]
        return [a for a, _ in pairs if a.text], [b for _, b in pairs if b.text]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(groups))
    members = list(groups.values())
    wanted = validation * sum(len(document.text) for document in documents)
    kept: list[Document] = []
    rest: list[Document] = []
    size = 0
    for i in order:
        if size < wanted:
            kept += members[i]
            size += sum(len(document.text) for document in members[i])
        else:
            rest += members[i]
    return rest, kept


def cut(document: Document, share: float) -> tuple[Document, Document]:
    """Cut a document after `share` of its characters."""
    at = int(share * len(document.text))
    return Document(document.name, document.text[:at]), Document(document.name, document.text[at:])
