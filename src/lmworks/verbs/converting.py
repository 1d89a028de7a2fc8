"""`lmworks convert`: a folder whose weights are pickles becomes one with safetensors, and no code of it is run.

Each .bin is read by a child process (base/torch_file.py) that can open nothing and write nothing but its output. What a
pickle names beside tensors is refused, by name; what else the folder holds comes along, but for pickles and code.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmworks
from lmworks import __version__
from lmworks.base import torch_file
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.files import check_output, new_folder, own_file, read_json, sha256, write_json
from lmworks.base.hub import find_convertible
from lmworks.base.report import Report, Table, counted
from lmworks.base.safetensors_header import check_header
from lmworks.export.receipt import RECEIPT, write_receipt
from lmworks.models.families import asks_for_code, read_config
from lmworks.models.parameters import TIED_HEAD

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_BIN, ADAPTER = "adapter_model.bin", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack", ".ot")
CODE = (".py", ".pyc", ".so", ".sh")
GROWTH, ROOM = 4, 64 << 20  # how many times a file its tensors may be: views of one storage are written out
SPEED = 10 << 20  # bytes a second: a tenth of what a slow machine does
KEY = "auto_map"


def convert(model: str | Path, out: str | Path, *, revision: str | None = None, overwrite: bool = False) -> Report:
    """Write a copy of a folder, or of a model on the Hub, with its `.bin` weights as safetensors; whole or absent.

    Raises InputError where there is nothing to convert, FormatError where a file is damaged, names anything but tensors
    (each name is listed), or does not fit its index.
    """
    folder, out = find_convertible(model, revision=revision), Path(out)
    plan = find_bins(folder)
    inside = (folder.resolve(), *folder.resolve().parents)
    if out.resolve() in inside or folder.resolve() in out.resolve().parents:
        raise InputError("the output would lie in what is converted", where=str(out), fix="choose another -o")
    need = sum(own_file(folder / name).stat().st_size for name in plan if (folder / name).is_file())
    check_output(out, overwrite=overwrite, need_bytes=need + ROOM)
    again = TIED_HEAD.pattern if is_tied(folder) else ""
    found: dict[str, dict[str, Any]] = {}
    with new_folder(out) as staged:
        for name, target in plan.items():
            (staged / target).parent.mkdir(parents=True, exist_ok=True)
            found[name] = convert_file(folder / name, staged / target, again)
        write_index(folder, staged, plan, found)
        carried, behind = carry(folder, staged, plan)
        values = summarise(folder, out, plan, found, behind)
        write_receipt(staged, {"made_by": f"lmworks {__version__}", "convert": values})
    return describe(values, carried)


def find_bins(folder: Path) -> dict[str, str]:
    """Return the pickles of a folder that hold weights, and the name of what each becomes."""
    if (folder / SAFE).exists() or (folder / SAFE_INDEX).exists():
        raise InputError("this folder has safetensors already", where=str(folder), fix="use it as it is")
    plan = {ADAPTER_BIN: ADAPTER} if (folder / ADAPTER_BIN).exists() else {}
    if (folder / BIN).exists():
        plan[BIN] = SAFE
    elif (folder / BIN_INDEX).exists():
        names = sorted(set(read_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FormatError(
                f"{missing[0]} is missing",
                where=str(folder),
                expected=f"the shards that {BIN_INDEX} names",
                fix="fetch the whole checkpoint",
            )
        plan |= {name: name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors" for name in names}
    for path in sorted(folder.glob(f"*/{BIN}")):  # modules of sentence-transformers
        if not path.parent.is_symlink():
            plan[f"{path.parent.name}/{BIN}"] = f"{path.parent.name}/{SAFE}"
    if not plan:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise InputError(
            "there are no weights to convert", where=str(folder), found=", ".join(others) or "no .bin",
            expected=f"{BIN}, {BIN_INDEX} or {ADAPTER_BIN}", fix=f"rename the weights to {BIN}" if others else "",
        )  # fmt: skip
    return plan


def read_map(folder: Path) -> dict[str, str]:
    """Return the shard of each tensor; raise FormatError for an index that names other places."""
    path = folder / BIN_INDEX
    names = read_json(path).get("weight_map")
    whole = isinstance(names, dict) and names and all(isinstance(name, str) for name in names.values())
    if not whole or not isinstance(names, dict):
        raise FormatError("the index holds no file names", where=str(path), expected="a weight_map")
    outside = sorted(n for n in set(names.values()) if Path(n).name != n or "\\" in n or not n.endswith(".bin"))
    if outside:
        raise FormatError(f"{BIN_INDEX}: weight_map points elsewhere", where=str(path), found=", ".join(outside)[:300],
                          expected="names of .bin files beside the index")  # fmt: skip
    return names


def is_tied(folder: Path) -> bool:
    """Say whether the model that config.json describes ties its projection to its embedding; no for unknown ones."""
    try:
        return read_config(folder).tie_word_embeddings
    except LmworksError:
        return False


def convert_file(source: Path, target: Path, again: str = "") -> dict[str, Any]:
    """Convert one file in a child process; return what it wrote. `again` matches names of twins that may go."""
    source = own_file(source)
    if not source.is_file():  # a pipe would block
        raise FormatError(f"{source.name} is not a file", where=str(source))
    size = source.stat().st_size
    seconds, most = 4 + size // SPEED, GROWTH * size + ROOM
    root = str(Path(str(lmworks.__file__)).parents[1])
    answer = b""
    with source.open("rb") as file, target.open("wb") as made:
        limits = [root, *map(str, (made.fileno(), seconds, most)), again]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(torch_file.__file__)), *limits],
            stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=(made.fileno(),), env={},
            cwd=Path(sys.executable).anchor,
        )  # fmt: skip
        try:
            answer, _ = child.communicate(timeout=2 * seconds + 30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            child.kill()
            child.communicate()
    try:
        said = json.loads(answer)
    except ValueError:
        raise FormatError(
            f"the process that reads {source.name} was stopped", where=str(source),
            found=f"exit code {child.returncode}", expected=f"at most {seconds} s and {most >> 20} MB",
            fix="fetch it again",
        ) from None  # fmt: skip
    if "refused" in said:
        raise FormatError(
            f"{source.name} names what no tensor needs, and nothing of it was run", where=str(source),
            found=", ".join(said["refused"]), expected="tensors by name, and nothing else",
            fix="do not open this file with torch.load; if you trust its maker, ask for safetensors",
        )  # fmt: skip
    if "damaged" in said:
        raise FormatError(f"{source.name} cannot be converted: {said['damaged']}", where=str(source),
                          fix="fetch it again")  # fmt: skip
    written = {name: [info.dtype, list(info.shape)] for name, info in check_header(target).items()}
    if written != said["tensors"]:
        raise FormatError(f"{source.name} was not converted whole", where=str(source))
    return dict(said)


def write_index(folder: Path, staged: Path, plan: Mapping[str, str], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of the shards; raise FormatError unless they hold what the old one says."""
    if (folder / BIN).exists() or not (folder / BIN_INDEX).exists():
        return
    stated = read_map(folder)
    held = {key: name for name in set(stated.values()) for key in (*found[name]["tensors"], *found[name]["twins"])}
    wrong = [key for key in {*stated, *held} if stated.get(key) != held.get(key)]
    if wrong:
        raise FormatError("the shards do not hold what their index says", where=str(folder / BIN_INDEX),
                          found=", ".join(sorted(map(str, wrong))[:8])[:300], fix="fetch it again")  # fmt: skip
    places = {key: plan[name] for name in sorted(set(stated.values())) for key in found[name]["tensors"]}
    total = sum(info.end - info.start for name in set(places.values()) for info in check_header(staged / name).values())
    write_json(staged / SAFE_INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def carry(folder: Path, staged: Path, plan: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Copy what else is in the folder, but for code and what asks for it; return the names of both kinds."""
    carried, behind = [], []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.parent.is_symlink() or name in (*plan, BIN_INDEX, RECEIPT):
            continue
        if path.suffix.lower() in (*PICKLES, *CODE) or any(part.startswith(".") for part in name.split("/")):
            behind.append(name)
            continue
        (staged / name).parent.mkdir(exist_ok=True)
        known = read_json(own_file(path)) if path.name.endswith("config.json") else {}
        if any(map(asks_for_code, known)):
            write_json(staged / name, {key: value for key, value in known.items() if not asks_for_code(key)})
        else:
            shutil.copyfile(own_file(path), staged / name)
        carried.append(name)
    return carried, behind


def summarise(
    folder: Path, out: Path, plan: Mapping[str, str], found: Mapping[str, Mapping[str, Any]], behind: Sequence[str]
) -> dict[str, Any]:
    """Return what was done, for the receipt and the report."""
    files = {
        name: {
            "to": target, "sha256": sha256(folder / name), "tensors": len(found[name]["tensors"]),
            "twins": found[name]["twins"], "left_out": found[name]["left_out"],
        }
        for name, target in plan.items()
    }  # fmt: skip
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    code = config.get(KEY) if isinstance(config.get(KEY), dict) else {}
    return {"model": str(folder), "out": str(out), "files": files, "behind": list(behind), "code": code or {}}


def describe(values: Mapping[str, Any], carried: Sequence[str]) -> Report:
    """Return the report."""
    rows = tuple((name, done["to"], done["tensors"]) for name, done in values["files"].items())
    notes = [f"{counted(len(carried), 'other file')} came along."] if carried else []
    for name, done in values["files"].items():
        if done["twins"]:
            pairs = ", ".join(f"{twin} is {other}" for twin, other in done["twins"].items())
            notes.append(f"Tied weights are stored once: {pairs}.")
        if done["left_out"]:
            notes.append(f"{name} also held, left out: {', '.join(done['left_out'])[:300]}.")
    if values["behind"]:
        notes.append(f"Stayed behind, as pickles or code: {', '.join(values['behind'])}.")
    if values["code"]:
        notes.append(f"config.json names code of its maker's own ({KEY}); it was not run, and lmworks never runs it.")
    title = f"{values['out']}: {counted(sum(row[2] for row in rows), 'tensor')} as safetensors, no code was run"
    return Report(title, dict(values), tables=(Table("Converted", ("from", "to", "tensors"), rows),),
                  notes=tuple(notes))  # fmt: skip
