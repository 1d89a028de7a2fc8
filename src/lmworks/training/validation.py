"""The loss of a model on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from lmworks.base.types import Batch
from lmworks.training.distributed import Ranks
from lmworks.training.machine import as_written, autocast, to_device
from lmworks.training.objectives import Objective


def held_out_loss(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    dtype: str,
    compiled: bool = False,
    ranks: Ranks | None = None,
) -> float | None:
    """Return the mean loss, in nats a term, without dropout; None where there is nothing to score.

    With `ranks` each of them scores its share of the batches.
    """
    device, ranks = next(model.parameters()).device, ranks or Ranks()
    total, count = 0.0, 0.0
    model.eval()
    with as_written(compiled), torch.no_grad(), autocast(device.type, dtype):
        for batch in islice(batches, ranks.rank, None, ranks.world):
            total += float(objective(model, to_device(batch, device)))
            count += objective.count(batch)
    model.train()
    total, count = ranks.sum(total, count)
    return total / count if count else None
