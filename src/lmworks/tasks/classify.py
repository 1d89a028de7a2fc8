"""text-classification: which of the model's labels a text, or a pair of texts, deserves.

    "a fine film"  or  ("a question", "an answer")  ->  [Label("positive", 0.98), Label("negative", 0.02)]

Shapes: T tokens of an input, L labels; logits (L,) for each input.

A text that is longer than the model (`long`):

- "error" says so;
- "truncate" cuts it at the end, a pair where it is longer, and keeps the special tokens;
- "window" reads all of it in windows that share `overlap` tokens. The scores of the windows are averaged, each
  weighted by the tokens that no window before it has read. A pair repeats its first text in every window, so the first
  text must leave room for some of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.types import Label
from lmworks.tasks.base import Facts, Feature, Long, one_of, softmax, to_feature, too_long
from lmworks.tokens.tokenizer import Tokenizer, repair

Scores = Literal["auto", "softmax", "sigmoid", "none"]
Text = str | tuple[str, str]
OVERLAP = 128  # tokens that neighbouring windows share, where a quarter of the model's length is not less


class TextClassification:
    """Labels with scores, the highest first."""

    name = "text-classification"
    output = "logits"

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: Facts,
        *,
        top_k: int | None = None,
        scores: Scores = "auto",
        long: Long = "error",
        overlap: int | None = None,
    ) -> None:
        """Prepare for one model.

        `top_k`: how many labels to return, all where it is None. `scores`: "softmax", "sigmoid", "none" (the model's
        raw numbers), or "auto": what the model was trained for. `overlap`: tokens that windows share; by default 128,
        or a quarter of the model's length, or half of the room that the first text of a pair leaves.
        """
        self.tokenizer, self.facts = tokenizer, facts
        self.overlap, self.fixed = choose_overlap(overlap, facts), overlap is not None
        self.top_k, self.scores = check_top_k(top_k), one_of(scores, get_args(Scores), "kind of scores")
        self.long = one_of(long, get_args(Long), "way with long texts")

    def encode(self, examples: Sequence[Any]) -> list[Feature]:
        """Return the features of texts or pairs; raise InputError for what is neither, or too long."""
        texts = [as_text(example, place) for place, example in enumerate(examples)]
        encodings = self.tokenizer.encode_inputs(texts) if texts else []
        features = []
        for place, (text, whole) in enumerate(zip(texts, encodings, strict=True)):
            if not whole.ids:
                raise InputError("a text is empty, and this model reads no special tokens", where=f"text {place + 1}")
            if len(whole.ids) <= self.facts.max_length:
                features.append(to_feature(whole, place, self.facts))
            elif self.long == "error":
                raise too_long(place, len(whole.ids), self.facts.max_length)
            elif self.long == "truncate":
                features.append(to_feature(self._cut(text), place, self.facts))
            else:
                features += self._windows(text, place, whole)
        return features

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[Any]
    ) -> list[list[Label]]:
        """Return the labels of each example by falling score; outputs: logits (L,)."""
        sums: list[Any] = [0.0] * len(examples)
        weights = [0] * len(examples)
        for feature, logits in zip(features, outputs, strict=True):
            weight = feature.notes.get("new_tokens", 1)
            sums[feature.example] += weight * to_scores(logits, self.facts, self.scores)
            weights[feature.example] += weight
        return [rank(total / weight, self.facts, self.top_k) for total, weight in zip(sums, weights, strict=True)]

    def _cut(self, text: Text) -> Any:
        """Encode a text cut to the model's length; of a pair, the longer text gives way first."""
        backend, texts = self.tokenizer.backend, [text] if isinstance(text, str) else list(text)
        parts = [backend.encode(repair(part), add_special_tokens=False) for part in texts]
        room = max(0, self.facts.max_length - backend.num_special_tokens_to_add(len(parts) == 2))
        short, *longer = sorted(parts, key=len)  # stable: of two equal texts the second keeps the odd token
        if longer:
            short.truncate(min(len(short), room // 2))
            longer[0].truncate(room - len(short))
        else:
            short.truncate(room)
        return backend.post_process(*parts)

    def _windows(self, text: Text, place: int, whole: Any) -> list[Feature]:
        before, rest = (None, text) if isinstance(text, str) else text
        own = 0 if before is None else 1  # the part of the input that is cut into windows
        room = self.facts.max_length - len(whole.ids) + whole.sequence_ids.count(own)
        overlap = self.overlap if self.fixed else min(self.overlap, max(0, room) // 2)
        windows = self.tokenizer.encode_windows(rest, before=before, length=self.facts.max_length, overlap=overlap)
        features = [to_feature(window, place, self.facts) for window in windows]
        for number, feature in enumerate(features):
            shared = overlap if number else 0
            feature.notes["new_tokens"] = feature.encoding.sequence_ids.count(own) - shared
        return features


def choose_overlap(overlap: int | None, facts: Facts) -> int:
    """Return how many tokens neighbouring windows share; InputError where it is not a number from 0 up."""
    if overlap is None:
        return min(OVERLAP, facts.max_length // 4)
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
        raise InputError("overlap is how many tokens windows share", found=repr(overlap), expected="0 or more")
    return overlap


def as_text(example: Any, place: int) -> Text:
    """Return the example as a string or a tuple of two; raise InputError with its number where it is neither."""
    if isinstance(example, str):
        return example
    if isinstance(example, (tuple, list)) and len(example) == 2 and all(isinstance(part, str) for part in example):
        return example[0], example[1]
    raise InputError(
        "an example is not a text",
        where=f"text {place + 1}",
        found=f"{type(example).__name__}: {example!r}"[:100],
        expected="a string, or a pair of two strings",
    )


def check_top_k(top_k: int | None) -> int | None:
    """Return it; raise InputError where it is neither None nor a number from 1 up."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError("top_k is how many labels to return", found=repr(top_k), expected="1 or more, or None for all")
    return top_k


def to_scores(logits: NDArray[Any], facts: Facts, scores: str) -> NDArray[np.float64]:
    """Turn logits (L,) into scores (L,), by default as transformers does.

    A regression keeps its numbers; several labels that may hold at once, or a single one, go through the sigmoid;
    labels that exclude each other through the softmax.
    """
    raw = check_logits(logits, facts)
    if scores == "auto":
        single = len(raw) == 1 or facts.problem_type == "multi_label_classification"
        scores = "none" if facts.problem_type == "regression" else "sigmoid" if single else "softmax"
    if scores == "softmax":
        return softmax(raw)
    return 0.5 * (1 + np.tanh(raw / 2)) if scores == "sigmoid" else raw


def check_logits(logits: NDArray[Any], facts: Facts) -> NDArray[np.float64]:
    """Return logits (…, L); raise FormatError where they are not numbers, or not one for each label."""
    if logits.shape[-1] != len(facts.labels):
        raise FormatError(
            "the model and its configuration disagree about the labels",
            found=f"{logits.shape[-1]} numbers from the model",
            expected=f"{len(facts.labels)}, the labels in config.json",
        )
    if not np.isfinite(logits).all():
        raise FormatError("the model's answer is not a number", fix="check its weights, or run it in float32")
    return np.asarray(logits, np.float64)


def rank(scores: NDArray[np.float64], facts: Facts, top_k: int | None) -> list[Label]:
    """Return the labels of scores (L,), the highest first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Label(facts.labels[place], float(scores[place])) for place in order]
