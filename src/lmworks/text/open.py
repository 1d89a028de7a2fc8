"""Open a text of any length and encoding, packed or not, a file or standard input, and hold little of it at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from encodings.aliases import aliases
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from lmworks.base.errors import InputError, did_you_mean, from_os_error
from lmworks.base.optional import require
from lmworks.text.decode import DAMAGED, attempt, decode, sniff

STDIN = Path("-")
WHOLE = 1 << 24  # bytes: a text up to this is decoded at once; of a longer one little more than a line is held
CHUNK = 1 << 20
SLICE = 1 << 10  # bytes of a .zst file that are unpacked at once: no more than 33 MB
LARGEST_WINDOW = 1 << 31  # bytes: what `zstd --long=31` writes
MARK = "\ufeff"
LONGEST_LINE = 1 << 28  # characters of a row; a longer one is refused rather than held


def unpack_gzip(file: BinaryIO) -> BinaryIO:
    """Return what a .gz file holds."""
    packed = gzip.GzipFile(fileobj=file)
    packed.myfileobj = file  # type: ignore[assignment]  # to be closed with it
    return cast(BinaryIO, packed)


def unpack_zstd(file: BinaryIO) -> BinaryIO:
    """Return what a .zst file holds, all its frames; needs the [data] extra."""
    library = require("zstandard", extra="data")
    return io.BufferedReader(Frames(file, library.ZstdDecompressor(max_window_size=LARGEST_WINDOW)), CHUNK)


class Frames(io.RawIOBase):
    """The frames of a .zst file; one that ends early is an EOFError, which the library's own reader passes over."""

    def __init__(self, file: BinaryIO, unpacker: Any) -> None:
        super().__init__()
        self.file, self.unpacker = file, unpacker
        self.frame: Any = None
        self.packed = self.held = b""

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, and return how many bytes that are."""
        while not self.held:
            self.packed = self.packed or self.file.read(SLICE)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ended before its last frame did")
                return 0
            self.frame = self.frame or self.unpacker.decompressobj()
            self.held, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.held))
        buffer[:size], self.held = self.held[:size], self.held[size:]
        return size

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


PACKED: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": unpack_gzip, ".zst": unpack_zstd}


def plain_ending(path: Path) -> str:
    """Return the ending that says what a file holds: "a.JSONL.zst" -> ".jsonl"."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in PACKED else ending


