"""What is measured of the starting model: how hard each row is for it, and its loss on every domain.

Both are kept in files of the run's folder, so that a resumed run goes on with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lmworks.base.files import read_json, write_json
from lmworks.training.examples import HELD_MASKS
from lmworks.training.machine import to_device
from lmworks.training.validation import held_out_loss

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup
    from lmworks.training.tuning import Curriculum

DIFFICULTY, DOMAINS = "difficulty.json", "domains.json"
FIRST = "training data"  # the name of the main domain
Measure = Callable[[], dict[str, float]]


def find_difficulty(folder: Path, setup: Setup, curriculum: Curriculum) -> NDArray[np.float64] | None:
    """Return how hard each row (n,) is: its tokens, its loss, or its place in the file; None without a curriculum."""
    rows = setup.data.main
    if curriculum == "length":
        return np.array([len(row.feature) for row in rows], np.float64)
    if curriculum == "given":
        return np.arange(len(rows), dtype=np.float64)
    if curriculum == "none":
        return None
    path = folder / DIFFICULTY
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, row_losses(setup))
    return np.array(read_json(path)["loss"])


def row_losses(setup: Setup) -> dict[str, list[float]]:
    """Return the mean loss of each row, alone: no padding, no dropout."""
    model, objective, found = setup.model, setup.objective, list[float]()
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        for number, row in enumerate(setup.data.main):
            batch = setup.data.collate([row], number, HELD_MASKS)
            found.append(float(objective(model, to_device(batch, device))) / max(1, objective.count(batch)))
    model.train(training)
    return {"loss": found}


def losses_by_domain(setup: Setup) -> dict[str, float]:
    """Return the held-out loss of each domain, the main one first; nothing where there is only one."""
    data, training = setup.data, setup.model.training
    batches = {FIRST: data.validation(), **{domain.name: data.held_out_of(domain) for domain in data.domains}}
    found = {
        name: held_out_loss(setup.model, setup.objective, held, dtype="fp32")
        for name, held in (batches.items() if data.domains else ())
    }
    setup.model.train(training)
    return {name: loss for name, loss in found.items() if loss is not None}


def find_losses(folder: Path, setup: Setup) -> dict[str, float]:
    """Return the starting model's loss on each domain."""
    path = folder / DOMAINS
    if setup.data.domains and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, losses_by_domain(setup))
    return {name: float(loss) for name, loss in read_json(path).items()} if path.exists() else {}


def with_domains(setup: Setup, measure: Measure | None) -> Measure | None:
    """Return a measure that adds `val_loss_NAME` of the other domains to what is measured of the main one."""
    if not setup.data.domains:
        return measure

    def both() -> dict[str, float]:
        others = {f"val_loss_{name}": loss for name, loss in losses_by_domain(setup).items() if name != FIRST}
        return {**({} if measure is None else measure()), **others}

    return both
