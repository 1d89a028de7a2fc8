"""Check an ONNX file before a library opens it: where its weights lie, and that they are there.

A graph may keep tensors in other files, by a path that it states. Such a path must name a file beside the graph, and
the bytes that a tensor claims must be in it. The file is walked field by field; what is long is skipped, never copied.

Source: protobuf's encoding; onnx.proto (the numbers of the fields).
"""

from __future__ import annotations

import itertools
import mmap
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from lmworks.base.errors import FormatError
from lmworks.base.files import own_file

DEEPEST, MOST_FIELDS = 64, 2_000_000  # beyond any real model; so many take seconds to walk
INSIDE = {  # message -> the fields that may hold tensors, and their messages
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
EXTERNAL, NAME, KEY, VALUE = 13, 8, 1, 2  # of a tensor, and of an entry that says where it lies
PLAIN = re.compile(r"[\w-][\w.-]{0,200}")
Bytes = mmap.mmap | bytes
Place = tuple[int, int]
Count = Iterator[int]  # of the fields that were met in the whole file


class Damaged(Exception):
    """What is wrong with the file."""


def check_onnx(path: str | Path) -> None:
    """Raise FormatError, which names the file and the tensor, unless the weights lie in this file or beside it."""
    path = own_file(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
            raise Damaged("it is empty, or no file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for name, entries in find_external(data, (0, len(data)), "model", itertools.count()):
                check_place(path, name, entries)
    except Damaged as error:
        fix = "fetch or export it again"
        raise FormatError(f"{path.name} cannot be loaded: {error}", where=str(path), fix=fix) from None
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read", where=str(path), found=error.strerror or str(error)) from None


def check_place(path: Path, name: str, entries: dict[str, str]) -> None:
    """Raise Damaged unless a tensor lies in a file beside the graph."""
    location = entries.get("location", "")
    if not PLAIN.fullmatch(location):
        raise Damaged(f"the tensor {name} lies in {location[:100]!r}, which is no file beside it")
    beside = own_file(path.with_name(location))
    if not beside.is_file():
        raise Damaged(f"the tensor {name} lies in {location}, which is missing")
    try:
        offset, length = (int(entries.get(key) or "0") for key in ("offset", "length"))
    except ValueError:
        raise Damaged(f"the tensor {name} has a place that is no number") from None
    size = beside.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        raise Damaged(f"the tensor {name} ends at byte {offset + length} of {location}, which has {size}")


def find_external(
    data: Bytes, place: Place, kind: str, count: Count, depth: int = 0
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each tensor that lies elsewhere, and the entries that say where."""
    if depth > DEEPEST:
        raise Damaged("its graphs are nested too deeply")
    if kind == "tensor":
        name, entries = "", dict[str, str]()
        for number, inner in fields(data, place, count):
            if number == NAME:
                name = text(data, inner)
            elif number == EXTERNAL:
                key, value = read_entry(data, inner, count)
                entries[key] = value
        if entries:
            yield name, entries
        return
    for number, inner in fields(data, place, count):
        if number in INSIDE[kind]:
            yield from find_external(data, inner, INSIDE[kind][number], count, depth + 1)


def read_entry(data: Bytes, place: Place, count: Count) -> tuple[str, str]:
    """Return the key and the value of an entry."""
    found = {number: inner for number, inner in fields(data, place, count) if number in (KEY, VALUE)}
    key, value = (text(data, found[number]) if number in found else "" for number in (KEY, VALUE))
    return key, value


def text(data: Bytes, place: Place) -> str:
    """Return a text; what is too long for a name is cut."""
    return data[place[0] : min(place[1], place[0] + 1000)].decode("utf-8", "replace")


def fields(data: Bytes, place: Place, count: Count) -> Iterator[tuple[int, Place]]:
    """Yield the number and the bytes [start, end) of every field that has bytes."""
    at, end = place
    while at < end:
        if next(count) >= MOST_FIELDS:
            raise Damaged(f"it has more than {MOST_FIELDS:,} fields")
        tag, at = varint(data, at, end)
        number, form = tag >> 3, tag & 7
        if form == 2:
            size, at = varint(data, at, end)
            if size > end - at:
                raise Damaged(f"a field is longer than the file (byte {at})")
            yield number, (at, at + size)
            at += size
        elif form == 0:
            _, at = varint(data, at, end)
        elif form in (1, 5):
            at += 8 if form == 1 else 4
        else:
            raise Damaged(f"it is no protobuf at byte {at}")
    if at != end:
        raise Damaged(f"a field is longer than the file (byte {at})")


def varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number in base 128, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise Damaged("it ends in the middle of a number")
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise Damaged(f"a number is too long (byte {at})")
