"""From a file that torch.save wrote to safetensors, in a child process that can do nothing else.

It is run as a file by a bare interpreter: the input is its standard input, the output a file that is already open, its
answer one line of JSON. Before it reads a byte it gives up opening files, sockets and processes for good, may write no
more than it was told, and ends itself at any event of Python's audit that is not harmless.

torch >= 1.6   a zip archive, nothing compressed: NAME/data.pkl, NAME/data/<key> for each storage, NAME/byteorder
before         pickles one after another (magic, protocol, system, object, keys), then u64 size and bytes by key
Source: torch 2.13, serialization.py; safetensors, README.md.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lmworks.base.pickle_reader import View

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MEMORY = 512 << 20  # bytes beyond the start
MOST_PICKLE, MOST_TENSORS, MOST_RECORDS = 64 << 20, 200_000, 400_000
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
LETTERS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
HARMLESS = {"builtins.id", "object.__getattr__", "sys._getframe", "sys._getframemodulename"}
Records = dict[str, memoryview]


def limit(seconds: int, most: int) -> None:
    """Give up files, sockets, processes, time and memory for good, and end at whatever else Python tells its audit."""
    import resource

    limits = {"RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": most, "RLIMIT_CPU": seconds}
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        limits["RLIMIT_AS"] = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (value, value))

    def watch(event: str, _: tuple[Any, ...]) -> None:
        if event not in HARMLESS:
            os._exit(77)

    sys.addaudithook(watch)


def read_zip(file: IO[bytes], whole: memoryview) -> tuple[Any, Records]:
    """Return the object of a zip archive, and the bytes of each storage."""
    from lmworks.base.pickle_reader import Damaged, Reader, Refused

    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > MOST_RECORDS or len({entry.filename for entry in entries}) != len(entries):
        raise Damaged("the archive has too many records, or two of one name")
    found = {entry.filename: entry for entry in entries}
    objects = [name for name in found if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(objects) != 1:
        raise Damaged("the archive has no data.pkl: torch.save did not write it")
    place = objects[0].removesuffix("data.pkl")
    if any(name.startswith((f"{place}code/", f"{place}constants.pkl")) for name in found):
        raise Refused("TorchScript, a program")
    order = f"{place}byteorder"
    if order in found and bytes(record(whole, found[order])) != b"little":
        raise Damaged("its numbers are not little-endian")
    if found[objects[0]].file_size > MOST_PICKLE:
        raise Damaged("its data.pkl is too large to be a list of tensors")
    reader = Reader(record(whole, found[objects[0]]))
    made, start = reader.read(), f"{place}data/"
    return made, {name.removeprefix(start): record(whole, e) for name, e in found.items() if name.startswith(start)}


def record(whole: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """Return the bytes of a record of an archive, where its own header says that they are; its sum is checked."""
    from lmworks.base.pickle_reader import Damaged

    at, name = entry.header_offset, entry.filename
    head = bytes(whole[at : at + 30])
    if len(head) < 30 or head[:4] != b"PK\3\4" or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Damaged(f"the record {name[:80]!r} is damaged, compressed or encrypted")
    at += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    size = entry.file_size
    if entry.compress_size != size or at + size > len(whole):
        raise Damaged(f"the record {name[:80]!r} is longer than the file")
    if zlib.crc32(whole[at : at + size]) != entry.CRC:
        raise Damaged(f"the record {name[:80]!r} does not have the sum that the archive says")
    return whole[at : at + size]


def read_legacy(whole: memoryview) -> tuple[Any, Records]:
    """Return the same of a file without an archive, as torch before 1.6 wrote it."""
    from lmworks.base.pickle_reader import Damaged, Reader

    reader = Reader(whole)
    if reader.read() != MAGIC or reader.read() != PROTOCOL:
        raise Damaged("it does not begin as a file of torch.save does")
    system = reader.read()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("its numbers are not little-endian")
    made = reader.read()
    keys, records = reader.read(), {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Damaged("it has no list of storages")
    for key in keys:
        size = int.from_bytes(reader.take(8), "little")
        if key not in reader.storages:
            raise Damaged(f"the storage {key[:80]!r} belongs to no tensor")
        size *= WIDTHS.get(reader.storages[key].dtype, 1)
        if size > len(whole) - reader.at:
            raise Damaged(f"the storage {key[:80]!r} is longer than the file")
        records[key] = whole[reader.at : reader.at + size]
        reader.at += size
    if reader.at != len(whole):
        raise Damaged(f"{len(whole) - reader.at} bytes at its end belong to no tensor")
    return made, records


def views(made: Any) -> Iterator[tuple[str, View]]:
    """Yield the tensors of a state dict."""
    from lmworks.base.pickle_reader import Damaged, View

    if not isinstance(made, dict):
        raise Damaged(f"it holds a {type(made).__name__}, not tensors by name")
    for name, value in made.items():
        if isinstance(value, View):
            if not isinstance(name, str) or not name or len(name) > 1000:
                raise Damaged(f"a tensor has the name {str(name)[:60]!r}")
            yield name, value


def check(name: str, view: View, records: Records) -> None:
    """Raise Damaged unless every number of a tensor lies inside its storage, and the storage in the file."""
    from lmworks.base.pickle_reader import Damaged

    held, width = records.get(view.storage.key), WIDTHS.get(view.dtype, 1)
    if held is None:
        raise Damaged(f"the numbers of {name} are missing")
    if len(held) != view.storage.size * WIDTHS.get(view.storage.dtype, 1):
        raise Damaged(f"the storage of {name} has {len(held)} bytes, not the {view.storage.size} numbers it states")
    last = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
    if prod(view.shape) and (view.offset + last + 1) * width > len(held):
        raise Damaged(f"{name} {list(view.shape)[:8]} reaches beyond its storage")
    if view.dtype == "BOOL" and bytes(held).translate(None, b"\0\1"):
        raise Damaged(f"{name} holds truth values that are neither 0 nor 1")


def pieces(view: View, held: memoryview) -> Iterator[memoryview | bytes]:
    """Yield the bytes of a tensor in its own order, whatever its strides."""
    if not prod(view.shape):
        return
    width = WIDTHS.get(view.dtype, 1)
    numbers = held[: len(held) // width * width].cast("B").cast(LETTERS[width])
    dims = [(n, step) for n, step in zip(view.shape, view.stride, strict=True) if n != 1]
    run = 1  # numbers that lie side by side
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    inner, step = dims.pop() if run == 1 and dims else (1, 1)
    for place in product(*(range(n) for n, _ in dims)):
        start = view.offset + sum(i * s for i, (_, s) in zip(place, dims, strict=True))
        if run > 1 or inner == 1:
            yield numbers[start : start + run]
        elif step == 0:
            yield bytes(numbers[start : start + 1]) * inner
        else:
            yield numbers[start : start + (inner - 1) * step + 1 : step].tobytes()


def convert(file: IO[bytes], whole: memoryview, out: IO[bytes], most: int, again: str) -> dict[str, Any]:
    """Write the tensors of a file, whose bytes are `whole`, to `out`; return what was written and what was left out.

    A tensor whose name `again` matches is left out where it is another one's twin. Raises Damaged and Refused.
    """
    from lmworks.base.pickle_reader import Damaged, View

    if bytes(whole[:4]) == b"PK\3\4":
        made, records = read_zip(file, whole)
    else:
        made, records = read_legacy(whole)
    tensors = dict(views(made))
    for name, view in tensors.items():
        check(name, view, records)
    first: dict[Any, str] = {}
    for name, view in tensors.items():
        if not (again and re.search(again, name)):
            first.setdefault(view, name)
    twins = {name: first[view] for name, view in tensors.items() if first.get(view, name) != name}
    twins = {name: other for name, other in twins.items() if again and re.search(again, name)}
    written = {name: view for name, view in tensors.items() if name not in twins}
    written = dict(sorted(written.items(), key=lambda item: -WIDTHS.get(item[1].dtype, 1)))
    sizes = {name: prod(view.shape) * WIDTHS.get(view.dtype, 1) for name, view in written.items()}
    if not written or len(written) > MOST_TENSORS:
        raise Damaged(f"it holds {len(written)} tensors by name; found: {', '.join(map(str, list(made)[:8]))[:200]}")
    if sum(sizes.values()) > most:
        raise Damaged(f"its tensors would take {sum(sizes.values())} bytes, many times those of the file")
    write(out, written, sizes, records, twins)
    left = [str(name)[:100] for name, value in made.items() if not isinstance(value, View)]
    shown = {name: [view.dtype, list(view.shape)] for name, view in written.items()}
    return {"tensors": shown, "twins": twins, "left_out": left}


def write(
    out: IO[bytes], written: dict[str, View], sizes: dict[str, int], records: Records, twins: dict[str, str]
) -> None:
    """Write a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **twins}}
    end = 0
    for name, view in written.items():
        start, end = end, end + sizes[name]
        header[name] = {"dtype": view.dtype, "shape": list(view.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for view in written.values():
        for piece in pieces(view, records[view.storage.key]):
            out.write(piece)
    out.flush()


def main() -> None:
    """Convert standard input into the open file whose number is the first argument."""
    from lmworks.base.pickle_reader import Damaged, Refused

    handle, seconds, most, again = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    file, out = sys.stdin.buffer, os.fdopen(handle, "wb")
    whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    b"a".decode("cp437")  # zipfile decodes names with it, and soon nothing can be imported
    re.search(again, "")
    limit(seconds, most + (most >> 3) + (1 << 20))
    try:
        answer: dict[str, Any] = convert(file, whole, out, most, again)
    except Damaged as error:
        answer = {"damaged": str(error)}
    except Refused as error:
        answer = {"refused": list(error.args)}
    except MemoryError:
        answer = {"damaged": "it takes too much memory"}
    except Exception as error:  # zipfile's own, among others
        answer = {"damaged": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    main()
