"""What every task has in common: examples become features, features run in batches, outputs become answers.

    examples -> encode -> features -> (batches, any runtime) -> outputs, one a feature -> decode -> answers

Shapes: B batch, T tokens.

A long text may become several features (windows). A task never sees a batch or padding: `collate` pads, and what a
runtime returns is cut back to a feature's own length before `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.types import Batch

Long = Literal["error", "truncate", "window"]  # what to do with a text that is longer than the model


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a task must know about a model; read from config.json and the tokenizer's settings."""

    model_type: str
    max_length: int  # tokens of one input at most, special tokens included
    labels: tuple[str, ...] = ()  # by id
    problem_type: str | None = None  # "single_label_classification", "multi_label_classification", "regression"
    token_types: bool = False  # the model tells the two texts of a pair apart by token_type_ids


@dataclass
class Feature:
    """One row of a batch, and where it came from."""

    inputs: dict[str, Any]  # input_ids and token_type_ids: lists of T ids; pixel_values: an array
    example: int  # index of the example it belongs to
    encoding: Any = None  # the tokenizer's Encoding: offsets, word_ids, sequence_ids, special_tokens_mask
    notes: dict[str, Any] = field(default_factory=dict)  # what else the task wants to find again

    def __len__(self) -> int:
        return len(self.inputs["input_ids"]) if "input_ids" in self.inputs else 1


class Task(Protocol):
    """One kind of question that a model answers."""

    name: str  # the pipeline name: "text-classification", "token-classification" …
    output: str  # which of the runtime's arrays it reads: "logits" or "hidden_states"

    def encode(self, examples: Sequence[Any]) -> list[Feature]:
        """Return one or more features an example, in order. Raises InputError that says which example is wrong."""
        ...

    def decode(self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[Any]) -> Any:
        """Return one answer an example; outputs[i] belongs to features[i] and has its length, without padding."""
        ...


def to_feature(encoding: Any, example: int, facts: Facts) -> Feature:
    """Return the feature of a tokenizer's Encoding."""
    inputs = {"input_ids": list(encoding.ids)}
    if facts.token_types:
        inputs["token_type_ids"] = list(encoding.type_ids)
    return Feature(inputs, example, encoding)


def collate(features: Sequence[Feature], *, pad_id: int = 0) -> Batch:
    """Pad features to the longest, on the right: input_ids, attention_mask and token_type_ids (B, T) int64."""
    if "pixel_values" in features[0].inputs:
        return {"pixel_values": np.stack([feature.inputs["pixel_values"] for feature in features])}
    shape = (len(features), max(len(feature) for feature in features))
    batch = {name: np.zeros(shape, np.int64) for name in (*features[0].inputs, "attention_mask")}
    batch["input_ids"][:] = pad_id
    for row, feature in enumerate(features):
        for name, values in feature.inputs.items():
            batch[name][row, : len(values)] = values
        batch["attention_mask"][row, : len(feature)] = 1
    return batch


def too_long(example: int, tokens: int, max_length: int) -> InputError:
    """Return the error for a text that the model cannot read whole (B15: never cut in silence)."""
    return InputError(
        "a text is longer than the model",
        where=f"text {example + 1}",
        found=f"{tokens} tokens",
        expected=f"at most {max_length}, special tokens included",
        fix='shorten it, or choose long="truncate" or long="window" (on the command line: --long window)',
    )


def one_of(value: str, choices: Sequence[str], what: str) -> str:
    """Return the value if it is one of the choices; else raise InputError with the nearest of them."""
    if value not in choices:
        raise InputError(
            f"unknown {what}", found=f"{value!r}{did_you_mean(str(value), choices)}", expected=", ".join(choices)
        )
    return value


def softmax(x: NDArray[Any]) -> NDArray[np.float64]:
    """Return the probabilities of the last dimension."""
    y = np.exp(np.asarray(x, np.float64) - x.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = y / y.sum(-1, keepdims=True)
    return probabilities
