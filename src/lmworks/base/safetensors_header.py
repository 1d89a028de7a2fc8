"""Check the header of a safetensors file before anything is allocated for it.

A file is `u64 n` (little-endian), n bytes of JSON, then the data. The JSON maps each tensor's name to its dtype, shape
and data_offsets [start, end), counted from the beginning of the data; `__metadata__` maps strings to strings. Every
number is compared with the size of the file, in Python's unbounded integers, so a header can promise nothing that is
not there.
Source: the format's own description (safetensors, README.md).
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from lmworks.base.errors import FormatError
from lmworks.base.files import own_file

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_TENSORS = 200_000  # a valid header of 900,000 empty tensors takes its usual reader seconds and a gigabyte
LONGEST_NAME = 1000  # letters
MAX_SIZE = 2**64 - 1  # other readers count in 64 bits
METADATA = "__metadata__"
FETCH = "fetch it again"
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class TensorInfo(NamedTuple):
    """One tensor: its dtype as the file spells it, its shape, and its bytes [start, end) within the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


def check_header(path: str | Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, in the order of its bytes, having read only its header.

    Raises FormatError, which names the file and the tensor, for anything that the format does not allow, for a file
    that is shorter or longer than its header says, and for more than 200,000 tensors.
    """
    path = own_file(path)
    raw, data_size = read_header(path)
    try:
        header = json.loads(
            raw,
            object_pairs_hook=unique,
            parse_int=natural,
            parse_float=no_number,
            parse_constant=no_number,
        )
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise refuse(path, "its header is not valid JSON", found=shorten(error)) from None
    if not isinstance(header, dict):
        raise refuse(path, "its header is not a JSON object", found=type(header).__name__)
    check_metadata(path, header.pop(METADATA, {}))
    tensors = {name: read_info(path, name, value) for name, value in header.items()}
    return check_places(path, tensors, data_size)


def read_header(path: Path) -> tuple[bytes, int]:
    """Return the header's bytes and the number of bytes after it, having compared its length with the file's."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would block
            raise refuse(path, "it is not a file", fix="")
        with path.open("rb") as file:
            length, rest = int.from_bytes(file.read(8), "little"), facts.st_size - 8
            if rest < 2 or length > rest:
                raise refuse(
                    path,
                    "the file ends before its header does",
                    found=f"{facts.st_size} bytes",
                    expected=f"at least {length + 8 if rest >= 0 else 10} bytes",
                )
            if length > MAX_HEADER:
                raise refuse(path, "its header is too long", found=f"{length} bytes", expected=f"up to {MAX_HEADER}")
            raw = file.read(length)
    except FileNotFoundError:
        raise FormatError(f"{path.name} is missing", where=str(path.parent), fix="fetch the whole checkpoint") from None
    except OSError as error:
        raise refuse(path, "it cannot be read", found=error.strerror or str(error), fix="") from None
    if not raw.startswith(b"{"):
        raise refuse(path, "its header does not start with {", found=repr(raw[:12]))
    # counted before parsing: each tensor needs a brace, and no honest one needs forty commas
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b",") > 40 * MAX_TENSORS:
        raise refuse(path, "its header lists too many tensors", expected=f"up to {MAX_TENSORS}", fix="")
    return raw, rest - length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dict; raise ValueError for a name that comes twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{shorten(names.most_common(1)[0][0])!r} comes twice")
    return made


def natural(digits: str) -> int:
    """Read a JSON integer of at most 64 bits; raise ValueError for others."""
    if digits.startswith("-") or len(digits) > 20 or int(digits) > MAX_SIZE:
        raise ValueError(f"{digits[:24]} is not a size")
    return int(digits)


def no_number(text: str) -> float:
    """Refuse 1.5, 1e3, NaN and Infinity: a header holds none."""
    raise ValueError(f"{text[:24]} is not a size")


def check_metadata(path: Path, metadata: object) -> None:
    """Raise FormatError unless `__metadata__` maps strings to strings."""
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and is_text(key) and is_text(value) for key, value in metadata.items()
    ):
        raise refuse(path, f"its {METADATA} is not an object of strings")


def read_info(path: Path, name: str, value: object) -> TensorInfo:
    """Read one tensor's entry; raise FormatError where its parts are of the wrong kind or do not agree."""
    if not is_text(name) or len(name) > LONGEST_NAME:
        raise refuse(path, "a tensor's name is not valid text", found=ascii(name)[:100])
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse(path, f"the entry of {name} is not a dtype, a shape and data_offsets", found=shorten(value))
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(path, f"{name} has an unknown dtype", found=shorten(dtype), expected=", ".join(BITS))
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise refuse(path, f"{name} has {key} that are not a list of sizes", found=shorten(numbers))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(path, f"{name} has data_offsets that are not [start, end]", found=shorten(offsets))
    bits = 1
    for size in (*shape, BITS[dtype]):
        bits *= size
        if bits > MAX_SIZE:
            raise refuse(path, f"{name} has a shape too large for any file", found=shorten(shape))
    start, end = offsets
    if bits != 8 * (end - start):
        raise refuse(
            path,
            f"the shape of {name} does not fit its place",
            found=f"{end - start} bytes",
            expected=f"{dtype} {shorten(shape)}: {bits / 8:g} bytes",
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def check_places(path: Path, tensors: Mapping[str, TensorInfo], data_size: int) -> dict[str, TensorInfo]:
    """Return the tensors by place; raise FormatError unless they fill the data without holes or overlap."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    reached, before = 0, "the header"
    for name, info in ordered.items():
        if info.start != reached:
            what = "overlaps" if info.start < reached else "leaves a hole after"
            raise refuse(path, f"{name} {what} {before}", found=f"byte {info.start}", expected=f"byte {reached}")
        reached, before = info.end, name
    if data_size < reached:
        cut = next(name for name, info in ordered.items() if info.end > data_size)
        raise refuse(path, f"{reached - data_size} bytes are missing at its end, from {cut} on")
    if data_size > reached:
        raise refuse(path, f"{data_size - reached} bytes at its end belong to no tensor")
    return ordered


def refuse(path: Path, what: str, *, found: str = "", expected: str = "", fix: str = FETCH) -> FormatError:
    """Return the error for a file that does not hold what it should."""
    return FormatError(f"{path.name} cannot be used: {what}", where=str(path), found=found, expected=expected, fix=fix)


def is_text(text: str) -> bool:
    """Say whether other programs can read this string: JSON may escape half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shorten(value: object) -> str:
    """Return a value as text of at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
