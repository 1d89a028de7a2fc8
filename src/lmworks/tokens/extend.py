"""More tokens for a tokenizer that is there: those a user names, or the words of a text that save the most tokens.

    extend(tokenizer, "<tp>,kijetesantakalu", texts)      named: each is one token wherever it stands
    extend(tokenizer, "words.txt", texts)                 one a line
    extend(tokenizer, "auto:500", texts)                  found: words that the tokenizer cuts, by the tokens they save

A named token is an added token, as transformers' `add_tokens` makes it. A word that was found is merged from its old
pieces by byte-pair rules that come after all others: inside other words the old pieces stay as they were, up to these
merges, so no text takes more tokens than before. A tokenizer whose vocabulary cannot grow so (WordPiece, Unigram, or
added tokens beyond the vocabulary) gets found words as added tokens that match whole words only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.tokens import legacy
from lmworks.tokens.tokenizer import Tokenizer

Added = tuple[Tokenizer, dict[int, list[int]]]  # and of each new token its old pieces

FIT, AUTO = "fit", "auto"
SPACED, BARE = re.compile(r" ?[^\W_]+"), re.compile(r"[^\W_]+")
AT_ONCE = 10_000  # words that are encoded together


@dataclass(frozen=True)
class Extended:
    """A tokenizer with more tokens, what each was before, and how many tokens a text takes."""

    tokenizer: Tokenizer
    pieces: dict[int, list[int]]  # of each new token the old ones that its text was cut into
    before: float  # tokens a word of the texts
    after: float


def extend(tokenizer: Tokenizer, spec: str, texts: Sequence[str]) -> Extended:
    """Return a tokenizer with the tokens that `spec` asks for; the given one stays as it is.

    `spec` is "auto:N", a file with one token a line, or tokens with commas. Raises InputError for tokens that are there
    already, or that do not come back from decoding.
    """
    kind, _, number = spec.partition(":")
    if kind == AUTO:
        if not number.isdigit() or int(number) < 1:
            raise InputError("auto needs to know how many tokens", found=spec, expected="auto:500, say")
        new, pieces = grow(tokenizer, find_words(tokenizer, texts, int(number)), int(number))
    else:
        new, pieces = add(tokenizer, named_tokens(spec))
    return Extended(new, pieces, fertility(tokenizer, texts), fertility(new, texts))


def named_tokens(spec: str) -> list[str]:
    """Return the tokens of a file, one a line, or of a list with commas; each once."""
    path = Path(spec)
    if path.is_file():
        found = legacy.read_lines(path)
    elif path.suffix in (".txt", ".csv", ".json"):
        raise InputError(f"there is no file {spec}", expected="a file with one token a line, or tokens with commas")
    else:
        found = [token.strip() for token in spec.split(",")]
    found = list(dict.fromkeys(token for token in found if token.strip()))
    if not found:
        raise InputError("no tokens to add", found=spec, expected="one,two or a file with one a line")
    return found


def copy_backend(tokenizer: Tokenizer) -> Any:
    """Return a backend of its own with the same content."""
    return require("tokenizers", extra="text").Tokenizer.from_str(tokenizer.backend.to_str())


def add(tokenizer: Tokenizer, tokens: Sequence[str], *, whole: bool = False) -> Added:
    """Return the tokenizer with added tokens; with `whole` they match whole words only."""
    library, backend = require("tokenizers", extra="text"), copy_backend(tokenizer)
    rewrite = str if backend.normalizer is None else backend.normalizer.normalize_str  # as texts, and the decoder, do
    known = [t for t in tokens if any(backend.token_to_id(form) is not None for form in (t, rewrite(t)))]
    if known:
        raise InputError("the tokenizer has these tokens already", found=", ".join(known[:8]), fix="leave them out")
    backend.add_tokens([library.AddedToken(token, single_word=whole, normalized=True) for token in tokens])
    new = Tokenizer(backend, config=tokenizer.config)
    ids = [backend.token_to_id(token) for token in tokens]
    lost = [
        token
        for token, i in zip(tokens, ids, strict=True)
        if new.decode([i], skip_special_tokens=False).strip() not in (token.strip(), rewrite(token).strip())
    ]
    if lost:
        raise InputError(
            "the tokenizer would not give these tokens back: it decodes their letters as bytes",
            found=", ".join(lost[:8]),
            expected="tokens of ASCII letters, or with a space before them",
            fix="leave them out, or let lmworks tokenizer extend merge them from their bytes, where ids have no gaps",
        )  # fmt: skip
    cut = tokenizer.encode_batch(list(tokens))
    return new, {id: [i for i in old if i != tokenizer.unk_id] for id, old in zip(ids, cut, strict=True)}


def add_words(tokenizer: Tokenizer, words: Sequence[str]) -> Added:
    """Return the tokenizer with named tokens; a byte-level one gets those that it would spell in bytes by merges.

    Of a merged word both forms become tokens, alone and after a space.
    """
    plain = [word for word in words if word.isascii() or not is_mergeable(tokenizer)]
    merged = [form for word in words if word not in plain for form in (word.strip(), f" {word.strip()}")]
    grown, pieces = grow(tokenizer, merged, 1 << 30) if merged else (tokenizer, {})
    if not plain:
        return grown, pieces
    added, more = add(grown, plain)
    return added, pieces | {id: [i for new in old for i in pieces.get(new, [new])] for id, old in more.items()}


def find_words(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[str]:
    """Return the words that the tokenizer cuts, those first that save the most tokens: at most `count`.

    With a byte-level tokenizer a word has the space before it. Of equal savings the first in the alphabet comes first.
    """
    mergeable = is_mergeable(tokenizer)
    pattern = SPACED if mergeable else BARE
    blank = len(tokenizer.encode(" "))
    seen = Counter(match for text in texts for match in pattern.findall(text))
    saved = {}
    for words in batches(sorted(word for word, times in seen.items() if times > 1)):
        after = words if mergeable else [f" {word}" for word in words]  # an added token leaves the space by itself
        both = zip(words, tokenizer.encode_batch(words), tokenizer.encode_batch(after), strict=True)
        for word, ids, spaced in both:
            gain = len(ids) - 1 if mergeable else min(len(ids) - 1, len(spaced) - blank - 1)
            if gain > 0 and tokenizer.decode(ids).strip() == word.strip():
                saved[word] = gain * seen[word]
    if not saved:
        raise InputError(
            "no word of the training data is cut in pieces more than once",
            fix="give more text, or do without new tokens",
        )
    return sorted(saved, key=lambda word: (-saved[word], word))[:count]


def batches(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words in groups."""
    for start in range(0, len(words), AT_ONCE):
        yield list(words[start : start + AT_ONCE])


