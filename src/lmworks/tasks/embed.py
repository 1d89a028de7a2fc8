"""Vectors of texts: pooled hidden states, their similarity, and semantic search.

Shapes: N texts, T tokens of a feature, D hidden size, Q queries.

How a checkpoint wants its tokens pooled is written in the files of sentence-transformers (modules.json and the folders
that it names): `read_pooling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, read_value
from lmworks.base.types import Floats, Match
from lmworks.tasks.base import Facts, Feature, Long, one_of, to_feature, too_long
from lmworks.tokens.tokenizer import Tokenizer

Pooling = Literal["auto", "mean", "cls", "max", "last", "none"]
PUBLISHED: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
}  # sentence-transformers' names
FLAGS = {  # its older configs say each with a switch
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODULES = "modules.json"
SETTINGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # sentence_*_config.json
BLOCK = 4096  # vectors compared at a time


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint turns a text into one vector."""

    pooling: Pooling = "mean"
    normalize: bool = False  # to length 1
    max_length: int | None = None  # tokens; None is the model's own limit
    lower_case: bool = False
    prompt: str = ""  # what every text begins with


def read_pooling(folder: str | Path) -> Recipe | None:
    """Read the recipe of a sentence-transformers folder; None for a folder that has none.

    Raises InputError for a module or a pooling that is not supported: another vector would be a wrong one.
    """
    folder = Path(folder)
    if not (folder / MODULES).is_file():
        return None
    kinds, places = _modules(folder)
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _unsupported(folder / MODULES, " ".join(kinds), "Transformer, Pooling and at most Normalize")
    files = [places[0] / f"sentence_{name}_config.json" for name in SETTINGS]
    settings: dict[str, Any] = next((read_json(file) for file in files if file.is_file()), {})
    where = places[1] / "config.json"
    pooling = read_json(where)
    modes = pooling.get("pooling_mode") or [mode for flag, mode in FLAGS.items() if pooling.get(flag)] or "mean"
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or not isinstance(modes[0], str) or modes[0] not in PUBLISHED:
        raise _unsupported(where, " + ".join(map(str, modes)), "one of " + " ".join(PUBLISHED))
    path = folder / "config_sentence_transformers.json"
    prompts = read_json(path) if path.is_file() else {}
    named, default = prompts.get("prompts") or {}, prompts.get("default_prompt_name")
    prompt = (named.get(default) if isinstance(named, dict) and isinstance(default, str) else "") or ""
    if not isinstance(prompt, str):
        raise FormatError(f"{path.name}: a prompt is no text", where=str(path), found=str(prompt)[:100])
    if prompt and not pooling.get("include_prompt", True):
        raise _unsupported(where, "include_prompt: false", "a prompt that counts as text")
    length = settings.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise _unsupported(places[0] / "sentence_*_config.json", f"max_seq_length: {length!r}"[:100], "a whole number")
    return Recipe(
        PUBLISHED[modes[0]],
        normalize="Normalize" in kinds,
        max_length=length,
        lower_case=bool(settings.get("do_lower_case")),
        prompt=prompt,
    )


