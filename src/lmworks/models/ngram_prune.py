"""Smaller n-gram models: take n-grams out, and let their contexts' weights make up for it.

What is left keeps its probabilities; each context's weight becomes what they leave over what the shorter context gives
to all others. An n-gram stays while a longer one begins or ends with it.

    relative entropy of taking (h, w) out (Stolcke 1998):
    − p(h) { p(w|h) [log p(w|h′) + log α′(h) − log p(w|h)] + [log α′(h) − log α(h)] · β(h) }

α(h) is a context's weight, β(h) the probability of all that was not seen after it, α′ and β′ those after the removal.

Shapes: G n-grams of an order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.models.ngram import PLAIN, NgramModel
from lmworks.models.ngram_counts import Float64, Int64
from lmworks.models.ngram_smoothing import Level

Mask = NDArray[np.bool_]
LEAST = 1e-12  # below this a remainder is rounding


def keep(model: NgramModel, wanted: Sequence[Mask]) -> NgramModel:
    """Return the model with only the n-grams of `wanted`, a mask (G,) for each order from 2 up, and what they need."""
    check(model)
    masks, ends = [mask.copy() for mask in wanted], suffixes(model)
    for k in range(len(masks) - 1, 0, -1):
        left = model.levels[k].keys[masks[k]]
        masks[k - 1][left // model.vocab_size] = True
        masks[k - 1][ends[k][masks[k]]] = True
    levels, lower = [], np.exp(model.unigrams)
    place = np.arange(model.vocab_size)  # where the n-grams of the order below are now
    kept = np.ones(model.vocab_size, np.bool_)
    for level, mask, suffix in zip(model.levels, masks, ends, strict=True):
        p = np.exp(level.logprobs)  # (G,)
        context = (level.keys // model.vocab_size)[mask]
        size = len(level.backoff)
        held = np.bincount(context, p[mask], minlength=size)  # (G below,)
        below = np.bincount(context, lower[suffix[mask]], minlength=size)
        weights = np.log(np.maximum(1 - held, LEAST) / np.maximum(1 - below, LEAST))
        weights[np.bincount(context, minlength=size) == 0] = 0.0
        keys = place[context] * model.vocab_size + (level.keys % model.vocab_size)[mask]
        levels.append(Level(keys, level.logprobs[mask], weights[kept]))
        place, kept, lower = np.cumsum(mask) - 1, mask, p
    while levels and not len(levels[-1].keys):
        levels.pop()
    return replace(model, levels=tuple(levels))


def prune(model: NgramModel, threshold: float) -> NgramModel:
    """Take out the n-grams whose loss raises perplexity by less than this share, from the longest down."""
    check(model)
    ends, chances = suffixes(model), [model.unigrams]
    for level in model.levels[:-1]:
        chances.append(chances[-1][level.keys // model.vocab_size] + level.logprobs)  # (G,) log p of a whole n-gram
    masks: list[Mask] = [np.ones(len(level.keys), np.bool_) for level in model.levels]
    needed = np.zeros(len(masks[-1]), np.bool_)
    for k in range(len(masks) - 1, -1, -1):
        level, suffix = model.levels[k], ends[k]
        lower = np.exp(model.unigrams if k == 0 else model.levels[k - 1].logprobs)
        masks[k] = needed | (losses(level, lower[suffix], chances[k], model.vocab_size) >= threshold)
        if k:
            needed = np.zeros(len(masks[k - 1]), np.bool_)
            needed[(level.keys // model.vocab_size)[masks[k]]] = True
            needed[suffix[masks[k]]] = True
    return keep(model, masks)


def losses(level: Level, lower: Float64, chance: Float64, vocab_size: int) -> Float64:
    """Return the share by which perplexity rises without each n-gram: (G,).

    `lower` (G,) is p(w | h′), `chance` (G below,) log p(h).
    """
    context, p = level.keys // vocab_size, np.exp(level.logprobs)  # (G,)
    size = len(level.backoff)
    left = np.maximum(1 - np.bincount(context, p, minlength=size), LEAST)[context]  # (G,) β(h)
    others = np.maximum(1 - np.bincount(context, lower, minlength=size), LEAST)[context]  # (G,)
    weight = np.log(left + p) - np.log(others + lower)  # (G,) log α′(h)
    apart = p * (np.log(lower) + weight - level.logprobs) + (weight - np.log(left / others)) * left
    with np.errstate(over="ignore"):
        rise: Float64 = np.expm1(-np.exp(chance[context]) * apart)
    return rise


def suffixes(model: NgramModel) -> list[Int64]:
    """Return the number of every n-gram without its first token, for each order from 2 up: (G,) each.

    Raises InputError where a model that was read lacks one.
    """
    found: list[Int64] = []
    for k, level in enumerate(model.levels):
        context, token = np.divmod(level.keys, model.vocab_size)
        if k == 0:
            found.append(token)
            continue
        wanted = found[-1][context] * model.vocab_size + token
        shorter = model.levels[k - 1].keys
        place = np.minimum(np.searchsorted(shorter, wanted), max(len(shorter) - 1, 0))
        if not (shorter[place] == wanted).all():
            raise InputError("this model cannot be pruned further: it lacks n-grams that end its longer ones",
                             found=f"{int((shorter[place] != wanted).sum())} of order {k + 2}")  # fmt: skip
        found.append(place)
    return found


def check(model: NgramModel) -> None:
    """Raise InputError for a smoothing that does not back off."""
    if model.smoothing in PLAIN:
        raise InputError(f"{model.smoothing} cannot be pruned: it does not look at shorter contexts",
                         fix="take good-turing, kneser-ney or modified-kneser-ney")  # fmt: skip