def is_mergeable(tokenizer: Tokenizer) -> bool:
    """Tell whether words can be merged from pieces: byte-level pairs, and no id that is left out."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    plain = model.get("type") == "BPE" and not model.get("ignore_merges") and not model.get("dropout")
    inside = max(tokenizer.backend.get_vocab().values(), default=0) + 1 == tokenizer.vocab_size
    return bool(plain and inside and '"ByteLevel"' in json.dumps(tokenizer.pre_tokenizer))


def grow(tokenizer: Tokenizer, words: Sequence[str], count: int) -> Added:
    """Return the tokenizer with the words, and the pieces on the way to them, as at most `count` tokens."""
    if not is_mergeable(tokenizer):
        return add(tokenizer, [w for w in words if tokenizer.backend.token_to_id(w) is None], whole=True)
    state = json.loads(tokenizer.backend.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    vocabulary |= {token["content"]: token["id"] for token in state["added_tokens"]}  # else they would give way
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
    ranks, old = {pair: rank for rank, pair in enumerate(pairs)}, len(vocabulary)
    origin: dict[str, list[int]] = {}
    for ids in tokenizer.encode_batch(list(words)):
        pieces = merge_pieces([str(tokenizer.token(i)) for i in ids], ranks)
        if len(pieces) - 1 > old + count - len(vocabulary):
            continue
        while len(pieces) > 1:
            one, two = pieces[0], pieces[1]
            ranks.setdefault((one, two), len(ranks))
            if one + two not in vocabulary:
                origin[one + two] = [i for part in (one, two) for i in origin.get(part, [vocabulary[part]])]
                vocabulary[one + two] = len(vocabulary)
            pieces = merge_pieces(pieces, ranks)
    spaced = bool(merges) and isinstance(merges[0], str)
    merges += [" ".join(pair) if spaced else list(pair) for pair in list(ranks)[len(pairs) :]]
    backend = require("tokenizers", extra="text").Tokenizer.from_str(json.dumps(state))
    return Tokenizer(backend, config=tokenizer.config), {vocabulary[token]: ids for token, ids in origin.items()}


def merge_pieces(pieces: Sequence[str], ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """Return a word's pieces when no rule applies any longer; the rule of the lowest rank goes first."""
    pieces = list(pieces)
    while len(pieces) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == len(ranks):
            break
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return pieces


def fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return how many tokens a word of the texts takes, words being what blanks separate."""
    words = sum(len(text.split()) for text in texts)
    return sum(len(ids) for ids in tokenizer.encode_batch(texts)) / max(words, 1)


def plain_texts(examples: Sequence[Any]) -> list[str]:
    """Return every text in examples of any task: strings, pairs, words, instructions, conversations."""
    found: list[str] = []
    for example in examples:
        if isinstance(example, str):
            found.append(example)
        elif isinstance(example, dict):
            found += plain_texts([v for v in example.values() if isinstance(v, str | list)])
        elif isinstance(example, list | tuple):
            found += plain_texts(example)
    return found
