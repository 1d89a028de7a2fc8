"""Power loss at any moment of a save: what was not flushed is gone, and the last good checkpoint still loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_state import tiny

from lmworks.training.state import load_checkpoint

CALLS = ("open", "mkdir", "write", "pwrite", "fsync", "rename", "truncate", "close")


class Disk:
    """What survives a power loss, at its worst: data that were flushed, and names in folders that were flushed.

    `eager` is the other extreme: every rename and every new name survives at once, but data only if flushed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}  # by file number: written
        self.flushed: dict[int, bytes] = {}
        self.names: dict[str, dict[str, int | str]] = {"": {}}  # by folder: name -> file number, or folder key
        self.durable: dict[str, dict[str, int | str]] = {"": {}}
        self.handles: dict[int, int | str] = {}
        self.keys = 0

    def folder(self, path: Path) -> str:
        key = ""
        for part in path.relative_to(self.root).parts:
            key = str(self.names[key][part])
        return key

    def materialise(self, target: Path, *, eager: bool) -> None:
        """Write what a crash now would leave into `target`."""
        tree = self.names if eager else self.durable

        def put(key: str, place: Path) -> None:
            place.mkdir(parents=True, exist_ok=True)
            for name, entry in tree.get(key, {}).items():
                if isinstance(entry, str):
                    put(entry, place / name)
                else:
                    (place / name).write_bytes(self.flushed.get(entry, b""))

        put("", target)


@contextmanager
def recording(disk: Disk, after: Callable[[], None]) -> Iterator[None]:
    """Follow every call that changes the disk, and call `after` behind each."""
    originals = {name: getattr(os, name) for name in CALLS}
    rmtree = shutil.rmtree

    def inside(path: Any) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(disk.root)

    def open_(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        handle: int = originals["open"](path, flags, *rest, **options)
        if inside(path) and "dir_fd" not in options:
            path = Path(path)
            if path.is_dir():
                disk.handles[handle] = disk.folder(path)
            else:
                entries = disk.names[disk.folder(path.parent)]
                if path.name not in entries:
                    disk.keys += 1
                    entries[path.name] = disk.keys
                    disk.content[disk.keys] = b""
                disk.handles[handle] = entries[path.name]
                after()
        return handle

    def mkdir(path: Any, *rest: Any, **options: Any) -> None:
        originals["mkdir"](path, *rest, **options)
        if inside(path):
            disk.keys += 1
            disk.names[disk.folder(Path(path).parent)][Path(path).name] = f"d{disk.keys}"
            disk.names[f"d{disk.keys}"] = {}
            after()

    def write(handle: int, data: Any) -> int:
        count: int = originals["write"](handle, data)
        if handle in disk.handles:
            disk.content[disk.handles[handle]] += bytes(data)[:count]  # type: ignore[index]
            after()
        return count

    def pwrite(handle: int, data: Any, position: int) -> int:
        count: int = originals["pwrite"](handle, data, position)
        key = disk.handles[handle]
        disk.content[key] = disk.content[key][:position] + bytes(data)[:count]  # type: ignore[index]
        after()
        return count

    def fsync(handle: int) -> None:
        originals["fsync"](handle)
        key = disk.handles[handle]
        if isinstance(key, str):
            disk.durable[key] = dict(disk.names[key])
        else:
            disk.flushed[key] = disk.content[key]
        after()

    def rename(a: Any, b: Any, **options: Any) -> None:
        originals["rename"](a, b, **options)
        a, b = Path(a), Path(b)
        disk.names[disk.folder(b.parent)][b.name] = disk.names[disk.folder(a.parent)].pop(a.name)
        after()

    def remove(path: Any, *rest: Any, **options: Any) -> None:
        there = Path(path).exists()
        rmtree(path, *rest, **options)
        if there:
            disk.names[disk.folder(Path(path).parent)].pop(Path(path).name)
            after()

    def truncate(handle: Any, length: int) -> None:
        originals["truncate"](handle, length)
        key = disk.handles[handle]
        disk.content[key] = disk.content[key][:length]  # type: ignore[index]

    def close(handle: int) -> None:
        disk.handles.pop(handle, None)
        originals["close"](handle)

    functions = (open_, mkdir, write, pwrite, fsync, rename, truncate, close)
    ours = dict(zip(CALLS, functions, strict=True))
    for name, function in ours.items():
        setattr(os, name, function)
    shutil.rmtree = remove  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        shutil.rmtree = rmtree


@pytest.mark.parametrize("eager", [False, True], ids=["names are lost too", "names survive at once"])
def test_after_a_power_loss_the_last_good_checkpoint_loads(tmp_path: Path, eager: bool) -> None:
    """Files and folders are flushed in an order that never leaves a checkpoint that is named but not whole."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root)
    crashes = tmp_path / "crashes"
    steps: list[int] = []

    def crash() -> None:
        with paused():
            disk.materialise(crashes, eager=eager)
            found = load_checkpoint(crashes)  # raises if one is there and none is whole
            steps.append(found[1].step if found else -1)
            if found and found[1].metrics_bytes:
                assert (crashes / "metrics.jsonl").stat().st_size >= found[1].metrics_bytes
            shutil.rmtree(crashes)

    @contextmanager
    def paused() -> Iterator[None]:
        now = {name: getattr(os, name) for name in CALLS}, shutil.rmtree
        for name, original in real.items():
            setattr(os, name, original)
        shutil.rmtree = real_rmtree
        try:
            yield
        finally:
            for name, ours in now[0].items():
                setattr(os, name, ours)
            shutil.rmtree = now[1]

    real, real_rmtree = {name: getattr(os, name) for name in CALLS}, shutil.rmtree
    trainer = tiny(root)
    with recording(disk, crash):
        trainer.fit()
    assert len(steps) > 100
    assert steps == sorted(steps)  # no crash ever goes back behind what was reached
    assert set(steps) == {-1, 0, 2, 4}
