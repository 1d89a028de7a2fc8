"""Exact resume: checkpoints that are whole or absent, in the run folder.

    metrics.jsonl             one line a step; a checkpoint knows how many of its bytes belong to it
    last.<step>/              model.safetensors (what is trained) · optimizer.safetensors · state.json · manifest.json
    best.<step>/              model.safetensors · manifest.json: the weights with the lowest validation loss

A checkpoint is written under a hidden name, every file is flushed to the disk, the manifest of SHA-256 sums comes
last, and one rename makes it visible. Reading verifies every sum and falls back to the checkpoint before. Nothing is a
pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lmworks.base.errors import FormatError, InputError, TrainingError
from lmworks.base.files import STAGED, free_bytes, read_json, sha256, sync_folder
from lmworks.training.optim import load_optimizer, optimizer_tensors
from lmworks.training.stored import frozen_sum, saved_tensors, tensor_bytes

LAST, BEST = "last", "best"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
COPIES = 4  # of the weights: two checkpoints, two sets of best weights
KEPT = 2  # checkpoints that hold the optimizer's moments
SMALL_FILES = 10_000_000  # bytes: the log, the states


@dataclass(kw_only=True)
class State:
    """Where a run stands, apart from its tensors."""

    step: int = 0  # optimizer steps done; also the data cursor and the seed of dropout
    tokens: int = 0  # scored tokens so far
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None  # of the best weights
    best_score: float = 0.0  # what they were chosen by: the higher, the better
    waited: int = 0  # validations since the last one that counts as better
    mark: float | None = None  # the score of that one
    stopped: str = ""  # why a callback ended the run
    skipped: int = 0  # steps without an update, because fp16 overflowed
    loss_scale: float = 1.0  # by which the loss is multiplied before fp16 gradients are taken
    good_steps: int = 0  # since that last changed
    metrics_bytes: int = 0  # how much of metrics.jsonl belongs to this state
    dtype: str = "fp32"
    compiled: bool = False
    threads: int = 1
    ranks: int = 1  # processes that trained last
    shares: list[float] = field(default_factory=list)  # of a batch's rows, one for each part in which it is computed
    paced: int = 0  # processes by whose speed the shares were chosen
    torch: str = field(default_factory=lambda: str(torch.__version__))
    data: str = ""  # fingerprint of the data source
    frozen: str = ""  # SHA-256 of the weights that are not trained, which no checkpoint holds
    config: dict[str, Any] = field(default_factory=dict)

    def judge(self, score: float, loss: float, *, min_delta: float = 0.0) -> bool:
        """Note a validation; tell whether its weights are the best. Of equal scores the lower loss is better."""
        best = self.best_loss is None or (score, -loss) > (self.best_score, -self.best_loss)
        if best:
            self.best_step, self.best_loss, self.best_score = self.step, loss, score
        self.waited += 1
        if best and (self.mark is None or score >= self.mark + min_delta):
            self.mark, self.waited = score, 0
        return best


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> Path:
    """Write `last.<step>`; keep the checkpoint before it and the best weights that either of them names."""
    prune(folder, keep=newest(folder, 1), best={state.best_step})
    write_folder(
        folder / f"{LAST}.{state.step}",
        {
            MODEL: tensor_bytes(saved_tensors(model)),
            OPTIMIZER: tensor_bytes(optimizer_tensors(model, optimizer)),
            STATE: [json.dumps(asdict(state), indent=2, allow_nan=False).encode()],
        },
    )
    prune(folder, keep=newest(folder, 2))
    return folder / f"{LAST}.{state.step}"


def save_best(folder: Path, model: nn.Module, *, step: int) -> None:
    """Write `best.<step>`; the next `save_checkpoint` removes what it replaces."""
    prune(folder, keep=newest(folder, 1))
    write_folder(folder / f"{BEST}.{step}", {MODEL: tensor_bytes(saved_tensors(model))})


def load_checkpoint(folder: Path) -> tuple[Path, State] | None:
    """Return the newest checkpoint whose every byte is as it was written, or None where there is none at all.

    Raises FormatError, naming what is wrong with each, where there are checkpoints but none is whole.
    """
    problems = []
    for path in newest(folder):
        try:
            verify(path, {MODEL, OPTIMIZER, STATE})
            state = read_state(path)
            if state.best_step is not None:
                verify(folder / f"{BEST}.{state.best_step}", {MODEL})
            return path, state
        except FormatError as error:
            problems.append(f"{path.name}: {error.what}")
    if problems:
        raise FormatError(
            "no checkpoint of this run is whole",
            where=str(folder),
            found="; ".join(problems),
            fix="remove the folder and start again",
        )
    return None


def load_into(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, step: int = 0) -> None:
    """Put a checkpoint's weights, and the optimizer's moments after `step` updates, into these objects."""
    saved = load_file(path / MODEL)
    expected = saved_tensors(model)
    wrong = sorted(
        {*saved, *expected} - {name for name in saved if name in expected and saved[name].shape == expected[name].shape}
    )
    if wrong:
        raise FormatError(
            "the checkpoint belongs to another model",
            where=str(path),
            found=f"these do not fit: {', '.join(wrong[:8])}",
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(saved[name])
    if optimizer is not None:
        load_optimizer(model, optimizer, load_file(path / OPTIMIZER), step=step)


def newest(folder: Path, count: int | None = None) -> list[Path]:
    """Return the `last.<step>` checkpoints, the latest step first."""
    found = {int(match[1]): path for path in list_folder(folder) if (match := re.fullmatch(r"last\.(\d+)", path.name))}
    return [found[step] for step in sorted(found, reverse=True)][:count]


def read_state(path: Path) -> State:
    """Read a checkpoint's state.json."""
    values = read_json(path / STATE)
    names = {f.name for f in fields(State)}
    if set(values) != names:
        raise FormatError("state.json has other fields than this version writes", where=str(path))
    return State(**values)


def verify(path: Path, names: set[str]) -> None:
    """Raise FormatError unless each of these files has the SHA-256 that the manifest says."""
    sums = read_json(path / MANIFEST)
    for name in sorted(names):
        if not (path / name).is_file():
            raise FormatError(f"{name} is missing", where=str(path))
        if sha256(path / name) != sums.get(name):
            raise FormatError(f"{name} is damaged", where=str(path))


def prune(folder: Path, *, keep: list[Path], best: Iterable[int | None] = ()) -> None:
    """Remove every checkpoint but `keep`, and every best one that neither `best` nor a kept checkpoint names."""
    kept = {path.name for path in keep} | {f"{BEST}.{step}" for step in best}
    for path in keep:
        try:
            kept.add(f"{BEST}.{read_state(path).best_step}")
        except FormatError:
            continue  # damaged: the others count
    for path in list_folder(folder):
        if re.fullmatch(r"(last|best)\.\d+", path.name) and path.name not in kept:
            remove(path)


def clean(folder: Path) -> None:
    """Remove what a killed save or a killed removal left."""
    for path in list_folder(folder):
        if path.name.endswith(STAGED):
            shutil.rmtree(path)


def remove(path: Path) -> None:
    """Remove a folder; a crash on the way leaves a hidden name that `clean` knows, never half a checkpoint."""
    hidden = path.with_name(f".{path.name}.old{STAGED}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)  # noqa: PTH104 (faults are injected here by name)
    shutil.rmtree(hidden)


def write_folder(path: Path, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Write a folder that is whole or absent: files, then their manifest, all flushed, then one rename."""
    staged = path.with_name(f".{path.name}{STAGED}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        os.mkdir(staged)  # noqa: PTH102
        sums = {name: write_file(staged / name, pieces) for name, pieces in files.items()}
        write_file(staged / MANIFEST, [json.dumps(sums, indent=2).encode()])
        sync_folder(staged)
        if path.exists():  # the same step, saved again
            remove(path)
        os.rename(staged, path)  # noqa: PTH104
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write and flush a new file; return its SHA-256."""
    digest = hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return digest.hexdigest()


def check_same_base(state: State, model: nn.Module, folder: Path) -> None:
    """Refuse to resume beside other frozen weights than those that the run began with."""
    if state.frozen != frozen_sum(model):
        raise InputError(
            "the frozen weights are not those that this run began with", where=str(folder),
            found="another base model, or one that was changed", fix="give the same base, or start in another folder",
        )  # fmt: skip


def check_same_run(state: State, config: dict[str, Any], data: str, folder: Path) -> None:
    """Refuse to resume with other settings or other data: the result would belong to neither run."""
    changed = [name for name in config if state.config.get(name) != config[name]]
    if changed:
        raise InputError(
            "a resumed run must keep its settings",
            where=str(folder),
            found=", ".join(f"{name} = {config[name]}" for name in changed),
            expected=", ".join(f"{name} = {state.config.get(name)}" for name in changed),
            fix="repeat the first settings, or start in another folder",
        )
    if state.data != data:
        raise InputError(
            "the data have changed since this run began", where=str(folder), fix="start again in another folder"
        )


def forecast_bytes(model: nn.Module, *, moments: int = 2) -> int:
    """Return what the checkpoints of a run take at most, with so many moments a parameter."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return COPIES * sum(t.nbytes for t in saved_tensors(model).values()) + KEPT * moments * trained + SMALL_FILES


def check_space(folder: Path, model: nn.Module, *, moments: int = 2) -> None:
    """Raise InputError where the checkpoints of this model will not fit."""
    need = forecast_bytes(model, moments=moments)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_bytes(folder) + held
    if free < need:
        raise InputError(
            "the checkpoints will not fit on the disk",
            where=str(folder),
            found=f"{free / 1e6:.0f} MB free",
            expected=f"{need / 1e6:.0f} MB",
            fix="free some space, choose a smaller model, or write to another disk with -o",
        )


def check_finite(model: nn.Module, folder: Path) -> None:
    """Raise TrainingError instead of saving NaN or infinity."""
    for name, tensor in saved_tensors(model).items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"the weights of {name} hold NaN or infinity; nothing was saved", where=str(folder), fix="lower --lr"
            )


def list_folder(folder: Path) -> list[Path]:
    """Return what a folder holds, or nothing where it does not exist."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other process out of this run folder until the block ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "another process is training in this folder",
                where=str(folder),
                fix="wait for it to end, or write to another folder",
            ) from None
        yield
    finally:
        os.close(handle)
