"""What training minimises. An objective returns the SUM of its terms and says how many there are.

The trainer divides by the count of the whole batch, so that splitting a batch changes nothing.

Chunked cross-entropy never holds the logits of all tokens: for a few rows at a time it computes them, their loss and
its gradient, and keeps only the gradient:   d loss / d logits = softmax(logits) - one_hot(label).

Shapes: B batch, T tokens, L labels, N scored tokens, C rows of a chunk, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmworks.base.types import Batch
from lmworks.training.data import IGNORED
from lmworks.training.packing import DOCUMENTS, packed_states

CHUNK_ELEMENTS = 2**22  # logits held at once: 16 MB in fp32, the fastest of 2**19 … 2**23
CACHED_ELEMENTS = 2**18  # of them that are turned into gradients at once on a processor: 1 MB, which its caches hold
LEAST = -80.0  # below this log-probability, exp() in float32 is no longer exact


class Objective(Protocol):
    """A loss that is a sum over a batch."""

    unit: str  # what its terms are: "tokens", "labels" …

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the loss over the batch, in nats, as a float32 scalar."""

    def count(self, batch: Batch) -> int:
        """Return how many terms that sum has."""


class CausalLoss:
    """Cross-entropy of the token that `labels` names, for a model with `hidden_states(input_ids)` and `head.project`.

    That is the next token of a causal model, or the hidden one of a masked model: only those that are scored go
    through the head.
    """

    unit = "tokens"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss over the labels that are not -100."""
        network: Any = model
        labels = batch["labels"].flatten()  # (B·T,)
        if DOCUMENTS in batch:
            hidden, places = packed_states(model, batch["input_ids"], batch[DOCUMENTS])  # (N, D), (N,)
            labels = labels[places]  # (N,)
        else:
            hidden = network.hidden_states(batch["input_ids"], batch.get("attention_mask")).flatten(0, 1)  # (B·T, D)
        scored = labels != IGNORED
        if not scored.all():
            hidden, labels = hidden[scored], labels[scored]  # (N, D), (N,)
        head = network.head
        project = head.project
        if type(project) is nn.Linear and project.bias is None and head.dense is None and head.norm is None:
            return chunked_cross_entropy(hidden, project.weight, labels)
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def count(self, batch: Batch) -> int:
        """Return the number of scored tokens."""
        return int((batch["labels"] != IGNORED).sum())


def predict(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the model's numbers for the inputs of a batch, in float32."""
    network: Any = model
    if "pixel_values" in batch:
        logits: Tensor = network(batch["pixel_values"])
    else:
        types = batch.get("token_type_ids")
        logits = network(batch["input_ids"], batch.get("attention_mask"), token_type_ids=types)
    return logits.float()


class ClassLoss:
    """Cross-entropy of one label a row, labels (B,), or a token, labels (B, T) with -100 where none is scored.

    `weights` (L,) multiply the terms of their classes; the sum is still divided by the number of terms, so balanced
    weights, whose mean over the data is 1, keep its scale. `smoothing` gives that share of each target to all labels
    alike (Szegedy et al. 2016).
    """

    unit = "labels"

    def __init__(self, *, weights: Sequence[float] | None = None, smoothing: float = 0.0) -> None:
        self.weights, self.smoothing = weights, smoothing

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of logits (B, L) or (B, T, L)."""
        return self.of(predict(model, batch), batch)

    def of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of logits that are there already."""
        logits = logits.flatten(0, -2)  # (N, L)
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        return F.cross_entropy(
            logits,
            batch["labels"].flatten(),
            weight=weights,
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
            reduction="sum",
        )

    def count(self, batch: Batch) -> int:
        """Return the number of labels that are scored."""
        return int((batch["labels"] != IGNORED).sum())


class BinaryLoss:
    """Cross-entropy of each label by itself, for labels that may hold at once: labels (B, L) of 0 and 1."""

    unit = "labels"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss summed over rows and labels."""
        return self.of(predict(model, batch), batch)

    def of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of logits (B, L) that are there already."""
        return F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="sum")

    def count(self, batch: Batch) -> int:
        """Return rows times labels."""
        return int(batch["labels"].size)


class SquaredLoss:
    """Squared error of one number a row: logits (B, 1), labels (B,)."""

    unit = "rows"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed squared error."""
        return self.of(predict(model, batch), batch)

    def of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed squared error of numbers (B, 1) that are there already."""
        return F.mse_loss(logits.squeeze(-1), batch["labels"], reduction="sum")

    def count(self, batch: Batch) -> int:
        """Return the number of rows."""
        return int(batch["labels"].size)


class SpanLoss:
    """Mean cross-entropy of the first and the last token of a span: start_positions and end_positions (B,).

    Padding is no place where a span could be: unlike transformers' loss, this one does not depend on how much of it
    shares the batch.
    """

    unit = "spans"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of logits (B, T, 2)."""
        return self.of(predict(model, batch), batch)

    def of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of logits that are there already."""
        mask = batch.get("attention_mask")
        if mask is not None:
            logits = logits.masked_fill(mask[:, :, None] == 0, float("-inf"))
        start = F.cross_entropy(logits[:, :, 0], batch["start_positions"], reduction="sum")
        return (start + F.cross_entropy(logits[:, :, 1], batch["end_positions"], reduction="sum")) / 2

    def count(self, batch: Batch) -> int:
        """Return the number of rows."""
        return len(batch["start_positions"])


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the summed cross-entropy of softmax(hidden · weightᵀ): hidden (N, D), weight (V, D), labels (N,).

    Products run in autocast's dtype where it is on; the softmax is always float32.
    """
    chunk = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if torch.is_grad_enabled():
        loss: Tensor = ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, dtype)  # type: ignore[no-untyped-call]
        return loss
    total = torch.zeros((), device=hidden.device)
    weight_t = weight.to(dtype).t()  # (D, V)
    for start in range(0, len(hidden), chunk):
        logits = hidden[start : start + chunk].to(dtype) @ weight_t  # (C, V)
        total += F.cross_entropy(logits.float(), labels[start : start + chunk], reduction="sum")
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        """Go through the rows chunk by chunk; return the sum of their losses."""
        x, w = hidden.to(dtype), weight.to(dtype)  # (N, D), (V, D)
        d_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device)
        near = max(1, CACHED_ELEMENTS // len(w)) if hidden.device.type == "cpu" else chunk
        for start in range(0, len(x), chunk):
            rows, targets = x[start : start + chunk], labels[start : start + chunk, None]  # (C, D), (C, 1)
            slope = rows @ w.t()  # (C, V), logits at first
            for part, wanted in zip(torch.split(slope, near), torch.split(targets, near), strict=True):
                total += take_slope(part, wanted)
            if d_hidden is not None:
                torch.mm(slope, w, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                add_product(d_weight, slope.t(), rows)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass left."""
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * scale).to(ctx.hidden_dtype)
        return d_hidden, None if d_weight is None else d_weight * scale, None, None, None


def take_slope(logits: Tensor, targets: Tensor) -> Tensor:
    """Put the gradient of the summed cross-entropy in place of logits (C, V), in float32 between; return the sum."""
    p = logits.float().softmax(-1)  # (C, V)
    logp = p.gather(1, targets).log()  # (C, 1)
    if not logp.min() > LEAST:
        logp = F.log_softmax(logits.float(), dim=-1).gather(1, targets)
    logits.copy_(p.scatter_add_(1, targets, torch.full_like(logp, -1.0)))
    return -logp.sum()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `total`, whose dtype may be wider."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
