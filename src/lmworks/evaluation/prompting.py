"""Classify by what a language model would say next: each label's words are scored as the end of a prompt.

    score(label) = sum of log p(token | prompt, tokens before) over the tokens of its words

A template such as "Review: {text}\\nFeeling: {label}" is filled in for each example that is shown, and for the text
asked about up to where its label would stand. Shown examples change which label comes easily whatever the text is:
calibration divides the probabilities by those after texts without content (Zhao et al. 2021).

Shapes: N texts, L labels, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.runtime.base import Runtime
from lmworks.runtime.batching import run_features
from lmworks.tasks.base import Feature, softmax
from lmworks.tokens.tokenizer import Tokenizer

TEXT, SECOND, LABEL = "{text}", "{text2}", "{label}"
BETWEEN = "\n\n"  # examples
NO_CONTENT = ("N/A", "[MASK]", "")
Scores = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How a language model is asked for labels.

    Parameters
    ----------
    template
        Ask for a label: holds {text} (and {text2}), ends with {label}; \\n is a new line.
    words
        What the model says for each label: "0=bad,1=good"; by default the labels themselves.
    train
        Labelled data with examples to show in the prompt.
    shots
        Examples of each label that are shown.
    draws
        Choices of the examples, for a spread.
    calibrate
        Divide by what the model says of texts without content.
    per_token
        Compare the mean over the tokens of a label's words, not the sum.
    seed
        Decides which examples are shown, and their order.
    """

    template: str | None = None
    words: str | None = None
    train: Path | None = None
    shots: int = 0
    draws: int = 1
    calibrate: bool = False
    per_token: bool = False
    seed: int = 0


def check_template(template: str) -> str:
    """Return a template that holds {text} and ends with {label}, new lines put in; raise InputError for another."""
    template = template.replace("\\n", "\n")
    if TEXT not in template or template.count(LABEL) != 1 or not template.endswith(LABEL):
        raise InputError(
            "this template cannot be used", found=repr(template)[:120],
            expected="one that holds {text} and ends with {label}",
            fix="--template 'Review: {text}\\nFeeling: {label}'",
        )  # fmt: skip
    return template


def read_words(text: str | None, labels: Sequence[str]) -> dict[str, str]:
    """Return what the model should say for each label: "0=bad,1=good", or the labels themselves for None."""
    words = {label: label for label in labels}
    for part in [] if text is None else text.split(","):
        label, sign, word = part.partition("=")
        if label.strip() not in words or not sign or not word.strip():
            raise InputError("--words cannot be read", found=repr(part), expected='"label=words", with commas between',
                             fix=f"the labels are {', '.join(labels)}")  # fmt: skip
        words[label.strip()] = word.strip()
    if len(set(words.values())) < len(words):
        raise InputError("two labels have the same words", found=str(words))
    return words


def fill(template: str, example: Any, label: str = "") -> str:
    """Return the template with a text, or a pair, and the words of a label."""
    first, second = example if isinstance(example, tuple) else (example, "")
    ends = template.removesuffix(LABEL)
    parts = ends.replace(SECOND, "\0").split(TEXT)  # a text may hold braces of its own
    filled: str = first.join(parts).replace("\0", second)
    return filled + label


def make_prompts(
    template: str, shown: Sequence[Any], labels: Sequence[str], words: Mapping[str, str], texts: Sequence[Any]
) -> list[str]:
    """Return the prompt of each text: the shown examples with the words of their labels, then the text."""
    before = [fill(template, example, words[label]) for example, label in zip(shown, labels, strict=True)]
    return [BETWEEN.join([*before, fill(template, text)]) for text in texts]


def score_labels(
    runtime: Runtime, tokenizer: Tokenizer, prompts: Sequence[str], words: Sequence[str], *, per_token: bool = False
) -> Scores:
    """Return the log-likelihood of each of L words after each of N prompts, (N, L); with `per_token` its mean.

    Scored is what follows the tokens that the prompt and all its continuations begin with. Raises InputError for a
    prompt that is longer than the model.
    """
    features: list[Feature] = []
    for i, prompt in enumerate(prompts):
        wholes = [tokenizer.encode_prompt(prompt + word) for word in words]
        start = common(tokenizer.encode_prompt(prompt), *wholes)
        if start == 0:
            raise InputError(
                "nothing comes before the label", where=f"text {i + 1}", fix="begin the template with a word"
            )
        longest = max(map(len, wholes)) - 1
        if longest > runtime.max_length:
            raise InputError(
                "a prompt is longer than the model", where=f"text {i + 1}", found=f"{longest} tokens",
                expected=f"at most {runtime.max_length}", fix="fewer --shots, a shorter --template, or shorter texts",
            )  # fmt: skip
        inputs: dict[tuple[int, ...], Feature] = {}  # words of one token share what comes before them
        for label, whole in enumerate(wholes):
            feature = inputs.setdefault(tuple(whole[:-1]), Feature({"input_ids": whole[:-1]}, i))
            feature.notes.setdefault("ends", []).append((label, start, whole[start:]))
        features += inputs.values()
    found = run_features(runtime, features, output="logits", pad_id=tokenizer.pad_id or 0, reduce=read_ends)
    scores = np.zeros((len(prompts), len(words)))
    for feature, values in zip(features, found, strict=True):
        for (label, _, end), value in zip(feature.notes["ends"], values, strict=True):
            scores[feature.example, label] = value / (len(end) if per_token else 1)
    return scores


def read_ends(feature: Feature, logits: NDArray[Any]) -> Scores:
    """Return the log-likelihood of each end of a feature, from its logits (T, V)."""
    values = []
    for _, start, end in feature.notes["ends"]:
        rows = logits[start - 1 : start - 1 + len(end)].astype(np.float64)  # (tokens of the end, V)
        top = rows.max(-1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(-1))
        values.append(float((rows[np.arange(len(end)), end] - total).sum()))
    return np.array(values)


def common(*rows: Sequence[int]) -> int:
    """Return how many tokens all rows begin with; an end keeps at least one of its own."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in same), min(map(len, rows[1:])) - 1)


def calibrate(scores: Scores, without_content: Scores) -> Scores:
    """Return scores (N, L) less what each label has without content: those after texts that say nothing (M, L)."""
    usual = np.log(np.mean([softmax(row) for row in without_content], axis=0))
    calibrated: Scores = scores - usual
    return calibrated
