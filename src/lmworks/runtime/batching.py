"""From features to outputs: batches with little padding, answers in the order of the features.

Shapes: B rows of a batch, T tokens of its longest row, O outputs of a head, D hidden_size.

Texts of like length share a batch, the longest first, so that memory runs out at once or never. Which batch a text
falls in changes nothing but the last digits of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.types import Batch
from lmworks.runtime.trace import stage
from lmworks.tasks.base import Feature, collate

BATCH_TOKENS = 2048  # in a batch, padding included: larger ones are no faster on a processor
MAX_ROWS = 64
MOST_PADDING = 1 / 8  # of a batch's tokens
MOST_LEFT_OUT = 1 / 3  # the same, where the runtime does not compute it: larger batches, measured a tenth faster


Reduce = Callable[[Feature, NDArray[Any]], NDArray[Any]]


class Runs(Protocol):
    """The part of a runtime that is needed here."""

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]: ...


def run_features(
    runtime: Runs, features: Sequence[Feature], *, output: str, pad_id: int = 0,
    batch_tokens: int | None = None, max_rows: int = MAX_ROWS, reduce: Reduce | None = None,
) -> list[NDArray[Any]]:  # fmt: skip
    """Run features in batches; return one array each, in their order: (T, …) of its own length, or (O,) of a whole row.

    `output` names the runtime's array, "logits" or "hidden_states": of three dimensions (B, T, …) it holds something a
    token and is cut to each feature's length; of two (B, O), something a row. `reduce` makes each output small as soon
    as its batch has run: (T, vocabulary) of many texts would fill the memory. `batch_tokens` None: what the runtime
    is fastest with. Raises InputError where the model lacks `output`, FormatError where its numbers are not finite.
    """
    outputs: list[NDArray[Any]] = [np.empty(0)] * len(features)
    padding = MOST_LEFT_OUT if getattr(runtime, "leaves_padding_out", False) else MOST_PADDING
    preferred: int = getattr(runtime, "batch_tokens", BATCH_TOKENS)
    lengths = [len(feature) for feature in features]
    for rows in make_batches(lengths, batch_tokens=batch_tokens or preferred, max_rows=max_rows, padding=padding):
        with stage("batch"):
            batch = collate([features[row] for row in rows], pad_id=pad_id)
        with stage("forward"):
            found = runtime.run(batch)
        if output not in found:
            raise InputError(
                f"this model gives no {output}",
                found=", ".join(found),
                fix="choose the task that the model was made for",
            )
        for row, array in zip(rows, found[output], strict=True):
            per_token = array.ndim == 2 and "input_ids" in features[row].inputs
            array = array[: len(features[row])] if per_token else array
            if not np.isfinite(array).all():
                raise FormatError(
                    "the model's answers are not numbers",
                    where=find_broken(runtime),
                    found="NaN or infinity",
                    fix="fetch or train the model again",
                )
            with stage("post-process"):
                outputs[row] = array if reduce is None else reduce(features[row], array)
    return outputs


def find_broken(runtime: Any) -> str:
    """Say which weights of a runtime are not finite, where it can tell."""
    names: list[str] = getattr(runtime, "list_broken", list)()
    return ", ".join([f"model.safetensors, as {runtime.name} runs it in {runtime.dtype}", *names[:4]])


def make_batches(
    lengths: Sequence[int], *, batch_tokens: int, max_rows: int, padding: float = MOST_PADDING
) -> Iterator[list[int]]:
    """Yield the rows of each batch, longest first: at most `max_rows`, `batch_tokens` with padding, little padding.

    [3, 9, 3] -> [1], [0, 2]. A row longer than `batch_tokens` is a batch of its own.
    """
    batch: list[int] = []
    real = 0  # tokens of the batch without padding
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch:
            padded = (len(batch) + 1) * lengths[batch[0]]
            wasteful = padded - real - lengths[row] > padding * padded
            if len(batch) == max_rows or padded > batch_tokens or wasteful:
                yield batch
                batch, real = [], 0
        batch.append(row)
        real += lengths[row]
    if batch:
        yield batch