def _modules(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the last name of each module's class, and its folder."""
    path = folder / MODULES
    try:
        rows = read_value(path)
        kinds, places = [row["type"].rpartition(".")[2] for row in rows], [Path(row["path"]) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = "a list of modules, each with a type and a path"
        raise FormatError(f"{MODULES} cannot be used", where=str(path), found=repr(error), expected=expected) from None
    if any(place.is_absolute() or ".." in place.parts for place in places):
        raise FormatError(f"{MODULES} points outside its folder", where=str(path), found=" ".join(map(str, places)))
    return kinds, [folder / place for place in places]


def _unsupported(path: Path, found: str, expected: str) -> InputError:
    fix = 'choose a pooling yourself, e.g. pooling="mean": the vectors are then not those of sentence-transformers'
    return InputError(
        "this recipe for vectors is not supported", where=str(path), found=found, expected=expected, fix=fix
    )


class FeatureExtraction:
    """Turns texts into vectors."""

    name, output = "feature-extraction", "hidden_states"

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: Facts,
        *,
        pooling: Pooling = "auto",
        normalize: bool | None = None,
        long: Long = "error",
        recipe: Recipe | None = None,
    ) -> None:
        """Choose how to pool.

        "auto" follows the recipe (see `read_pooling`), or takes the mean where there is none; "cls" is the first token,
        "none" keeps a vector for each token. `normalize` brings vectors to length 1; None does what the recipe says. A
        text longer than the model (or the recipe's own limit, at which sentence-transformers cuts in silence) is an
        error, is cut, or is read in windows whose tokens are pooled together ("window": mean and max only). Raises
        InputError for an option that is unknown or does not go with the pooling.
        """
        one_of(pooling, get_args(Pooling), "pooling")
        one_of(long, get_args(Long), "choice for long")
        recipe = recipe or Recipe()
        self.tokenizer, self.facts, self.long, self.recipe = tokenizer, facts, long, recipe
        self.pooling = recipe.pooling if pooling == "auto" else pooling
        self.normalize = (recipe.normalize and self.pooling == recipe.pooling) if normalize is None else normalize
        self.length = min(facts.max_length, recipe.max_length or facts.max_length)
        if long == "window" and self.pooling not in ("mean", "max"):
            raise InputError(
                f'the pooling "{self.pooling}" does not work over windows',
                fix='choose long="truncate", or pooling="mean"',
            )

    def encode(self, examples: Sequence[str]) -> list[Feature]:
        """Return the feature of each text, or its windows; raise InputError where one is too long or has no tokens."""
        for index, text in enumerate(examples):
            if not isinstance(text, str):
                raise InputError("a text is needed", where=f"text {index + 1}", found=repr(text)[:80])
        texts = [self.recipe.prompt + text for text in examples]
        texts = [text.lower() for text in texts] if self.recipe.lower_case else texts
        features = []
        for index, encoding in enumerate(self.tokenizer.encode_inputs(texts)):
            if not len(encoding):
                raise InputError("a text has no tokens", where=f"text {index + 1}", found=repr(examples[index][:60]))
            windows = [encoding]
            if len(encoding) > self.length:
                if self.long == "error":
                    raise too_long(index, len(encoding), self.length)
                windows = self.tokenizer.encode_windows(texts[index], length=self.length, overlap=0)
                windows = windows[:1] if self.long == "truncate" else windows
            features += [to_feature(window, index, self.facts) for window in windows]
        return features

    def reduce(self, feature: Feature, output: NDArray[Any]) -> NDArray[Any]:
        """Return what `decode` needs of a feature's hidden states (T, D): their sum, maximum or one of them (D,).

        Hidden states of many texts fill the memory; a caller may reduce each batch when it has run. Reducing twice
        changes nothing.
        """
        if output.ndim == 1 or self.pooling == "none":
            return output
        if self.pooling == "mean":
            return np.asarray(output.sum(0, dtype=np.float64))
        if self.pooling == "max":
            return np.asarray(output.max(0))
        return np.array(output[0 if self.pooling == "cls" else -1])  # a copy: a view would keep all of it

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[str]
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Return the vectors of all texts, (N, D); with the pooling "none" a list of (T, D)."""
        pooled = [self.reduce(feature, output) for feature, output in zip(features, outputs, strict=True)]
        if self.pooling == "none":
            return [unit(rows) if self.normalize else np.asarray(rows, np.float32) for rows in pooled]
        parts: list[list[int]] = [[] for _ in examples]
        for place, feature in enumerate(features):
            parts[feature.example].append(place)
        vectors = np.zeros((len(examples), pooled[0].shape[-1] if pooled else 0))
        for row, places in enumerate(parts):
            if self.pooling == "mean":  # of all tokens of all windows
                vectors[row] = sum(pooled[p] for p in places) / sum(len(features[p]) for p in places)
            else:
                vectors[row] = np.max([pooled[p] for p in places], 0)
        return unit(vectors) if self.normalize else vectors.astype(np.float32)


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Return vectors (…, D) with the length 1; one of zeros stays as it is."""
    x = np.asarray(vectors, np.float32)
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12), np.float32)


def similarity(a: Floats, b: Floats) -> NDArray[np.float32]:
    """Return the cosines (N, M) of vectors (N, D) and (M, D). Raises InputError where they do not fit together."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(
            "these vectors cannot be compared", found=f"{a.shape} and {b.shape}", expected="(N, D) and (M, D)"
        )
    return unit(a) @ unit(b).T


def search(query_vectors: Floats, vectors: Floats, texts: Sequence[str], top_k: int = 5) -> list[list[Match]]:
    """Return the `top_k` texts nearest to each query by cosine, best first, equals by index.

    query_vectors (Q, D), vectors (N, D), one for each of N texts. Memory beside the arguments: Q × top_k results and
    one block of scores. Raises InputError where the sizes do not fit together.
    """
    if len(vectors) != len(texts):
        raise InputError("each text needs one vector", found=f"{len(vectors)} vectors, {len(texts)} texts")
    if top_k < 1:
        raise InputError("top_k must be at least 1", found=str(top_k))
    best = [(np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(query_vectors)  # scores and indices of each query
    for first in range(0, len(vectors), BLOCK):
        for start in range(0, len(query_vectors), 256):
            scores = similarity(query_vectors[start : start + 256], vectors[first : first + BLOCK])
            for query, row in enumerate(scores, start):
                known, indices = best[query]
                better = np.flatnonzero(row > known[-1]) if len(known) == top_k else np.arange(len(row))
                both = np.concatenate([known, row[better]])
                top = np.argsort(-both, kind="stable")[:top_k]  # stable: what came first has the lower index
                best[query] = both[top], np.concatenate([indices, first + better])[top]
    pairs = [zip(scores.tolist(), indices.tolist(), strict=True) for scores, indices in best]
    return [[Match(index, texts[index], score) for score, index in pair] for pair in pairs]
