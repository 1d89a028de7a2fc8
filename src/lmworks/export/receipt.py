"""The receipt of a model folder: lmworks.json, written last, with the size and SHA-256 of every other file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lmworks.base.errors import LmworksError
from lmworks.base.files import confine, read_json, sha256, write_json

RECEIPT = "lmworks.json"
FORMAT = 1
# certificate.json is written by every `verify`; run.json and training/ are the state of a run, not what it made
EXCLUDED = (RECEIPT, "certificate.json", "run.json", "training")


def write_receipt(
    folder: str | Path, facts: Mapping[str, Any], *, exclude: Collection[str] = EXCLUDED
) -> dict[str, Any]:
    """Write lmworks.json: `facts` and a manifest of all files, without the files and folders in `exclude`."""
    folder = Path(folder)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in list_files(folder, exclude)
    }
    receipt = {"format": FORMAT, **facts, "excluded": sorted(exclude), "files": files}
    write_json(folder / RECEIPT, receipt)
    return receipt


def recall(folder: Path) -> dict[str, Any]:
    """Return what a model's receipt says of how it was trained to read: its task and settings."""
    path = folder / RECEIPT
    known = read_json(path) if path.is_file() else {}
    return {name: known[name] for name in ("task", "settings") if name in known}


def add_certificate(folder: str | Path, certificate: Mapping[str, Any]) -> None:
    """Write into lmworks.json what `verify` found last: passed, date, and a verdict for each runtime and dtype.

    A receipt that cannot be read stays as it is: the certificate itself says so.
    """
    path = Path(folder) / RECEIPT
    try:
        receipt = read_json(path)
    except LmworksError:
        return
    verdicts = {
        runtime: {
            dtype: "skipped" if "skipped" in cell else "passed" if cell["passed"] else "failed"
            for dtype, cell in row.items()
        }
        for runtime, row in certificate["runtimes"].items()
    }
    found = {"passed": certificate["passed"], "date": certificate["checked"]["date"], "runtimes": verdicts}
    write_json(path, {**receipt, "certificate": found})


def check_receipt(folder: str | Path) -> dict[str, Any]:
    """Compare a folder with its manifest.

    Returns passed, files (how many were checked), changed and missing (names, each a failure), unlisted (names of files
    that the receipt does not know: no failure) and, where the receipt itself cannot be used, problem.
    """
    folder = Path(folder)
    result: dict[str, Any] = {"passed": False, "files": 0, "changed": [], "missing": [], "unlisted": []}
    try:
        receipt = read_json(folder / RECEIPT)
        listed = {str(name): str(entry["sha256"]) for name, entry in receipt["files"].items()}
        excluded = [str(name) for name in receipt.get("excluded", EXCLUDED)]
        paths = {name: confine(folder, name, by=RECEIPT) for name in listed}
    except LmworksError as error:
        return {**result, "problem": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        return {**result, "problem": f"{RECEIPT} holds no manifest of files ({type(error).__name__})"}
    for name, known in listed.items():
        if not paths[name].is_file():
            result["missing"].append(name)
        elif sha256(paths[name]) != known:
            result["changed"].append(name)
    result["files"] = len(listed)
    result["unlisted"] = [name for name in list_files(folder, {*excluded, RECEIPT}) if name not in listed]
    result["passed"] = bool(listed) and not result["changed"] and not result["missing"]
    return result


def list_files(folder: Path, exclude: Collection[str]) -> list[str]:
    """Return the names of all files below `folder`, sorted, without hidden ones and those in `exclude`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    outside = tuple(f"{name}/" for name in exclude)
    return [
        name
        for name in names
        if name not in exclude
        and not name.startswith(outside)
        and not any(part.startswith(".") for part in name.split("/"))
    ]
