"""The model in torch: the reference for every other execution.

Shapes: B batch, T tokens, n rows of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model
from lmworks.runtime.base import Logits, check_ids, check_length, check_slots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST_CAPACITY = 256  # tokens a slot; doubled when a slot needs more


class TorchRuntime:
    """Our modules in inference mode, with `slots` rows of a static cache. A model that is given stays as it is.

    In fp32 the given model is run itself, so the runtime follows its training; in bf16 a copy of it as it is now.
    """

    name = "torch"

    def __init__(
        self, model: Model | str | Path, *, head: str | None = None, dtype: str = "fp32", slots: int = 1
    ) -> None:
        """Take a model, or read one with the head that is named (None: the one that config.json names)."""
        if dtype not in DTYPES:
            raise InputError(f"torch cannot run the dtype {dtype!r}", expected=" or ".join(DTYPES))
        wanted = DTYPES[dtype]
        if not isinstance(model, Model):
            self.model = load_model(model, head, dtype=wanted)
        elif dtype != "fp32" or any(parameter.dtype != wanted for parameter in model.parameters()):
            self.model = deepcopy(model).to(wanted)
        else:
            self.model = model
        if dtype == "bf16":
            pack(self.model)
        self.dtype, config = dtype, self.model.config
        self.vocab_size, self.max_length = config.vocab_size, config.max_tokens
        self.device = next(self.model.parameters()).device
        self.slots = slots

    @cached_property
    def cache(self) -> KVCache:
        """Keys and values of every slot; made when the first prompt comes."""
        capacity = min(FIRST_CAPACITY, self.max_length)
        dtype = next(self.model.parameters()).dtype
        return KVCache(self.model.config, self.slots, capacity=capacity, dtype=dtype, device=self.device)

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences, padded on either side, without a cache.

        input_ids (B, T), or pixel_values -> logits (B, T, O) or (B, O); hidden_states (B, T, D) of a bare body.
        """
        name = "hidden_states" if self.model.kind == "Model" else "logits"
        with inference(self.model):
            if "pixel_values" in batch:
                pixels = torch.from_numpy(batch["pixel_values"]).to(self.device, next(self.model.parameters()).dtype)
                return {name: to_numpy(self.model(pixels))}
            input_ids, types = np.asarray(batch["input_ids"], np.int64), batch.get("token_type_ids")
            check_ids(input_ids, self.vocab_size)
            check_length(input_ids.shape[1], self.max_length)
            mask = self.needed(batch.get("attention_mask"))
            ids = torch.from_numpy(input_ids).to(self.device)
            segments = None if types is None else torch.from_numpy(types).to(self.device)
            return {name: to_numpy(self.model(ids, mask, token_type_ids=segments))}

    def needed(self, mask: NDArray[Any] | None) -> torch.Tensor | None:
        """Return a mask (B, T) that changes an answer, else None: padding that nobody sees costs the fast kernels."""
        if mask is None or mask.all():
            return None
        if self.model.config.causal and self.model.spec.pool == "none" and not is_padded_left(mask):
            return None
        return torch.from_numpy(mask).to(self.device)

    def prefill(self, slots: Sequence[int], input_ids: Sequence[Sequence[int]]) -> Logits:
        """Start these slots over, one prompt each of any length; return the last token's logits (n, V)."""
        check_slots(slots, len(input_ids), self.slots)
        lengths = [len(row) for row in input_ids]
        for prompt in input_ids:
            check_length(len(prompt), self.max_length)
            check_ids(np.asarray(prompt), self.vocab_size)
        self._reserve(max(lengths, default=0))
        logits = np.empty((len(slots), self.vocab_size), np.float32)
        for rows in alike(lengths):
            padded = np.zeros((len(rows), lengths[rows[0]]), np.int64)  # on the right
            for i, row in enumerate(rows):
                padded[i, : lengths[row]] = input_ids[row]
            counts = torch.tensor([lengths[row] for row in rows])
            mask = (torch.arange(padded.shape[1]) < counts[:, None]) if len(rows) > 1 else None
            cache = self.cache.select([slots[row] for row in rows])
            cache.reset()
            with inference(self.model):
                last = (counts - 1).to(self.device)
                out = self.model(torch.from_numpy(padded).to(self.device), mask, cache=cache, last=last)
            logits[rows] = to_numpy(out)
        return logits

    def step(self, slots: Sequence[int], input_ids: Sequence[int]) -> Logits:
        """Add one token to each of these slots, whatever their lengths; return its logits (n, V)."""
        check_slots(slots, len(input_ids), self.slots)
        tokens = np.asarray(input_ids, np.int64)[:, None]  # (n, 1)
        check_ids(tokens, self.vocab_size)
        if not slots:
            return np.empty((0, self.vocab_size), np.float32)
        cache = self.cache.select(slots)
        check_length(cache.longest + 1, self.max_length)
        self._reserve(cache.longest + 1)
        with inference(self.model):
            return to_numpy(self.model(torch.from_numpy(tokens).to(self.device), cache=cache, last=-1))

    def _reserve(self, length: int) -> None:
        """Make room in the cache; double, so that copying stays rare."""
        if length > self.cache.capacity:
            self.cache.reserve(max(length, min(2 * self.cache.capacity, self.max_length)))


class PackedLinear(nn.Module):
    """A Linear whose bfloat16 matrix was put, once, into the order that the processor reads best."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply and add the bias: (…, in) -> (…, out)."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def pack(model: nn.Module) -> None:
    """Put a PackedLinear in place of every Linear on the CPU; a torch without these operators keeps its own.

    Measured with AMX units: a third faster for prompts, single steps and batches of steps alike. In float32 it does not
    pay there, since torch's own product of a single row already runs at the speed of the memory.
    """
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and leave a model that is being trained as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def is_padded_left(mask: NDArray[Any]) -> bool:
    """Return whether a mask (B, T) hides a token that another one could see; padding on the right is never seen."""
    return bool((mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all())


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows so that the longest of a group is at most twice as long as any other: [8, 1, 5] -> [[0, 2], [1]]."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and 2 * lengths[row] >= lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def to_numpy(logits: torch.Tensor) -> Logits:
    """Return logits as a numpy array of float32."""
    array: Logits = logits.float().cpu().numpy()
    return array
