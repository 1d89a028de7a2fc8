"""The model in torch: the reference for every other execution.

Shapes: B batch, T tokens, n rows of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import CausalLM
from lmworks.runtime.base import Logits, check_ids, check_length, check_slots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchRuntime:
    """Our modules in inference mode, with a static cache of `slots` rows made at first use."""

    name = "torch"

    def __init__(self, model: CausalLM | str | Path, *, dtype: str = "fp32", slots: int = 1) -> None:
        if dtype not in DTYPES:
            raise InputError(f"torch cannot run dtype {dtype!r}", expected=", ".join(DTYPES))
        self.model = (model if isinstance(model, CausalLM) else load_model(model)).eval()
        if dtype != "fp32":
            self.model = self.model.to(DTYPES[dtype])
        self.dtype, self.slots = dtype, slots
        self.vocab_size = self.model.config.vocab_size
        self.max_length = self.model.config.max_position_embeddings
        self.cache: KVCache | None = None

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences without a cache: logits (B, T, V)."""
        ids = np.asarray(batch["input_ids"])
        check_ids(ids, self.vocab_size)
        check_length(ids.shape[1], self.max_length)
        mask = batch.get("attention_mask")
        hidden = mask is not None and not np.all(mask)
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(ids), torch.from_numpy(np.asarray(mask)) if hidden else None)
            return {"logits": logits.float().numpy()}

    def prefill(self, slots: Sequence[int], input_ids: Sequence[Sequence[int]]) -> Logits:
        """Start these slots over, one prompt each of any length; return the last token's logits (n, V)."""
        check_slots(slots, len(input_ids), self.slots)
        lengths = [len(ids) for ids in input_ids]
        for length in lengths:
            check_length(length, self.max_length)
        padded = np.zeros((len(lengths), max(lengths)), np.int64)
        for row, ids in zip(padded, input_ids, strict=True):
            row[: len(ids)] = ids
        check_ids(padded, self.vocab_size)
        cache = self.make_cache()
        for slot in slots:
            cache.lengths[slot] = 0
        step = cache.step(padded.shape[1], slots)
        last = torch.tensor(lengths) - 1
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(padded), cache=step, last=last)  # (n, V)
        step.commit(lengths)
        return as_float32(logits)

    def step(self, slots: Sequence[int], input_ids: Sequence[int]) -> Logits:
        """Add one token to each of these slots; return its logits (n, V)."""
        check_slots(slots, len(input_ids), self.slots)
        cache = self.make_cache()
        for slot in slots:
            check_length(cache.lengths[slot] + 1, self.max_length)
        ids = np.asarray(input_ids, np.int64)[:, None]
        check_ids(ids, self.vocab_size)
        step = cache.step(1, slots)
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(ids), cache=step, last=-1)  # (n, V)
        step.commit()
        return as_float32(logits)

    def make_cache(self) -> KVCache:
        """Return the cache, made at first use."""
        if self.cache is None:
            self.cache = KVCache(self.model.config, self.slots, self.max_length, dtype=DTYPES[self.dtype])
        return self.cache


def as_float32(logits: torch.Tensor) -> Logits:
    """Return the logits as a numpy array of float32."""
    array: Logits = logits.float().numpy()
    return array
