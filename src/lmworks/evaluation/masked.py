"""How well a masked language model knows hidden tokens of real texts.

Every seventh token of a window is hidden, each window beginning one place later than the one before it: the same
tokens for every model of a tokenizer, without a draw.

    accuracy            share of hidden tokens that were the first choice
    perplexity          exp(- mean of the natural log-probabilities of the hidden tokens)
    pseudo-perplexity   the same of tokens that are hidden one by one, all others in sight (Salazar et al. 2020)

Shapes: T tokens of a window, V vocabulary, M hidden tokens of a window, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.evaluation.perplexity import log_softmax_at, perplexity
from lmworks.evaluation.significance import Float64, Statistic, bootstrap_all
from lmworks.runtime.batching import run_features
from lmworks.runtime.predictor import Predictor
from lmworks.tasks.base import Feature
from lmworks.tasks.fill_mask import FillMask

EVERY = 7  # 14 % of the tokens: about what such a model was trained with
LONGEST = 256  # tokens of a window
MEASURES: dict[str, Statistic] = {  # of sums of nats, right choices, tokens
    "accuracy": lambda sums: sums[..., 1] / sums[..., 2],
    "perplexity": lambda sums: np.exp(np.minimum(sums[..., 0] / sums[..., 2], 700)),
}


def score_masked(predictor: Predictor, texts: Sequence[str]) -> tuple[dict[str, float], list[int]]:
    """Return accuracy and perplexity on the hidden tokens of texts, and the first choice for each of them.

    Raises InputError where the texts have nothing to hide.
    """
    features, found = run_hidden(predictor, texts)
    logprobs = np.concatenate([values[0] for values in found])
    said = np.concatenate([values[1] for values in found]).astype(int)
    known = np.concatenate([feature.notes["hidden"] for feature in features])
    return {"accuracy": float((said == known).mean()), "perplexity": perplexity(logprobs)}, said.tolist()


def run_hidden(
    predictor: Predictor, texts: Sequence[str], *, start: int = 0
) -> tuple[list[Feature], list[NDArray[Any]]]:
    """Hide tokens and run the model; return the windows, and for each log-probabilities and first choices (2, M)."""
    assert isinstance(predictor.prepared, FillMask)
    features = hide(predictor.prepared, texts, start=start)
    return features, run(predictor, features)


def run(predictor: Predictor, features: Sequence[Feature]) -> list[NDArray[Any]]:
    """Return log-probabilities and first choices (2, M) of each window."""
    pad = predictor.tokenizer.pad_id or 0
    return run_features(predictor.runtime, features, output="logits", pad_id=pad, reduce=read_hidden)


def score_hidden(predictor: Predictor, texts: Sequence[str], *, start: int = 0) -> Float64:
    """Return what the hidden tokens of each window cost, how many were the first choice, and how many there are (W, 3).

    `start` windows have gone before: which tokens are hidden does not depend on how texts are grouped.
    """
    features, found = run_hidden(predictor, texts, start=start)
    pairs = zip(features, found, strict=True)
    return np.array([[-v[0].sum(), (v[1] == f.notes["hidden"]).sum(), len(v[0])] for f, v in pairs], np.float64)


def summarise(parts: Sequence[Float64]) -> dict[str, Any]:
    """Return accuracy and perplexity of windows (W, 3) in several parts, with their intervals."""
    sums = np.concatenate(parts)
    if not len(sums):
        raise InputError("there is no token to hide", fix="give longer texts")
    values: dict[str, Any] = {name: float(measure(sums.sum(0)[None])[0]) for name, measure in MEASURES.items()}
    spans = bootstrap_all(sums, MEASURES) if len(sums) > 1 else {}
    found = {name: list(span) for name, span in spans.items()}
    return {**values, "hidden_tokens": int(sums[:, 2].sum()), "intervals": found}


def pseudo_perplexity(predictor: Predictor, texts: Sequence[str], *, most: int) -> dict[str, Any]:
    """Return the perplexity of tokens that are hidden one by one: evenly chosen ones, about `most` of them."""
    assert isinstance(predictor.prepared, FillMask)
    task = predictor.prepared
    windows = list(cut(task, texts))
    total = sum(len(real) for _, _, real in windows)
    skip, before, features = max(1, total // most), 0, []
    for i, window, real in windows:
        chosen = [place for number, place in enumerate(real, before) if number % skip == 0]
        features += [hide_in(task, i, window, [place]) for place in chosen]
        before += len(real)
    logprobs = np.concatenate([values[0] for values in run(predictor, features)])
    return {"pseudo_perplexity": perplexity(logprobs), "pseudo_tokens": len(logprobs)}


def cut(task: FillMask, texts: Sequence[str]) -> Iterator[tuple[int, Any, list[int]]]:
    """Yield the windows of texts, each with the number of its text and the places of its own tokens."""
    longest = min(task.facts.max_length, LONGEST)
    for i, text in enumerate(texts):
        for window in task.tokenizer.encode_windows(text, length=longest, overlap=0):
            yield i, window, [place for place, special in enumerate(window.special_tokens_mask) if not special]


def hide_in(task: FillMask, text: int, window: Any, rows: Sequence[int]) -> Feature:
    """Return a window with the tokens at these places hidden; notes: `rows` and what was there, `hidden`, both (M,)."""
    ids = list(window.ids)
    hidden = np.array([ids[row] for row in rows])
    for row in rows:
        ids[row] = task.mask_id
    inputs: dict[str, Any] = {"input_ids": ids}
    if task.facts.token_types:
        inputs["token_type_ids"] = list(window.type_ids)
    return Feature(inputs, text, window, {"rows": list(rows), "hidden": hidden})


def hide(task: FillMask, texts: Sequence[str], *, start: int = 0) -> list[Feature]:
    """Return windows with some tokens hidden; InputError where there is none to hide."""
    features: list[Feature] = []
    for i, window, real in cut(task, texts):
        rows = real[(start + len(features)) % min(EVERY, max(len(real), 1)) :: EVERY]
        if rows:
            features.append(hide_in(task, i, window, rows))
    if not features:
        raise InputError("there is no token to hide", found=f"{len(texts)} texts", fix="give longer texts")
    return features


def read_hidden(feature: Feature, logits: NDArray[Any]) -> NDArray[Any]:
    """Return log-probabilities and first choices at the hidden places: logits (T, V) -> (2, M)."""
    rows = logits[feature.notes["rows"]]  # (M, V)
    return np.stack([log_softmax_at(rows, feature.notes["hidden"]), rows.argmax(-1).astype(np.float64)])
