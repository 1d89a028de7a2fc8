"""A head fitted to the vectors that it will read, for learning from a few examples of each class.

With so few examples a new head that is trained with the body learns slowly. Instead (Tunstall et al. 2022) the body is
first trained so that texts of one label lie together, then the head is fitted by logistic regression:

    sum over texts of cross-entropy(W x + b, label) + |W|² / 2        which is scikit-learn's, with C = 1

The x are exactly what the published classifier's last matrix reads (BERT's pooler, not a mean), so that W and b are its
weights and the folder stays an ordinary one.

Shapes: n texts, D numbers of a vector, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.models.heads import Model
from lmworks.runtime.batching import make_batches
from lmworks.runtime.torch_runtime import inference
from lmworks.training.contrastive import Vectors
from lmworks.training.examples import Row, collate_rows
from lmworks.training.lora_layers import Adapted
from lmworks.training.machine import to_device

ITERATIONS = 500


def fit_head(model: Model, rows: Sequence[Row], vectors: Vectors, *, pad_id: int = 0) -> None:
    """Fit the head's last matrix by logistic regression on the vectors that it reads, in place."""
    x, y = read_vectors(model, rows, vectors, pad_id=pad_id)
    project = model.head.project
    if isinstance(project, Adapted):  # a copy that belongs to an adapter
        project = project.current() or project.base
    assert isinstance(project, torch.nn.Linear)
    weight, bias = fit_logistic(x, y, len(project.weight))
    with torch.no_grad():
        project.weight.copy_(weight)
        if project.bias is not None:
            project.bias.copy_(bias)


def read_vectors(model: Model, rows: Sequence[Row], vectors: Vectors, *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the vectors (n, D) of rows and their labels (n,)."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = next(model.parameters()).device
    with inference(model):
        for places in make_batches([len(row.feature) for row in rows], batch_tokens=2048, max_rows=64):
            batch = to_device(collate_rows([rows[i] for i in places], pad_id=pad_id), device)
            made = vectors(model, batch["input_ids"], batch.get("attention_mask"), batch.get("token_type_ids"))
            for place, vector in zip(places, made, strict=True):
                found[place] = vector.cpu()
    return torch.stack(found).clone(), torch.tensor([row.targets["labels"] for row in rows])


def fit_logistic(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the weights (L, D) and the bias (L,) of logistic regression on x (n, D) and y (n,).

    Two classes share one direction, as in scikit-learn: half of it each, with the other sign.
    """
    x, outputs = x.double(), 1 if classes == 2 else classes
    weight = torch.zeros(outputs, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(outputs, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = x @ weight.t() + bias  # (n, L) or (n, 1)
        scores = torch.cat([torch.zeros_like(scores), scores], 1) if classes == 2 else scores
        value = F.cross_entropy(scores, y, reduction="sum") + weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    w, b = weight.detach().float(), bias.detach().float()
    return (torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2) if classes == 2 else (w, b - b.mean())
