"""Labelled examples as a predictor takes them: texts, pairs, pictures. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = 40  # of a text with a hidden word


def plain_examples(task: str, examples: Sequence[Any], *, mask: str = "") -> list[Any]:
    """Return examples without labels: the words of a sentence as one text, the first text of a pair.

    For fill-mask the middle one of a text's first words is `mask`: ("a big red dog", "[MASK]") -> "a big [MASK] dog".
    """
    if task == "token-classification":
        return [" ".join(words) for words in examples]
    if task == "feature-extraction":
        return [one if isinstance(one, str) else one[0] for one in examples]
    if task == "fill-mask":
        return [hide_word(text, mask) for text in examples if text.strip()]
    return list(examples)


def hide_word(text: str, mask: str) -> str:
    """Return the first words of a text with the middle one hidden."""
    words = text.split()[:WORDS]
    words[len(words) // 2] = mask
    return " ".join(words)
