"""A fixture: what a reference was given and what it answered, to compare with where it is not installed.

One safetensors file. Its metadata says which weights (source_sha), which reference, and how it computed; its tensors
are named head/group/row/name: "SequenceClassification/texts/0/input_ids", ".../numbers". The outputs over a large
vocabulary are kept for a few tokens of each row only, which `kept` (K,) lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import write_bytes
from lmworks.export.reference import Arrays

FORMAT = "lmworks-parity-1"
FACTS = ("source", "source_sha", "transformers_version", "torch_version", "attention")  # beside the format
WIDE, KEEP = 1024, 8  # of more outputs than this, the numbers of so many tokens are kept
Record = dict[str, dict[str, list[Arrays]]]  # head -> group of rows -> rows: inputs and the reference's outputs


def write_fixture(path: Path, record: Record, facts: dict[str, str]) -> None:
    """Write a fixture atomically, over whatever is there (`check_free` says what is); `facts` are FACTS."""
    tensors = {
        f"{head}/{group}/{i}/{name}": np.ascontiguousarray(array)
        for head, groups in record.items()
        for group, rows in groups.items()
        for i, row in enumerate(rows)
        for name, array in thin(row).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, metadata={**facts, "format": FORMAT}))


def check_free(path: Path) -> None:
    """Raise InputError for a file that is there and is no fixture: it might be somebody's weights."""
    if path.is_dir():
        raise InputError("the fixture's path is a folder", where=str(path), fix="give the name of a file")
    if path.exists():
        try:
            read_fixture(path)
        except FormatError:
            raise InputError("this file is not a fixture; it stays", where=str(path), fix="choose a new name") from None


def read_fixture(path: Path) -> tuple[Record, dict[str, str]]:
    """Return what `write_fixture` wrote. Raises FormatError for any other file."""
    record: Record = {}
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, str] = file.metadata() or {}
            if facts.get("format") != FORMAT or not all(facts.get(name) for name in FACTS):
                raise not_a_fixture(path, f"a safetensors file with the metadata {sorted(facts)}")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                head, group, place, name = key.split("/")
                rows = record.setdefault(head, {}).setdefault(group, [])
                rows.extend({} for _ in range(int(place) + 1 - len(rows)))
                rows[int(place)][name] = file.get_tensor(key)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise not_a_fixture(path, str(error)) from None
    rows = [row for groups in record.values() for group in groups.values() for row in group]
    if not rows or not all("numbers" in row and ("input_ids" in row or "pixel_values" in row) for row in rows):
        raise not_a_fixture(path, "rows without inputs or outputs")
    return record, facts


def thin(row: Arrays) -> Arrays:
    """Keep the numbers (T, O) of a few tokens, the last among them, where each has very many."""
    numbers = row["numbers"]
    if "tokens" in row or numbers.ndim < 2 or numbers.shape[1] <= WIDE or len(numbers) <= KEEP:
        return row
    kept: Any = np.unique(np.linspace(0, len(numbers) - 1, KEEP).astype(np.int64))
    return {**row, "numbers": numbers[kept], "kept": kept}


def not_a_fixture(path: Path, found: str) -> FormatError:
    """Return the error for a file that cannot be compared with."""
    return FormatError(
        "this is not a fixture of a reference's answers",
        where=str(path),
        found=found[:300],
        fix="make one with: lmworks verify MODEL --against transformers --save-fixture FILE",
    )
