"""The model in torch: the reference for every other execution.

Shapes: B batch, T tokens, n rows of a call, V vocabulary.
"""

from __future__ import annotations

import ctypes
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
from lmworks.base.threads import thread_count
from lmworks.base.types import Batch
from lmworks.models.checkpoint import load_model
from lmworks.models.compact import is_compact
from lmworks.models.heads import Model
from lmworks.models.inference import (
    MANY_ROWS,
    PackedLinear,
    join,
    multiply_directly,
    pack,
    pack_if_faster,
    reads_only,
    run_ragged,
)
from lmworks.runtime import trace
from lmworks.runtime.base import Logits, check_ids, check_length, check_slots

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FIRST_CAPACITY = 256  # tokens a slot; doubled when a slot needs more
LEAST_SAVING = 150_000  # padding tokens a length, times hidden_size²: below, many small products cost more
WARM = 1024  # tokens after which a model that reads much is worth packing
__all__ = ["PackedLinear", "TorchRuntime"]


class TorchRuntime:
    """Our modules in inference mode, with `slots` rows of a static cache. A model that is given stays as it is.

    In fp32 the given model is run itself, so the runtime follows its training; in bf16 a copy of it as it is now.
    """

    name = "torch"

    def __init__(
        self, model: Model | str | Path, *, head: str | None = None, dtype: str = "fp32", slots: int = 1,
        code: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        """Take a model, or read one with the head that is named (None: the one that config.json names).

        `code` is that of layers of its maker's own (models/custom.py).
        """
        if dtype not in DTYPES:
            raise InputError(f"torch cannot run the dtype {dtype!r}", expected=" or ".join(DTYPES))
        if trace.running is not None:
            trace.running.watch_torch()
        wanted = DTYPES[dtype]
        self.cold = 0  # tokens until float32 matrices are packed
        if isinstance(model, Model):
            same = dtype == "fp32" and all(parameter.dtype == wanted for parameter in model.parameters())
            self.model = model if same else deepcopy(model).to(wanted)
        else:
            self.model = load_model(model, head, dtype=wanted, code=code)
            if not self.model.parts:  # packing knows the core's own layers only
                self.make_ready(dtype)
        if dtype == "bf16" and not self.model.parts and not is_compact(self.model):
            pack(self.model, rows=MANY_ROWS if reads_only(self.model) else 1)
        self.dtype, config = dtype, self.model.config
        self.vocab_size, self.max_length = config.vocab_size, config.max_tokens - self.model.transformer.prefix.length
        self.turn = config.turn
        self.slots, self.rewinds = slots, self.model.transformer.attends
        self.gives_features = False  # of each row, what the head's last matrix reads, beside the logits

    def list_broken(self) -> list[str]:
        """Return the names of weights that hold NaN or infinity."""
        return [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]

    def make_ready(self, dtype: str) -> None:
        """Choose how a model that was read here multiplies; until there were many tokens nothing is reordered."""
        join(self.model)
        keep_memory()
        if dtype == "fp32":
            self.cold = WARM
            multiply_directly(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self.model.parameters()).device

    @property
    def leaves_padding_out(self) -> bool:
        """Whether padding is better left out: on a graphics card many small products cost more than padding."""
        return self.device.type == "cpu" and not self.model.parts and self.model.transformer.attends

    @cached_property
    def cache(self) -> Any:
        """Keys and values of every slot, or its state; made when the first prompt comes."""
        capacity = min(FIRST_CAPACITY, self.max_length)
        dtype = next(self.model.parameters()).dtype
        return self.model.transformer.make_cache(self.slots, capacity=capacity, dtype=dtype, device=self.device)

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences, padded on either side, without a cache.

        input_ids (B, T), or pixel_values -> logits (B, T, O) or (B, O); hidden_states (B, T, D) of a bare body. Where
        they are asked for (`gives_features`) also features (B, D).
        """
        name = "hidden_states" if self.model.kind == "Model" else "logits"
        with inference(self.model):
            if "pixel_values" in batch:
                pixels = torch.from_numpy(batch["pixel_values"]).to(self.device, next(self.model.parameters()).dtype)
                return {name: to_numpy(self.model(pixels))}
            input_ids, types = np.asarray(batch["input_ids"], np.int64), batch.get("token_type_ids")
            check_ids(input_ids, self.vocab_size)
            check_length(input_ids.shape[1], self.max_length)
            self.warm_up(input_ids.size)
            mask = batch.get("attention_mask")
            if mask is not None and self.leaves_padding_out and not self.gives_features and self.is_wasteful(mask):
                return {name: self.run_without_padding(input_ids, mask.astype(bool), types)}
            seen = self.needed(mask)
            ids = torch.from_numpy(input_ids).to(self.device)
            segments = None if types is None else torch.from_numpy(types).to(self.device)
            with self.reading_features() as read:
                logits = to_numpy(self.model(ids, seen, token_type_ids=segments))
            return {name: logits, **read}

    @contextmanager
    def reading_features(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield what will hold the features (B, D) of the rows that the model runs, where they are asked for."""
        read: dict[str, NDArray[Any]] = {}
        project = self.model.head.project
        if not self.gives_features or project is None:
            yield read
            return
        hook = project.register_forward_pre_hook(lambda _, inputs: read.update(features=to_numpy(inputs[0])))
        try:
            yield read
        finally:
            hook.remove()

    def is_wasteful(self, mask: NDArray[Any]) -> bool:
        """Say whether the padding in a mask (B, T) costs more than to leave it out: a twentieth at least."""
        lengths = mask.astype(bool).sum(1)
        padding = mask.size - int(lengths.sum())
        saving = padding * self.model.config.hidden_size**2 / len(np.unique(lengths))
        return bool(lengths.all()) and 20 * padding >= max(mask.size, 1) and saving >= LEAST_SAVING

    def run_without_padding(
        self, input_ids: NDArray[Any], mask: NDArray[np.bool_], types: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """Run the tokens that a mask (B, T) leaves, and put what comes out in their places; 0 in those of padding."""
        lengths = mask.sum(1)  # (B,)
        order = np.argsort(lengths, kind="stable")
        rows, places = np.nonzero(mask[order])  # (N,) each
        rows = order[rows]
        segments = None if types is None else torch.from_numpy(types[rows, places])
        found = run_ragged(self.model, torch.from_numpy(input_ids[rows, places]), lengths[order].tolist(), segments)
        per_row = self.model.kind != "Model" and self.model.head.pool != "none"
        shape = mask.shape[:1] if per_row else mask.shape
        out = np.zeros((*shape, found.shape[-1]), np.float32)  # (B, O) or (B, T, O)
        out[order if per_row else (rows, places)] = to_numpy(found)
        return out

    def warm_up(self, tokens: int) -> None:
        """Count tokens; once there were many, put the matrices in order, which a single text would not pay back."""
        if self.cold > 0:
            self.cold -= tokens
            if self.cold <= 0:
                pack_if_faster(self.model)

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

    def extend(self, slot: int, input_ids: Sequence[int], *, at: int) -> Logits:
        """Keep the first `at` positions of a slot and add these tokens; return the last's logits (V,).

        A long prompt so comes in parts, and what two prompts begin with is read once.
        """
        check_slots([slot], 1, self.slots)
        tokens = np.asarray(input_ids, np.int64)[None]  # (1, T)
        check_ids(tokens, self.vocab_size)
        check_length(at + tokens.shape[1], self.max_length)
        cache = self.cache.select([slot])
        held = cache.lengths[slot] - cache.kept[slot]
        if not 0 <= at <= held or not tokens.shape[1]:
            raise InputError("a slot cannot be extended so", found=f"{tokens.shape[1]} tokens at {at}",
                             expected=f"1 token or more at 0 to {held}")  # fmt: skip
        if at:
            cache.lengths[slot] = at + cache.kept[slot]
        else:
            cache.reset()
        self._reserve(cache.kept[slot] + at + tokens.shape[1])
        with inference(self.model):
            logits = to_numpy(self.model(torch.from_numpy(tokens).to(self.device), cache=cache, last=-1))  # (1, V)
        last: Logits = logits[0]
        return last

    def step(self, slots: Sequence[int], input_ids: Sequence[int]) -> Logits:
        """Add one token to each of these slots, whatever their lengths; return its logits (n, V)."""
        check_slots(slots, len(input_ids), self.slots)
        tokens = np.asarray(input_ids, np.int64)[:, None]  # (n, 1)
        check_ids(tokens, self.vocab_size)
        if not slots:
            return np.empty((0, self.vocab_size), np.float32)
        cache = self.cache.select(slots)
        check_length(cache.longest + 1, self.model.config.max_tokens)
        self._reserve(cache.longest + 1)
        with inference(self.model):
            return to_numpy(self.model(torch.from_numpy(tokens).to(self.device), cache=cache, last=-1))

    def _reserve(self, length: int) -> None:
        """Make room in the cache; double, so that copying stays rare."""
        if length > self.cache.capacity:
            self.cache.reserve(max(length, min(2 * self.cache.capacity, self.max_length)))


def limit_threads(threads: int | None = None) -> None:
    """Let torch use so many threads; None: no more than the processors that this process may use."""
    wanted = threads or min(torch.get_num_threads(), thread_count())
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def keep_memory(*, largest: int = 32 << 20, kept: int = 256 << 20) -> bool:
    """Let the C library hand out freed blocks again, up to so many bytes, instead of giving them back; say whether.

    The results of large products are as large as its limits: each would be fresh memory that the system first clears.
    """
    try:
        tell = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(tell(-3, largest) and tell(-1, kept))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


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
