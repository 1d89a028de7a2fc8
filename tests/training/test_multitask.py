"""One body under two heads: each step is that of its task alone, and the tasks take turns by weight."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_models import make_body, two_languages, write_rows

from lmworks.base.errors import InputError
from lmworks.training.finetune import Setup, set_up
from lmworks.training.multitask import TASK, TaskMixture, join
from lmworks.training.optim import learning_scales
from lmworks.training.train_config import TrainConfig
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetune_data import read_data

COLUMNS: dict[str, Any] = {"text_column": None, "label_column": None, "header": True}
TASKS = {"train.jsonl": "text-classification", "names.conll": "token-classification"}


@pytest.fixture(scope="module")
def root(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body without a head, sentences in two languages, and tweets with names."""
    root = tmp_path_factory.mktemp("tasks")
    rows = two_languages(data_folder, skip=0, count=40)
    blocks = re.split(r"\n\s*\n", (data_folder / "wnut17/train.conll").read_text())
    named = [block for block in blocks if "B-" in block][:40]
    (root / "names.conll").write_text("\n\n".join(named) + "\n")
    write_rows(root / "train.jsonl", rows)
    make_body(root / "body", [*(text for text, _ in rows), *(re.sub(r"\t\S+\n?", " ", block) for block in named)])
    return root


def set_up_both(root: Path) -> tuple[list[Setup], list[Any]]:
    """Return what each task needs, and its held-out data."""
    setups, held = [], []
    for file, task in TASKS.items():
        tuning = Tuning(epochs=4, batch_size=8).check()
        train, other = read_data(root / file, None, task, None, 0, COLUMNS)
        setups.append(set_up(root / "body", train, other, task=task, tuning=tuning))
        held.append(other)
    return setups, held


def test_each_step_is_that_of_its_task_alone(root: Path) -> None:
    """Loss and gradients equal those of the task's own model; the other task's head has none."""
    alone, _ = set_up_both(root)
    both, _ = set_up_both(root)
    joined = join(both, [0.4])
    for model in (joined.model, *(setup.model for setup in alone)):
        model.eval()
    assert joined.model.models[0].transformer is joined.model.models[1].transformer
    for step in range(4):
        batch = joined.data.batch(step)
        task, turn = int(batch[TASK][0]), int(joined.data.turns[step])
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        own = {name: torch.from_numpy(array) for name, array in alone[task].data.batch(turn).items()}
        joined.model.zero_grad()
        loss, expected = joined.objective(joined.model, tensors), alone[task].objective(alone[task].model, own)
        assert torch.equal(loss, expected)
        loss.backward()
        alone[task].model.zero_grad()
        expected.backward()
        assert joined.objective.count(batch) == alone[task].objective.count(alone[task].data.batch(turn))
        for name, parameter in alone[task].model.named_parameters():
            found = both[task].model.get_parameter(name).grad
            assert torch.equal(found, parameter.grad) if parameter.grad is not None else found is None
        assert all(p.grad is None for p in both[1 - task].model.head.parameters())


def test_tasks_take_turns_by_weight() -> None:
    """Three of ten steps are the second task's, in any stretch to within one; every step of the first comes once."""

    class Numbers:
        def __init__(self, sign: int) -> None:
            self.sign = sign

        def batch(self, step: int) -> dict[str, Any]:
            return {"number": np.array([self.sign * (step + 1)] * 2)}

        def validation(self, tokens: int | None = None) -> Any:
            return iter(())

        def fingerprint(self) -> str:
            return str(self.sign)

    data = TaskMixture([Numbers(1), Numbers(-1)], [0.3], steps=70)
    found = [int(data.batch(step)["number"][0]) for step in range(data.steps)]
    assert data.steps == 100
    assert [n for n in found if n > 0] == list(range(1, 71)) and [-n for n in found if n < 0] == list(range(1, 31))
    second = np.cumsum(np.array(found) < 0)
    assert np.abs(second - 0.3 * np.arange(1, 101)).max() <= 1
    assert data.fingerprint() != TaskMixture([Numbers(1), Numbers(-1)], [0.2], steps=70).fingerprint()


def test_different_bodies_are_refused(root: Path, data_folder: Path, tmp_path: Path) -> None:
    other = make_body(tmp_path / "body", (text for text, _ in two_languages(data_folder, skip=0, count=20)))
    (first, _), _ = set_up_both(root)
    train, held = read_data(root / "train.jsonl", None, "text-classification", None, 0, COLUMNS)
    second = set_up(other, train, held, task="text-classification", tuning=Tuning(long="truncate").check())
    with pytest.raises(InputError, match="different bodies"):
        join([first, second], [0.5])


def test_every_head_has_the_rate_of_the_head(root: Path) -> None:
    """--head-lr acts on the heads alone, though their names begin with the number of their task."""
    joined = join(set_up_both(root)[0], [0.4])
    scales = learning_scales(joined.model, TrainConfig(steps=1, lr=1e-3, head_lr=5e-3))
    assert {scale for name, scale in scales.items() if ".head." in name} == {5.0}
    assert {scale for name, scale in scales.items() if ".transformer." in name} == {1.0}
    assert sum(name.startswith("models.1.head.") for name in scales) == 2
