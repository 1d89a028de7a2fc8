"""Which folders may take a model's place: those that lie in one folder, are whole, and answer in the same labels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from lmworks.base.errors import InputError
from lmworks.base.files import read_json
from lmworks.evaluation.monitor import Monitor, read_monitor
from lmworks.export.receipt import RECEIPT, check_receipt
from lmworks.serve.engine import Spec
from lmworks.serve.service import describe, labels_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def names(folder: Path) -> list[str]:
    """Return the folders that can be named; none where they cannot be looked at."""
    try:
        return sorted(
            one.name for one in folder.iterdir()
            if NAME.fullmatch(one.name) and not one.is_symlink() and (one / "config.json").is_file()
        )  # fmt: skip
    except OSError:
        return []


def find(folder: Path, name: str) -> Path:
    """Return the folder of this name, which is no path and no link. Raises InputError."""
    path = folder / name
    if not NAME.fullmatch(name) or path.is_symlink() or not path.is_dir():
        raise InputError("there is no such challenger", found=ascii(name)[:120],
                         expected=", ".join(names(folder)) or "a folder among the challengers")  # fmt: skip
    return path


def read_seal(folder: Path) -> str:
    """Return what tells a folder's files from any others. Raises InputError where its receipt does not tell of them.

    Nothing outside of the folder is opened.
    """
    if any(path.is_symlink() for path in folder.rglob("*")):
        raise InputError("a challenger's folder holds no links", found=folder.name)
    receipt = check_receipt(folder)
    if not receipt["passed"]:
        wrong = ", ".join([*receipt["changed"], *receipt["missing"]][:5])
        raise InputError(f"the challenger's files are not those of its {RECEIPT}", found=wrong or "no receipt")
    files = read_json(folder / RECEIPT)["files"]  # the rest of it may change, as `verify` writes there
    return sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def check_again(challengers: Path, name: str, seal: str) -> None:
    """Raise InputError where a folder's files are not those that were checked before."""
    if read_seal(find(challengers, name)) != seal:
        raise InputError("the challenger's files are not those that were checked", found=name,
                         fix="challenge with it again")  # fmt: skip


def check(challengers: Path, name: str, champion: Spec, known: Monitor | None) -> tuple[Spec, Monitor | None, str]:
    """Return what to serve in the place of a champion with such a monitor, and the seal of its files.

    Raises InputError for what cannot be.
    """
    folder = find(challengers, name)
    seal = read_seal(folder)
    settings = {"slots": champion.slots, "threads": champion.threads, "dtype": champion.dtype}
    spec = replace(describe(folder, champion.task, **settings), name=champion.name)
    here, there = set(labels_of(spec)), set(labels_of(champion))
    if here != there:
        raise InputError("the challenger has other labels", found=", ".join(sorted(here - there)[:10]) or "fewer",
                         expected=", ".join(sorted(there)[:10]))  # fmt: skip
    monitor = read_monitor(folder)
    if known is not None and (monitor is None or monitor.facts["task"] != champion.task):
        raise InputError("the challenger does not know its limits, as the champion does", found="no monitor",
                         fix="lmworks monitor fit CHALLENGER DATA")  # fmt: skip
    return spec, monitor, seal
