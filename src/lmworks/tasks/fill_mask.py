"""Fill in the blanks: the likeliest tokens for each mask in a text.

Shapes: T tokens, V words of the vocabulary, M masks of a feature, K best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.types import Fill
from lmworks.tasks.base import Facts, Feature, Long, one_of, softmax, too_long
from lmworks.tokens.tokenizer import Tokenizer

SPELLINGS = ("[MASK]", "<mask>", "<|mask|>", "[mask]", "<MASK>", "___")  # what people write for a mask


class FillMask:
    """Fills the masks of texts; each text holds the tokenizer's mask token once or more."""

    name, output = "fill-mask", "logits"

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: Facts,
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        long: Long = "error",
    ) -> None:
        """Choose what to fill in.

        `top_k` tokens for each mask, out of `targets` where they are given; probabilities stay those of the whole
        vocabulary. A target is one token: spelled as in the vocabulary, or a word that encodes to one token. A text
        longer than the model is an error, is cut at its end ("truncate"; never at a mask), or is read in a window
        around each mask ("window"). Raises InputError for an unknown option, an unknown target, or no mask token.
        """
        self.tokenizer, self.facts = tokenizer, facts
        self.long = one_of(long, get_args(Long), "choice for long")
        mask_id = tokenizer.find("mask_token", "[MASK]")
        mask_id = tokenizer.backend.token_to_id("<mask>") if mask_id is None else mask_id
        if mask_id is None:
            raise InputError(
                "this model's tokenizer has no mask token", fix="use a masked language model, such as BERT"
            )
        self.mask_id, self.mask = mask_id, str(tokenizer.token(mask_id))
        self.targets = None if targets is None else self._targets([targets] if isinstance(targets, str) else targets)
        if top_k < 1:
            raise InputError("top_k must be at least 1", found=str(top_k))
        self.top_k = min(top_k, tokenizer.vocab_size if self.targets is None else len(self.targets))

    def _targets(self, words: Sequence[str]) -> list[int]:
        """Return the ids of words that are one token each, in order, each once."""
        vocabulary: dict[str, int] = self.tokenizer.backend.get_vocab()
        found: list[int] = []
        unknown: list[str] = []
        for word in words:
            ids = [vocabulary[word]] if word in vocabulary else self.tokenizer.encode(word)
            if len(ids) == 1 and (word in vocabulary or ids[0] != self.tokenizer.unk_id):
                found += ids
            else:
                unknown.append(word)
        if unknown or not found:
            hint = did_you_mean(unknown[0], vocabulary) if unknown else ""
            raise InputError(
                "a target is not one token of this model" + hint if unknown else "there are no targets",
                found=", ".join(map(repr, unknown)),
                expected="words that the vocabulary holds whole",
            )
        return list(dict.fromkeys(found))

    def encode(self, examples: Sequence[str]) -> list[Feature]:
        """Return a feature for each text, or for each mask of a text that is read in windows.

        Raises InputError where a text has no mask, or is longer than the model.
        """
        for index, text in enumerate(examples):
            if not isinstance(text, str):
                raise InputError("a text is needed", where=f"text {index + 1}", found=repr(text)[:80])
        features = []
        for index, encoding in enumerate(self.tokenizer.encode_inputs(list(examples))):
            ids = encoding.ids
            masks = [place for place, id in enumerate(ids) if id == self.mask_id]
            if not masks:
                raise self._no_mask(examples[index], index)
            if len(ids) <= self.facts.max_length:
                features.append(self._feature(encoding, index, range(len(ids)), masks))
            elif self.long == "window":
                features += [self._feature(encoding, index, self._window(encoding, mask), [mask]) for mask in masks]
            elif self.long == "truncate":
                features.append(self._feature(encoding, index, self._window(encoding, 0), masks))
            else:
                raise too_long(index, len(ids), self.facts.max_length)
        return features

    def _window(self, encoding: Any, centre: int) -> list[int]:
        """Return the places of as many tokens as the model reads: some around a centre, and the special ones."""
        text = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        before, after = range(text[0]), range(text[-1] + 1, len(encoding))
        room = self.facts.max_length - len(before) - len(after)
        start = min(max(centre - room // 2, text[0]), after.start - room)
        return [*before, *range(start, start + room), *after]

    def _feature(self, encoding: Any, index: int, kept: Sequence[int], masks: Sequence[int]) -> Feature:
        """Return the feature of the tokens at some places, and where its masks are in it and in the text to show."""
        rows = {place: row for row, place in enumerate(kept)}
        if not rows.keys() >= set(masks):
            where = f"text {index + 1}"
            raise InputError("a mask is in the part that would be cut off", where=where, fix='choose long="window"')
        inputs = {"input_ids": [encoding.ids[place] for place in kept]}
        if self.facts.token_types:
            inputs["token_type_ids"] = [encoding.type_ids[place] for place in kept]
        shown = inputs["input_ids"] if self.long == "truncate" else encoding.ids
        found = [rows[mask] for mask in masks]
        notes = {"rows": found, "shown": shown, "masks": found if self.long == "truncate" else masks}
        return Feature(inputs, index, encoding, notes)

    def _no_mask(self, text: str, index: int) -> InputError:
        other = next((spelling for spelling in SPELLINGS if spelling in text), None)
        return InputError(
            "a text has no mask",
            where=f"text {index + 1}",
            found=f"{other}, which is not how this model spells it" if other else repr(text[:60]),
            expected=f"{self.mask} where a word is to be filled in",
        )

    def reduce(self, feature: Feature, output: NDArray[Any]) -> NDArray[np.float64]:
        """Return what `decode` needs of a feature's logits (T, V): the best tokens and their scores (M, K, 2).

        Logits of many texts fill the memory; a caller may reduce each batch when it has run. Reducing twice changes
        nothing.
        """
        if output.ndim == 3:
            return output
        scores = softmax(output[feature.notes["rows"]])  # (M, V)
        ids = np.arange(scores.shape[-1]) if self.targets is None else np.array(self.targets)
        best = []
        for row in scores[:, ids]:
            top = np.argpartition(-row, self.top_k - 1)[: self.top_k]
            top = top[np.lexsort((ids[top], -row[top]))]
            best.append(np.stack([ids[top], row[top]], -1))
        return np.stack(best)

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[str]
    ) -> list[list[Fill] | list[list[Fill]]]:
        """Return the `top_k` fills of each text, or a list of them for each mask where a text has several.

        `sequence` is the text with this one mask filled; several masks keep it readable by showing special tokens too.
        """
        masks: list[list[tuple[list[int], int, NDArray[Any]]]] = [[] for _ in examples]
        for feature, output in zip(features, outputs, strict=True):
            for place, best in zip(feature.notes["masks"], self.reduce(feature, output), strict=True):
                masks[feature.example].append((feature.notes["shown"], place, best))
        answers: list[list[Fill] | list[list[Fill]]] = []
        for rows in masks:
            fills = [self._fills(*row, alone=len(rows) == 1) for row in rows]
            answers.append(fills[0] if len(fills) == 1 else fills)
        return answers

    def _fills(self, ids: list[int], place: int, best: NDArray[Any], *, alone: bool) -> list[Fill]:
        """Return the fills of the mask at a place; best (K, 2) holds ids and scores."""
        fills, pad_id, decode = [], self.tokenizer.pad_id, self.tokenizer.decode
        for token, score in best.tolist():
            filled = [*ids[:place], int(token), *ids[place + 1 :]]
            sequence = decode([id for id in filled if id != pad_id], skip_special_tokens=alone)
            fills.append(Fill(decode([token], skip_special_tokens=False), int(token), score, sequence))
        return fills
