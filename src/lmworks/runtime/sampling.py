"""From logits to the next token: repeat penalty, temperature, top-k, top-p, then one draw.

Shapes: V vocabulary. The order and the formulas are those of transformers' logits processors, so that the same settings
mean the same distribution:

    penalty      l < 0 ? l * r : l / r  for tokens of the last n positions     (CTRL, Keskar et al. 2019, section 4.1)
    temperature  l / t                  (t <= 0: no draw, the largest logit wins)
    top-k        the k largest stay     (ties with the k-th stay too)
    top-p        the smallest set of largest tokens whose probability reaches p   (Holtzman et al. 2020, section 3.1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the default is greedy. A value out of its range is an InputError."""

    temperature: float = 0.0  # <= 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # positions that the penalty looks back; 0: off, -1: all
    seed: int | None = None  # None: different each time

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", math.isfinite(self.temperature), "a finite number (0 or less: greedy)"),
            ("top_k", is_whole(self.top_k) and self.top_k >= 0, "a whole number from 0 (off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("repeat_penalty", 0 < self.repeat_penalty < math.inf, "a finite number above 0 (1: off)"),
            ("repeat_last_n", is_whole(self.repeat_last_n) and self.repeat_last_n >= -1, "-1 (all), 0 (off) or more"),
            ("seed", self.seed is None or (is_whole(self.seed) and self.seed >= 0), "a whole number from 0"),
        )
        for name, valid, expected in ranges:
            if not valid:
                raise InputError(f"{name} is out of range", found=str(getattr(self, name)), expected=expected)

    def make_rng(self) -> np.random.Generator:
        """Return the generator that `choose` draws from: the same seed gives the same text."""
        return np.random.default_rng(self.seed)


def is_whole(value: object) -> bool:
    """Say whether `value` is an integer and not a boolean."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def choose(logits: Logits, history: Sequence[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose the next token from logits (V,); `history` is every token so far, the prompt's included."""
    scores = penalize(logits.astype(np.float64), history, sampling)  # (V,)
    if not math.isfinite(scores.max()):  # a single NaN makes the maximum NaN
        raise FormatError("the model's logits are not finite", where="model.safetensors, or the graph in onnx/",
                          found="NaN or infinity", fix="fetch or train the model again")  # fmt: skip
    if sampling.temperature <= 0:
        return int(scores.argmax())
    tokens, probabilities = distribution(scores, sampling)
    order = tokens.argsort()  # by number: in the order of the scores a rounding error may swap two tokens
    cumulative = probabilities[order].cumsum()
    drawn = int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))
    return int(tokens[order[min(drawn, len(tokens) - 1)]])


def penalize(scores: Logits, history: Sequence[int], sampling: Sampling) -> Logits:
    """Make the tokens of the last `repeat_last_n` positions less likely, each once: (V,) -> (V,)."""
    window = history if sampling.repeat_last_n < 0 else history[max(0, len(history) - sampling.repeat_last_n) :]
    if sampling.repeat_penalty == 1 or not window:
        return scores
    seen = np.unique(np.asarray(window))  # (U,)
    scores = scores.copy()
    scores[seen] *= np.where(scores[seen] < 0, sampling.repeat_penalty, 1 / sampling.repeat_penalty)
    return scores


def distribution(scores: Logits, sampling: Sampling) -> tuple[NDArray[np.intp], Logits]:
    """Return the tokens that may be drawn, most likely first, and their probabilities, which sum to one."""
    scores = (scores - scores.max()) / sampling.temperature  # (V,), at most 0: no overflow at any temperature
    tokens = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        kth = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        tokens = tokens[scores >= kth]
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    weights = np.exp(scores[tokens])
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        before = probabilities.cumsum() - probabilities  # the mass of the more likely tokens
        tokens, probabilities = tokens[before < sampling.top_p], probabilities[before < sampling.top_p]
        probabilities = probabilities / probabilities.sum()
    return tokens, probabilities
