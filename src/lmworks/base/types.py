"""The few types that cross layers.

Batch: arrays by name, each (B, …): input_ids, attention_mask and token_type_ids (B, T) int64, pixel_values float32 …
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Batch = dict[str, NDArray[Any]]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Generation:
    """What a model wrote: the text after the prompt, its tokens, the speed without the first token."""

    text: str
    tokens: list[int] = field(default_factory=list)
    tokens_per_second: float | None = None
    finish_reason: Literal["stop", "length"] = "length"


@dataclass(frozen=True)
class Label:
    """A class and how likely it is: {"label": "positive", "score": 0.998}."""

    label: str
    score: float


@dataclass(frozen=True)
class TokenLabel:
    """What a token was tagged as; `attends` is false for special tokens, which no entity contains."""

    token: str
    label: str
    score: float
    attends: bool
    start: int  # characters of the text: text[start:end]
    end: int


@dataclass(frozen=True)
class Entity:
    """A span of a text that names something: text[start:end] (characters); `word` is how the tokenizer spells it."""

    label: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """A span of a context, context[start:end] (characters); "" with start = end = 0 where the model finds none."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Fill:
    """A token for a mask: how it is written, its id, its probability, and the text with the mask filled in."""

    token_str: str
    token: int
    score: float
    sequence: str


@dataclass(frozen=True)
class Match:
    """A text that was found: its place in the collection, the text, and its cosine similarity to the query."""

    index: int
    text: str
    score: float
