"""The few types that cross layers.

Batch: arrays by name, each (B, …): input_ids and attention_mask (B, T) int64, …
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
