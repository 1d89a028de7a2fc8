"""token-classification: the names in a text, with the characters they span.

    "Ada met Bob Ross"  ->  [Entity("person", 0.97, "ada", 0, 3), Entity("person", 0.95, "bob ross", 8, 16)]

Shapes: T tokens of an input, L labels; logits (T, L) for each input.

`aggregation` says what becomes of the tokens, with the meanings of transformers' pipeline:

- "none": an entity for each token whose label is not ignored;
- "simple": neighbouring tokens of one kind are joined; "B-" starts a new entity, "I-" goes on with the one before;
- "first", "average", "max": as simple, but a word is never split: it takes the label of its first token, that of its
  tokens' mean probabilities, or that of its most certain token;
- "tokens": every token with its label, special tokens too: a list of TokenLabel.

Words: words="tokenizer" takes the tokenizer's own (its `word_ids`), cut at white space besides; "spaces" takes whatever
stands between two spaces, punctuation too, and leaves a character of several tokens whole. "auto" does what the
pipeline does: "spaces" where the tokenizer marks no sub-words (GPT-2, RoBERTa), else "tokenizer".

An entity's `word` is what the tokenizer makes of its tokens ("ada"); text[start:end] is what the text says ("Ada").

A text that is longer than the model (`long`): "error" says so; "truncate" leaves its end unread; "window" reads all of
it in windows that share `overlap` tokens, and takes each token's probabilities from the window in which it lies
farthest from a cut (from the earlier one of two). A model that looks no more than overlap / 2 tokens to either side,
and counts positions from token to token, then answers as if it had read the text at once; any other model may answer
otherwise, as it sees less of the text. The pipeline's `stride` settles an overlap by the longer entity instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Entity, TokenLabel
from lmworks.tasks.base import Facts, Feature, Long, one_of, softmax, to_feature, too_long
from lmworks.tasks.classify import check_logits, choose_overlap
from lmworks.tokens.tokenizer import Tokenizer

Aggregation = Literal["none", "simple", "first", "average", "max", "tokens"]
Words = Literal["auto", "tokenizer", "spaces"]
FAR = 1 << 30  # tokens between a token and a cut that does not exist


@dataclass(frozen=True)
class Token:
    """A token of a text and what the model thinks of it."""

    id: int
    spelling: str
    start: int
    end: int
    word: int | None  # number of its word in the text
    special: bool
    probabilities: NDArray[np.float64]  # (L,)


class TokenClassification:
    """Entities with their places in the text, in reading order."""

    name = "token-classification"
    output = "logits"

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: Facts,
        *,
        aggregation: Aggregation = "none",
        ignore_labels: Sequence[str] | None = None,
        words: Words = "auto",
        long: Long = "error",
        overlap: int | None = None,
    ) -> None:
        """Prepare for one model.

        `ignore_labels`: labels that make no entity, by default "O". `overlap`: tokens that windows share, by default
        128 or a quarter of the model's length. The other options are explained at the top of this file.
        """
        self.tokenizer, self.facts = tokenizer, facts
        self.aggregation = one_of(aggregation, get_args(Aggregation), "aggregation")
        marked = bool(getattr(tokenizer.backend.model, "continuing_subword_prefix", None))
        chosen = one_of(words, get_args(Words), "kind of words")
        self.words = chosen if chosen != "auto" else "tokenizer" if marked else "spaces"
        self.long = one_of(long, get_args(Long), "way with long texts")
        self.overlap, self.unknown = choose_overlap(overlap, facts), tokenizer.unk_id
        known = list(dict.fromkeys([*facts.labels, *(kind_of(label) for label in facts.labels)]))
        self.ignored = {"O"} if ignore_labels is None else {one_of(one, known, "label") for one in ignore_labels}

    def encode(self, examples: Sequence[Any]) -> list[Feature]:
        """Return the features of texts; raise InputError for what is no text, or too long. No tokens: no feature."""
        for place, text in enumerate(examples):
            if not isinstance(text, str):
                raise InputError(
                    "an example is not a text",
                    where=f"text {place + 1}",
                    found=f"{type(text).__name__}: {text!r}"[:100],
                    expected="a string",
                )
        encodings = self.tokenizer.encode_inputs(examples) if examples else []
        features = []
        for place, (text, whole) in enumerate(zip(examples, encodings, strict=True)):
            parts, length = [whole], self.facts.max_length
            if len(whole.ids) > length:
                if self.long == "error":
                    raise too_long(place, len(whole.ids), length)
                overlap = self.overlap if self.long == "window" else 0
                parts = self.tokenizer.encode_windows(text, length=length, overlap=overlap)
                parts = parts if self.long == "window" else parts[:1]
            step = parts[0].special_tokens_mask.count(0) - self.overlap
            for number, part in enumerate(parts):
                notes = {"start": number * step, "first": number == 0, "last": number == len(parts) - 1}
                if part.ids:
                    features.append(replace(to_feature(part, place, self.facts), notes=notes))
        return features

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[Any]
    ) -> list[list[Entity]] | list[list[TokenLabel]]:
        """Return each text's entities, or its TokenLabels for "tokens"; outputs: logits (T, L)."""
        texts: list[list[Token]] = [[] for _ in examples]
        rows = zip(features, outputs, strict=True)
        for example, windows in groupby(rows, key=lambda row: row[0].example):
            texts[example] = self._read(list(windows))
        if self.aggregation == "tokens":
            return [[self._tag(token) for token in tokens] for tokens in texts]
        return [self._entities(tokens, text) for tokens, text in zip(texts, examples, strict=True)]

    def _read(self, windows: list[tuple[Feature, NDArray[Any]]]) -> list[Token]:
        """Return the tokens of a text, each from the window in which it lies deepest."""
        last = windows[-1][0]
        deepest = np.full(last.notes["start"] + len(last), -FAR)
        tokens: list[Any] = [None] * len(deepest)
        for feature, logits in windows:
            encoding, start, place = feature.encoding, feature.notes["start"], np.arange(len(feature))
            inside = [at for at, special in enumerate(encoding.special_tokens_mask) if not special]
            # A special token beyond a cut has a negative depth: every place it could take belongs to a neighbour too.
            left = place + FAR if feature.notes["first"] else place - inside[0]
            right = place + FAR if feature.notes["last"] else inside[-1] - place
            depth, probabilities = np.minimum(left, right), softmax(check_logits(logits, self.facts))
            for at in place[: len(tokens) - start]:
                if depth[at] > deepest[start + at]:
                    deepest[start + at] = depth[at]
                    begin, end = encoding.offsets[at]
                    tokens[start + at] = Token(
                        id=encoding.ids[at],
                        spelling=encoding.tokens[at],
                        start=begin,
                        end=end,
                        word=encoding.word_ids[at],
                        special=bool(encoding.special_tokens_mask[at]),
                        probabilities=probabilities[at],
                    )
        return tokens

    def _tag(self, token: Token) -> TokenLabel:
        best = int(token.probabilities.argmax())
        score = float(token.probabilities[best])
        return TokenLabel(token.spelling, self.facts.labels[best], score, not token.special, token.start, token.end)

    def _entities(self, tokens: list[Token], text: str) -> list[Entity]:
        tokens = [token for token in tokens if not token.special]
        if self.aggregation in ("none", "simple"):
            units = [self._entity([token], text) for token in tokens]
        else:
            units = [self._entity(word, text) for word in self._words(tokens, text)]
        if self.aggregation != "none":
            units = [self._join(group) for group in group_by_kind(units)]
        return [unit for unit in units if unit.label not in self.ignored]

    def _words(self, tokens: list[Token], text: str) -> list[list[Token]]:
        """Return the tokens of each word."""
        words: list[list[Token]] = []
        for token in tokens:
            last = words[-1][-1] if words else None
            changed = last is None or (self.words == "tokenizer" and token.word != last.word)
            around = text[max(0, token.start - 1) : token.start + 1]
            # Tokens may share a character, as the bytes of an emoji do: no word ends within it.
            spaced = last is not None and token.start >= last.end and any(map(str.isspace, around))
            if changed or spaced:
                words.append([token])
            else:
                words[-1].append(token)
        return words

    def _entity(self, word: list[Token], text: str) -> Entity:
        """Return the tokens of a word, or a lone token, as an entity with the label that they agree on."""
        rows = np.stack([token.probabilities for token in word])  # (T, L)
        if self.aggregation == "average":
            row = rows.mean(0)
        else:
            row = rows[rows.max(1).argmax()] if self.aggregation == "max" else rows[0]
        best = int(row.argmax())
        parts = [text[one.start : one.end] if one.id == self.unknown else one.spelling for one in word]
        written = parts[0] if self.aggregation in ("none", "simple") else self._write(parts)
        return Entity(self.facts.labels[best], float(row[best]), written, word[0].start, word[-1].end)

    def _join(self, group: list[Entity]) -> Entity:
        score = float(np.mean([unit.score for unit in group]))
        label, word = group[0].label.split("-", 1)[-1], self._write([unit.word for unit in group])
        return Entity(label, score, word, group[0].start, group[-1].end)

    def _write(self, tokens: list[str]) -> str:
        decoder = self.tokenizer.backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


def kind_of(label: str) -> str:
    """Return what a label names: "B-person" and "I-person" -> "person", "O" -> "O"."""
    return label[2:] if label.startswith(("B-", "I-")) else label


def group_by_kind(units: list[Entity]) -> list[list[Entity]]:
    """Group neighbours of one kind; a "B-" starts a group of its own."""
    groups: list[list[Entity]] = []
    for unit in units:
        if groups and kind_of(unit.label) == kind_of(groups[-1][-1].label) and not unit.label.startswith("B-"):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups
