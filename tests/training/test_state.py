"""Checkpoints are whole or absent: damage, full disks, power loss, leftovers, the size forecast."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import Bigram, make_model, make_trainer

from lmworks.base import files
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.training import state as states
from lmworks.training.state import load_checkpoint, write_file
from lmworks.training.stored import model_tensors, tensor_bytes
from lmworks.training.trainer import Trainer


def tiny(folder: Path, **changes: Any) -> Trainer:
    """Return a trainer of a model with two tensors: few writes a save."""
    return make_trainer(folder, model=Bigram(), **{"steps": 4, "eval_every": 2, "eval_tokens": 20, **changes})


def weights(trainer: Trainer) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in model_tensors(trainer.model).values()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_our_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "transposed": torch.randn(4, 6).t(),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False, True]),
    }
    write_file(tmp_path / "x.safetensors", tensor_bytes(tensors))
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    write_file(tmp_path / "none.safetensors", tensor_bytes({}))
    assert load_file(tmp_path / "none.safetensors") == {}


def test_a_tied_matrix_is_stored_once() -> None:
    stored = model_tensors(make_model())
    assert "transformer.embeddings.tokens.weight" in stored
    assert "head.project.weight" not in stored


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 4 of 6, as a crash leaves it: last.2, last.4 and the best weights they name."""
    folder = tmp_path_factory.mktemp("state") / "run"
    folder.mkdir()
    trainer = tiny(folder, steps=6)
    trainer.start_or_resume()
    with trainer.open_log() as trainer.log:
        for _ in range(4):
            trainer.train_step()
            if trainer.is_due(2):
                trainer.validate()
                trainer.save()
    return folder


FILES = ["last.4/model.safetensors", "last.4/optimizer.safetensors", "last.4/state.json", "last.4/manifest.json"]


@pytest.mark.parametrize("file", [*FILES, "best.4/model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(two_checkpoints: Path, tmp_path: Path, file: str, damage: str) -> None:
    """A safetensors file that parses proves nothing: the sums decide, and the checkpoint before takes over."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    found = load_checkpoint(folder)
    assert found is not None
    assert (found[1].step, found[1].best_step) == (4, 4)
    data = bytearray((folder / file).read_bytes())
    if damage == "remove":
        (folder / file).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    found = load_checkpoint(folder)
    assert found is not None
    assert found[1].step == 2
    resumed, reference = tiny(folder, steps=6), tiny(tmp_path / "whole", steps=6)
    resumed.fit()
    reference.fit()
    assert weights(resumed) == weights(reference)
    assert names(folder) == names(tmp_path / "whole")


def test_no_whole_checkpoint_is_an_error_that_lists_them(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    (folder / "last.2" / "model.safetensors").unlink()
    (folder / "last.4" / "state.json").write_text("{}")
    with pytest.raises(FormatError, match="no checkpoint of this run is whole") as error:
        tiny(folder, steps=6).fit()
    assert "last.2: model.safetensors is missing" in error.value.found
    assert "last.4: state.json is damaged" in error.value.found


def test_leftovers_of_a_killed_save_are_removed(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    for name in (".last.5.staged", ".last.1.old.staged", ".best.6.staged"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / "best.6").mkdir()  # written, but the checkpoint that would name it was not
    (folder / "best.6" / "model.safetensors").write_bytes(b"never named")
    tiny(folder, steps=6).fit()
    assert names(folder) == {"metrics.jsonl", "last.6", "best.6"}
    assert load_checkpoint(folder) is not None


def test_another_model_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path).fit()
    with pytest.raises(FormatError, match="belongs to another model"):
        make_trainer(tmp_path, steps=4, eval_every=2, eval_tokens=20).fit()


CALLS = ("open", "mkdir", "write", "pwrite", "fsync", "rename")


@contextmanager
def failing(at: int, code: int) -> Iterator[Callable[[], int]]:
    """Let the `at`-th writing call of the block, and every write after it until the block ends, fail."""
    originals = {name: getattr(os, name) for name in CALLS}
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if name != "open" or (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                count += 1
                if count == at or (count > at > 0 and name in {"write", "pwrite"}):
                    raise OSError(code, os.strerror(code), str(arguments[0]))
            return originals[name](*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield lambda: count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def test_every_call_that_can_fail_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Disk full at the Nth call, for every N: a clear error, the last checkpoint loads, a resumed run is the same."""
    reference = tiny(tmp_path / "whole")
    with failing(0, 0) as count:
        reference.fit()
        calls = count()
    assert calls > 60
    saved = 0
    for at in range(1, calls + 1):
        folder = tmp_path / f"run{at}"
        code = (errno.ENOSPC, errno.EIO)[at % 2]
        with failing(at, code), pytest.raises(LmworksError) as error:
            tiny(folder).fit()
        assert os.strerror(code) in str(error.value)
        assert not [name for name in (names(folder) if folder.exists() else ()) if name.endswith(".staged")]
        found = load_checkpoint(folder)  # raises if one is there and none is whole
        step = found[1].step if found else -1
        assert step >= saved - 2  # the one before, at worst
        saved = max(saved, step)
        if step >= 0 and "is intact" in str(error.value):
            assert f"step {step} is intact" in str(error.value) or f"step {step - 2} is intact" in str(error.value)
        resumed = tiny(folder)
        resumed.fit()
        assert weights(resumed) == weights(reference), at
        assert names(folder) == names(tmp_path / "whole"), at
        shutil.rmtree(folder)
    assert saved == 4


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [({}, 8), ({"optimizer": "sgd"}, 6), ({"optimizer": "sgd", "momentum": 0.0}, 4)],
    ids=["adamw", "momentum", "sgd"],
)
def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], copies: int
) -> None:
    """C28: disk filled. The forecast is compared with what a run really takes at its fullest."""
    Usage = namedtuple("Usage", "total used free")
    trainer = make_trainer(tmp_path / "run", steps=4, eval_every=1, **optimizer)
    size = sum(p.nbytes for p in trainer.model.parameters())
    monkeypatch.setattr(states, "SMALL_FILES", 0)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(10**9, 0, copies * size - 1))
    with pytest.raises(InputError, match="will not fit on the disk"):
        trainer.fit()
    assert names(tmp_path / "run") == set()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(10**9, 0, copies * size))
    fullest = 0
    write = states.write_folder

    def weigh(path: Path, contents: Any) -> None:
        nonlocal fullest
        write(path, contents)
        fullest = max(fullest, sum(p.stat().st_size for p in path.parent.rglob("*.safetensors")))

    monkeypatch.setattr(states, "write_folder", weigh)
    make_trainer(tmp_path / "run", steps=4, eval_every=1, **optimizer).fit()
    assert (copies - 2) * size < fullest < copies * size + 40_000  # headers of the files
