"""Training runs for the tests of several processes; each process of torchrun runs them all.

    python -m torch.distributed.run --standalone --nproc-per-node 2 distributed_run.py JOBS     two ranks
    python distributed_run.py JOBS                                                              one

JOBS is a JSON list of settings for `run`. The first loss and gradients go to FOLDER/first.safetensors, the
hash of each batch that a rank asked for to FOLDER.<rank>.order, the process to FOLDER.<rank>.pid.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from small import make_data, make_model
from torch import Tensor, nn

import lmworks.training.gradient_sum as gradient_sum
from lmworks.base.errors import InputError, LmworksError
from lmworks.base.launch import end, read_launch
from lmworks.base.types import Batch
from lmworks.models.checkpoint import load_model
from lmworks.tasks.base import Feature
from lmworks.training.data import IGNORED
from lmworks.training.distributed import find_ranks
from lmworks.training.examples import Examples, Row
from lmworks.training.objectives import CausalLoss, ClassLoss, Objective
from lmworks.training.train_config import TrainConfig
from lmworks.training.trainer import Trainer

VOCAB, LABELS, ROWS = 61, 3, 32


class Watched(Trainer):
    """Keeps the loss and the gradients of the first step, before the update."""

    def update(self, loss: float, lr: float) -> dict[str, Any]:
        if self.state.step == 0 and self.ranks.rank == 0:
            gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            save_file({**gradients, "loss": torch.tensor(loss, dtype=torch.float64)}, self.folder / "first.safetensors")
        return super().update(loss, lr)


class Ordered:
    """A data source that notes which batches were asked for, and takes its time."""

    def __init__(self, data: Any, path: Path, pause: float) -> None:
        self.data, self.path, self.pause = data, path, pause
        self.validation, self.fingerprint = data.validation, data.fingerprint

    def batch(self, step: int) -> Batch:
        time.sleep(self.pause)
        batch: Batch = self.data.batch(step)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in batch.values()))
        with self.path.open("a") as file:
            file.write(f"{step} {digest.hexdigest()}\n")
        return batch


class Slow:
    """An objective that takes so many seconds more for each row, on a device that is so much slower."""

    def __init__(self, objective: Objective, seconds: float) -> None:
        self.objective, self.seconds, self.unit, self.count = objective, seconds, objective.unit, objective.count

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        time.sleep(self.seconds * len(batch["labels"]))
        return self.objective(model, batch)


def make_rows(kind: str) -> list[Row]:
    """Return rows of unlike length; of a tagger's rows the first have most of the labels."""
    numbers, rows = np.random.default_rng(0), []
    for place in range(2 * ROWS):
        ids = numbers.integers(1, VOCAB, 3 + place % 9).tolist()
        label: Any = ids[0] % LABELS
        if kind == "tags":
            label = [i % LABELS if place % 4 == 0 or at == 0 else IGNORED for at, i in enumerate(ids)]
        rows.append(Row(Feature({"input_ids": ids}, place), {"labels": label}))
    return rows


def run(
    folder: str, *, kind: str = "causal", model: str = "", dropout: float = 0.0, pause: float = 0.0,
    slow: tuple[float, ...] = (), fail: int = -1, **settings: Any,
) -> Trainer:  # fmt: skip
    """Train or resume a run in `folder`: kind "causal", "classes" or "tags", the last two from the folder `model`.

    `pause` is the seconds that a batch takes to make, `slow` the seconds that each rank takes for a row, `fail` the
    rank whose objective cannot be made.
    """
    place, path = read_launch(), Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    Path(f"{folder}.{place.rank}.pid").write_text(str(os.getpid()))
    if kind == "causal":
        network: nn.Module = make_model(dropout=dropout)
        data: Any = make_data(batch_size=ROWS)
    else:
        network, data = load_model(Path(model)), Examples(make_rows(kind), epochs=9, batch_size=ROWS)
    objective: Any = CausalLoss() if kind == "causal" else ClassLoss()
    with find_ranks().together():
        check(place.rank == fail)
    if slow:
        objective = Slow(objective, slow[place.rank])
    config = {"steps": 1, "lr": 3e-3, "dtype": "fp32", "compile": "never", "max_grad_norm": 1e9, **settings}
    trainer = Watched(
        network,
        objective=objective,
        data=Ordered(data, Path(f"{folder}.{place.rank}.order"), pause),
        config=TrainConfig(**config),
        folder=path,
        stream=sys.stderr,
    )
    trainer.fit()
    return trainer


def sum_by_buckets(path: str) -> None:
    """Save the summed gradients of a tied, a frozen, a never used parameter, and of one that rank 0 alone uses."""
    torch.manual_seed(0)
    words, once, never = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(3, 3)
    tied, frozen = nn.Linear(4, 7, bias=False), nn.Linear(4, 4)
    tied.weight = words.weight
    frozen.requires_grad_(False)
    model = nn.ModuleList([words, once, never, tied, frozen])
    parameters = [p for p in model.parameters() if p.requires_grad]
    ranks = find_ranks()
    gradient_sum.BUCKET_BYTES = 100
    total = ranks.sum_gradients(parameters)
    for rank in range(2) if ranks.world == 1 else [ranks.rank]:
        total.expect()
        x = frozen(words(torch.tensor([rank, 3])))
        tied(once(x) if rank == 0 else x).sum().backward()
    total.finish()
    if ranks.rank == 0:
        save_file({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)


def check(wrong: bool) -> None:
    """Raise an InputError where something is wrong."""
    if wrong:
        raise InputError("this rank has no data", where="here", fix="give it some")


if __name__ == "__main__":
    torch.manual_seed(99 + read_launch().rank)  # nothing may depend on it
    try:
        for job in json.loads(sys.argv[1]):
            sum_by_buckets(job["buckets"]) if "buckets" in job else run(**job)
    except LmworksError as error:
        if not error.silent:
            print(f"lmworks: {error}", file=sys.stderr)
        end(error.exit_code)
    end(0)
