"""How well a masked language model knows hidden tokens of real texts.

Every seventh token of a window is hidden, each window beginning one place later than the one before it: the same
tokens for every model of a tokenizer, without a draw.

    accuracy     share of hidden tokens that were the first choice
    perplexity   exp(- mean of the natural log-probabilities of the hidden tokens)

Shapes: T tokens of a window, V vocabulary, M hidden tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.evaluation.perplexity import log_softmax_at, perplexity
from lmworks.runtime.batching import run_features
from lmworks.runtime.predictor import Predictor
from lmworks.tasks.base import Feature
from lmworks.tasks.fill_mask import FillMask

EVERY = 7  # 14 % of the tokens: about what such a model was trained with
LONGEST = 256  # tokens of a window


def score_masked(predictor: Predictor, texts: Sequence[str]) -> tuple[dict[str, float], list[int]]:
    """Return accuracy and perplexity on the hidden tokens of texts, and the first choice for each of them.

    Raises InputError where the texts have nothing to hide.
    """
    assert isinstance(predictor.prepared, FillMask)
    features = hide(predictor.prepared, texts)
    pad = predictor.tokenizer.pad_id or 0
    found = run_features(predictor.runtime, features, output="logits", pad_id=pad, reduce=read_hidden)
    logprobs = np.concatenate([values[0] for values in found])
    said = np.concatenate([values[1] for values in found]).astype(int)
    known = np.concatenate([feature.notes["hidden"] for feature in features])
    return {"accuracy": float((said == known).mean()), "perplexity": perplexity(logprobs)}, said.tolist()


def hide(task: FillMask, texts: Sequence[str]) -> list[Feature]:
    """Return windows with some tokens hidden; notes: `rows` their places, `hidden` what they were, both (M,)."""
    features: list[Feature] = []
    longest = min(task.facts.max_length, LONGEST)
    for i, text in enumerate(texts):
        for window in task.tokenizer.encode_windows(text, length=longest, overlap=0):
            real = [place for place, special in enumerate(window.special_tokens_mask) if not special]
            rows = real[len(features) % min(EVERY, max(len(real), 1)) :: EVERY]
            if not rows:
                continue
            ids = list(window.ids)
            hidden = np.array([ids[row] for row in rows])
            for row in rows:
                ids[row] = task.mask_id
            inputs: dict[str, Any] = {"input_ids": ids}
            if task.facts.token_types:
                inputs["token_type_ids"] = list(window.type_ids)
            features.append(Feature(inputs, i, window, {"rows": rows, "hidden": hidden}))
    if not features:
        raise InputError("there is no token to hide", found=f"{len(texts)} texts", fix="give longer texts")
    return features


def read_hidden(feature: Feature, logits: NDArray[Any]) -> NDArray[Any]:
    """Return log-probabilities and first choices at the hidden places: logits (T, V) -> (2, M)."""
    rows = logits[feature.notes["rows"]]  # (M, V)
    return np.stack([log_softmax_at(rows, feature.notes["hidden"]), rows.argmax(-1).astype(np.float64)])