class Source(io.RawIOBase):
    """`head`, and then what a file holds; its errors are ours, and `tell` hears how many bytes were read of it."""

    def __init__(
        self, file: BinaryIO, name: str, *, head: bytes = b"", tell: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.file, self.label, self.tell_size, self.head = file, name, tell, memoryview(head)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, and return how many bytes that are."""
        size = len(buffer)
        data = self.head[:size] if self.head else memoryview(read_bytes(self.file, size, self.label))
        self.head = self.head[len(data) :]
        buffer[: len(data)] = data
        if self.tell_size is not None:
            self.tell_size(len(data))
        return len(data)

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        if not self.closed and self.file is not getattr(sys.stdin, "buffer", None):
            self.file.close()
        super().close()


def missing(path: Path) -> InputError:
    """Return the error for a path that is not there."""
    if str(path).startswith("--"):
        return InputError(
            f"there is no option {path}", fix=f"--help lists the options; a file of that name is ./{path}"
        )
    if path.is_symlink():
        return InputError(f"{path} is a link to what is not there", found=str(path.readlink()), fix="mend the link")
    known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, known)
    return InputError(f"there is no file or folder {path}", fix=f"check the path;{near}".rstrip(";"))


def is_once(path: Path) -> bool:
    """Say whether a text can be read only once: standard input, or a pipe such as <(command) makes."""
    return path == STDIN or (path.exists() and not path.is_file())


def open_bytes(path: Path, tell: Callable[[int], None] | None = None) -> BinaryIO:
    """Open a file, or standard input where it is called "-", and unpack it; `tell` hears of each piece of it."""
    if path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("no text", fix="name a file or folder, or give the text on standard input: … < texts.txt")
        return cast(BinaryIO, sys.stdin.buffer)
    try:
        file = path.open("rb")
    except OSError as error:
        raise from_os_error(error, "this file cannot be read") from None
    metered = io.BufferedReader(Source(file, str(path), tell=tell), CHUNK)
    unpack = PACKED.get(path.suffix.lower())
    return cast(BinaryIO, metered) if unpack is None else unpack(cast(BinaryIO, metered))


def read_bytes(file: BinaryIO, size: int, name: str) -> bytes:
    """Read up to `size` bytes (-1: all); what cannot be read or unpacked is an InputError."""
    parts: list[bytes] = []
    try:
        while size and (part := file.read(min(size, CHUNK) if size > 0 else CHUNK)):  # unpackers may give less
            parts.append(part)
            size -= len(part) if size > 0 else 0
    except (OSError, EOFError, zlib.error) as error:  # a bad .gz file is an OSError
        raise broken(error, name) from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise broken(error, name) from None
    return b"".join(parts)


def broken(error: Exception, name: str) -> InputError:
    """Return the error for a file that ends early, or is not packed as its name says."""
    return InputError("this file cannot be read", where=name, found=str(error)[:200], fix="fetch it again")


def open_text(
    path: Path, *, encoding: str | None = None, tell: Callable[[int], None] | None = None
) -> tuple[TextIO, str]:
    r"""Return the text, to be read in lines that end in \n and nothing else, and its encoding, told by the bytes.

    A long file is read twice, first for its encoding; of a long standard input or pipe the first 16 MB tell.
    """
    if encoding is not None:
        check_encoding(encoding)
    name = "standard input" if path == STDIN else str(path)
    file = open_bytes(path)
    head = read_bytes(file, WHOLE + 1, name)
    if len(head) <= WHOLE:
        if path != STDIN:
            file.close()
        text, encoding = decode(head, name, encoding)
        if tell is not None:
            tell(len(head) if path == STDIN else path.stat().st_size)
        return io.StringIO(text, newline="\n"), encoding
    told = None if encoding is None else (encoding, mark_size(head, encoding))
    if is_once(path):
        encoding, mark = told or sniff(iter([head]), name)
        source = Source(file, name, head=head, tell=tell)
    else:
        with file:
            rest = iter(lambda: read_bytes(file, CHUNK, name), b"")
            encoding, mark = told or sniff(chain([head], rest), name)
        source = Source(open_bytes(path, tell), name)
    stream = io.BufferedReader(source, CHUNK)
    stream.read(mark)
    codec, errors = ("utf-8", DAMAGED) if encoding == DAMAGED else (encoding, "strict")
    return io.TextIOWrapper(stream, encoding=codec, errors=errors, newline="\n"), encoding


def mark_size(head: bytes, encoding: str) -> int:
    """Return the bytes of a byte order mark that an encoding takes for a character."""
    return len(MARK.encode(encoding)) if (attempt(head[:4], encoding) or "").startswith(MARK) else 0


def check_encoding(name: str) -> None:
    """Raise InputError for an encoding that Python does not have."""
    try:
        known = codecs.lookup(name)._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise InputError(
            f'there is no encoding "{name}"',
            expected="a name such as utf-8, latin-1, cp1252, cp1251, shift_jis, gb18030",
            fix=did_you_mean(name.lower(), aliases.values()).strip(),
        )


def read_lines(stream: TextIO, where: str) -> Iterator[str]:
    r"""Yield lines with their \n; one that would not fit into memory is an InputError."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise InputError(
                "a line is too long",
                where=f"{where}, line {number}",
                found=f"more than {LONGEST_LINE:,} characters",
                fix="cut it into rows, or give it as plain text (.txt)",
            )
        yield line
