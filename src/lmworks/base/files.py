"""Files that are either whole or absent: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError

LONGEST_NAME = 255  # bytes of a file's name
MOST_BYTES = 256 << 20  # of a file that is read whole
STAGED = ".staged"  # suffix of a file that is being written


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically: a reader, or a crash, sees the old file or the new one, nothing between."""
    path = Path(path)
    staged = path.with_name(f".{path.name}{STAGED}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)  # noqa: PTH105 (the one place that renames; faults are injected here by name)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a name to write to beside `path`; it takes its place when the block succeeds and vanishes when it fails."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}{STAGED}")
    try:
        yield staged
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)  # noqa: PTH105
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a FormatError that names the file and the line."""
    path = Path(path)
    value = read_value(path)
    if not isinstance(value, dict):
        raise FormatError(
            f"{path.name} does not hold a JSON object", where=str(path), found=type(value).__name__, expected="object"
        )
    return value


def read_value(path: Path) -> Any:
    """Read a JSON file of a model's folder; raise FormatError where it is none."""
    try:
        text = read_own(path).decode("utf-8-sig")
        value = json.loads(text)
        if "\\u" in text:  # JSON may escape half of a character, which no file can hold
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise FormatError(f"{path.name} is not UTF-8", where=str(path), found=str(error)[:200]) from None
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        raise FormatError(f"{path.name} is not valid JSON", where=str(path), found=str(error)[:200]) from None
    return value


def read_own(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a model's small file; raise FormatError for what is no file of its folder, or too large."""
    path = own_file(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would block
            raise FormatError(f"{path.name} is not a file", where=str(path))
        if facts.st_size > most:
            raise FormatError(f"{path.name} is too large", where=str(path), found=f"{facts.st_size} bytes",
                              expected=f"at most {most}")  # fmt: skip
        return path.read_bytes()
    except FileNotFoundError:
        raise FormatError(f"{path.name} is missing", where=str(path.parent)) from None
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read", where=str(path), found=error.strerror or str(error)) from None


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def confine(root: str | Path, name: str, *, by: str = "") -> Path:
    """Return `root/name` if it stays inside `root` after links are followed; else raise FormatError.

    `by` is the file that names it.
    """
    base = Path(root).resolve()
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a NUL
        path = Path(os.sep)
    too_long = any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(name).parts)
    if Path(name).is_absolute() or not path.is_relative_to(base) or too_long:
        raise FormatError(
            "a file name points outside its folder", where=str(Path(root) / by), found=ascii(name)[:200],
            expected="a name inside the folder",
        )  # fmt: skip
    return path


def own_file(path: str | Path) -> Path:
    """Return the path of a model's file unless it is a link that leads out of its folder; else raise FormatError.

    A stranger's folder could show us, and what we write, any file of this machine. The Hub's cache is made of links
    from `snapshots` into the `blobs` beside it.
    """
    path = Path(path)
    if not path.is_symlink():
        return path
    try:
        real, place = path.resolve(), path.absolute()
    except (OSError, RuntimeError):
        raise FormatError(f"{path.name} is a link to itself", where=str(path)) from None
    stores = [parent.parent.resolve() for parent in real.parents if parent.name == "blobs"]
    above = {parent.resolve() for parent in place.parents}
    cached = "snapshots" in place.parts and any(store in above for store in stores)
    if not (cached or real.is_relative_to(path.parent.resolve())):
        raise FormatError(
            f"{path.name} is a link that leads out of its folder", where=str(path), found=str(real),
            expected="a file in the folder", fix="if you trust it, put the file itself in its place",
        )  # fmt: skip
    return path


def sha256(path: str | Path) -> str:
    """Return the file's SHA-256 as hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk that would hold `path` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_output(path: str | Path, *, overwrite: bool = False, resume: bool = False, need_bytes: int = 0) -> Path:
    """Refuse an output folder that cannot be made, holds something else, or will not fit; make nothing."""
    out = Path(path)
    parent = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir():
        raise InputError(
            f"cannot write to {out}", where=str(parent), found="a file", expected="a folder", fix="choose another -o"
        )
    if not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {out}", where=str(parent), found="no permission", fix="choose another -o")
    if out.exists():
        if not out.is_dir():
            raise InputError(f"cannot write to {out}", found="a file", expected="a folder", fix="choose another -o")
        held = any(out.iterdir())
        if held and not (out / "lmworks.json").exists():
            raise InputError(
                f"{out} holds files that lmworks did not write",
                fix="choose another -o, or empty the folder yourself",
            )
        unfinished = out.absolute().with_name(f"{out.absolute().name}.partial").exists()
        if held and resume and not (overwrite or unfinished):
            raise InputError(
                f"the run in {out} is complete: there is nothing to resume",
                fix="add --overwrite to start again, or choose another -o",
            )
        if held and not overwrite:
            raise InputError(f"{out} already holds a model", fix="add --overwrite to replace it, or choose another -o")
    free = free_bytes(out.absolute())
    if free < need_bytes:
        raise InputError(
            f"not enough disk space for {out}",
            found=f"{free / 1e6:.0f} MB free",
            expected=f"about {need_bytes / 1e6:.0f} MB",
            fix="free some space, choose a smaller --size, or write to another disk with -o",
        )
    return out


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a staging folder beside `path` that takes its place when the block succeeds and vanishes when it fails."""
    out = Path(path).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f"{out.name}{STAGED}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        put_in_place(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` for what is made on the way to it; what a killed run left goes first."""
    out = Path(path).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out.with_name(f"{out.name}.try{STAGED}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def put_in_place(staged: Path, out: Path) -> None:
    """Flush the finished folder `staged` and rename it to `out`, replacing what is there."""
    sync_tree(staged)
    old = out.with_name(f"{out.name}.old{STAGED}")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
