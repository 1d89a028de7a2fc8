"""Train a tokenizer on texts.

    word        one token a word or other sign; blanks are lost, rare words become <|unk|>
    char        one token a grapheme cluster, what a reader calls a character; those never seen become <|unk|>
    bpe         byte-pair encoding (Sennrich et al. 2016), of bytes (Radford et al. 2019), or of characters
    wordpiece   pieces that begin words, and ##pieces that go on (Schuster & Nakajima 2012); blanks are lost
    unigram     the pieces that make the texts likeliest, and of each text the likeliest pieces (Kudo 2018)

Every kind is one `tokenizer.json` that the tokenizers library, transformers and transformers.js read alike, and the
same texts give the same file. What the library decides by the order of a hash table is decided here: the ids of
WordPiece's letters, which break ties between merges, and the scores of letters that Unigram leaves without one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.optional import require
from lmworks.tokens.patterns import GRAPHEMES, PIECES, WORDS
from lmworks.tokens.stream import LONGEST, PIECE, cut
from lmworks.tokens.tokenizer import EOS, PAD, UNK, USUAL, Tokenizer, guard, repair

BYTES, SIZE = 256, 4096
ENOUGH = 100_000_000  # characters: more than this changes no merge that matters, and memory stays bounded
LONGEST_WORD = 200  # characters of a word that WordPiece cuts; Thai has no blanks between words
ROUNDED = 6  # digits of Unigram's scores; beyond them they depend on the order of sums
FREQUENCY = {"word": 2, "char": 1, "bpe": 2, "wordpiece": 2}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a tokenizer.

    Parameters
    ----------
    kind
        word, char (grapheme clusters), bpe, wordpiece or unigram.
    vocab_size
        The most tokens, special ones included; by default 4096.
    level
        What bpe joins: byte (nothing is ever unknown) or char.
    min_frequency
        How often a word or character must stand in the texts, or a pair of pieces to be joined; by default 2, char 1.
    special
        More special tokens, with commas; [CLS] and [SEP] together frame every text, as BERT's do.
    lowercase
        Make all letters small first; capitals are lost.
    """

    kind: str = "bpe"
    vocab_size: int | None = None
    level: str = "byte"
    min_frequency: int | None = None
    special: str = ""
    lowercase: bool = False

    def check(self) -> Recipe:
        """Return the recipe, or raise InputError for what cannot be meant."""
        for name, choices in (("kind", list(KINDS)), ("level", ["byte", "char"])):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"unknown tokenizer {name} {value!r}", expected=", ".join(choices),
                    fix=did_you_mean(value, choices).strip(),
                )  # fmt: skip
        if self.level != "byte" and self.kind != "bpe":
            raise InputError("--level is for bpe", found=f"--kind {self.kind}", fix="leave --level out")
        if self.min_frequency is not None and (self.kind == "unigram" or self.min_frequency < 1):
            fix = "leave --min-frequency out" if self.kind == "unigram" else "give 1 or more"
            raise InputError("this is no frequency to choose tokens by", found=str(self.min_frequency), fix=fix)
        names = self.specials
        odd = [name for name in names if not name.strip() or repair(name) != name or names.count(name) > 1]
        if odd:
            raise InputError("this cannot be a special token", found=repr(odd[0]), expected="each once, and not empty")
        least = len(names) + (BYTES if self.has_bytes else 1)
        if self.size < least:
            what = f"the vocabulary is too small for the tokenizer {self.kind}"
            raise InputError(what, found=str(self.size), expected=f"at least {least}")
        return self

    @property
    def has_bytes(self) -> bool:
        """Say whether its tokens are made of bytes, so that none is unknown."""
        return self.kind == "bpe" and self.level == "byte"

    @property
    def size(self) -> int:
        """The most tokens."""
        return SIZE if self.vocab_size is None else self.vocab_size

    @property
    def specials(self) -> list[str]:
        """The special tokens in the order of their ids."""
        more = [name.strip() for name in self.special.split(",")] if self.special else []
        return [EOS, PAD, *([] if self.has_bytes else [UNK]), *more]

    @property
    def frequency(self) -> int:
        """How often something must stand in the texts."""
        return self.min_frequency or FREQUENCY.get(self.kind, 1)


def train_tokenizer(texts: Iterable[str], **recipe: Any) -> Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens; it is smaller when the texts do not hold that many.

    `recipe` has the fields of Recipe. Ids 0 and 1 are `<|endoftext|>` (begins and ends documents) and `<|pad|>`; id 2
    is `<|unk|>` unless tokens are made of bytes. WordPiece reads the texts twice.
    """
    known = {field.name for field in fields(Recipe)}
    wrong = next((name for name in recipe if name not in known), None)
    if wrong is not None:
        raise InputError(f"a tokenizer has no {wrong}", expected=", ".join(sorted(known)))
    plan = Recipe(**recipe).check()
    backend = make_backend(plan, KINDS[plan.kind](plan, list(texts) if isinstance(texts, Iterator) else texts))
    found = backend.get_vocab_size()
    if found > plan.size:
        raise too_small(plan, f"at least {found}: the texts have that many letters, each of them a token")
    return Tokenizer(backend, config=make_config(backend, plan))


def too_small(plan: Recipe, expected: str) -> InputError:
    """Return the error for a vocabulary that has no room for the letters."""
    return InputError(
        f"the vocabulary is too small for the tokenizer {plan.kind} of these texts", found=str(plan.size),
        expected=expected, fix="raise --vocab-size, or take --kind bpe, whose letters are 256 bytes",
    )  # fmt: skip


def make_backend(plan: Recipe, model: Any = None) -> Any:
    """Return the library's tokenizer with the steps of a kind around a model; None: an empty one, to be trained."""
    library = require("tokenizers", extra="text")
    backend = library.Tokenizer(model or {"bpe": library.models.BPE, "unigram": library.models.Unigram}[plan.kind]())
    if plan.lowercase:  # JavaScript has another sigma at the end of words: here there is one
        steps = [library.normalizers.Lowercase(), library.normalizers.Replace("ς", "σ")]
        backend.normalizer = library.normalizers.Sequence(steps)
    split, regex = library.pre_tokenizers.Split, library.Regex
    if plan.has_bytes:
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = library.decoders.ByteLevel()
    elif plan.kind in ("word", "wordpiece"):
        backend.pre_tokenizer = split(regex(WORDS), "removed", invert=True)
        if plan.kind == "wordpiece":
            backend.decoder = library.decoders.WordPiece(prefix="##", cleanup=False)
    else:
        backend.pre_tokenizer = split(regex(GRAPHEMES if plan.kind == "char" else PIECES), "isolated")
        backend.decoder = library.decoders.Fuse()
    if model is not None:
        backend.add_special_tokens(plan.specials)
        if {"[CLS]", "[SEP]"} <= set(plan.specials):
            ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
            backend.post_processor = library.processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
            )
    return backend


def make_config(backend: Any, plan: Recipe) -> dict[str, Any]:
    """Return tokenizer_config.json in the fields that transformers 4, transformers 5 and transformers.js all read."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = plan.specials
    named = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD, **({"unk_token": UNK} if UNK in special else {})}
    for key, usual in USUAL.items():
        for name in special:
            if name in usual:
                named.setdefault(key, name)
    more = [name for name in special if name not in named.values()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 gives GPT-2 token types, too
        **named,
        **({"additional_special_tokens": more} if more else {}),
        "added_tokens_decoder": {str(backend.token_to_id(name)): {"content": name, **flags} for name in special},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def sample(plan: Recipe, texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in pieces; past ENOUGH characters only every second piece, past twice that every fourth, …

    Special tokens that a text spells out are left out: they have their ids, and the library would count them as words.
    """
    special = re.compile("|".join(map(re.escape, sorted(plan.specials, key=len, reverse=True))))
    pieces = (piece for text in texts for piece in cut([text], PIECE, LONGEST))
    taken = 0
    for i, piece in enumerate(pieces):
        if i % (1 << (taken // ENOUGH)) == 0:
            taken += len(piece)
            yield from filter(None, special.split(repair(piece)))


def run_trainer(plan: Recipe, backend: Any, trainer: Any, texts: Iterable[str]) -> Any:
    """Train the backend's model and return it."""
    what = "the tokenizer cannot be trained on this text"
    guard(lambda: backend.train_from_iterator(sample(plan, texts), trainer), what)
    return backend.model


def train_counts(plan: Recipe, texts: Iterable[str]) -> Any:
    """Give every word, or every grapheme cluster, a token; if there are too many, the most frequent."""
    library = require("tokenizers", extra="text")
    backend = make_backend(plan, library.models.WordLevel({}, unk_token=UNK))
    trainer = library.trainers.WordLevelTrainer(
        vocab_size=plan.size, min_frequency=plan.frequency, special_tokens=plan.specials, show_progress=False
    )
    vocabulary = json.loads(run_trainer(plan, backend, trainer, texts).__getstate__())["vocab"]
    return library.models.WordLevel(vocabulary, unk_token=UNK)


def train_bpe(plan: Recipe, texts: Iterable[str]) -> Any:
    """Merge the most frequent pairs of bytes, or of characters, within words; `by_hand` says how ties are broken."""
    library = require("tokenizers", extra="text")
    trainer = library.trainers.BpeTrainer(
        vocab_size=plan.size,
        min_frequency=plan.frequency,
        special_tokens=plan.specials,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()) if plan.has_bytes else [],
        show_progress=False,
    )
    model = run_trainer(plan, make_backend(plan), trainer, texts)
    if not plan.has_bytes:
        model.unk_token = UNK
    return model


def train_wordpiece(plan: Recipe, texts: Iterable[str]) -> Any:
    """Merge the most frequent pairs of pieces within words."""
    library = require("tokenizers", extra="text")
    backend = make_backend(plan, library.models.WordPiece(unk_token=UNK))
    letters: set[str] = set()
    for piece in sample(plan, texts):
        letters.update(backend.normalizer.normalize_str(piece) if backend.normalizer else piece)
    going_on = [c for c in sorted(letters) if len(backend.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    going_on = [c for c in going_on if not c.isspace()]
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=plan.size,
        min_frequency=plan.frequency,
        special_tokens=[*plan.specials, *(f"##{letter}" for letter in going_on)],  # special to the trainer alone
        show_progress=False,
    )
    vocabulary = json.loads(run_trainer(plan, backend, trainer, texts).__getstate__())["vocab"]
    return library.models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD)


def train_unigram(plan: Recipe, texts: Iterable[str]) -> Any:
    """Begin with many pieces and drop those that the texts' likelihood misses least."""
    library = require("tokenizers", extra="text")
    trainer = library.trainers.UnigramTrainer(
        vocab_size=plan.size, special_tokens=plan.specials, unk_token=UNK, show_progress=False
    )
    try:
        model = run_trainer(plan, make_backend(plan), trainer, texts)
    except Exception as error:
        if "not large enough" not in str(getattr(error, "found", "")):
            raise
        raise too_small(plan, "a token for each letter of the texts") from None
    rows = json.loads(model.__getstate__())["vocab"][len(plan.specials) :]
    low = min((score for _, score in rows), default=0.0)
    single = sum(len(token) == 1 for token, _ in rows)
    edge = low + 1e-4 * single  # what the library adds, a step for each, to letters that have no score of their own
    scores = {token: round(low if len(token) == 1 and score < edge else score, ROUNDED) for token, score in rows}
    ordered = sorted(scores.items(), key=lambda row: (-row[1], row[0]))
    return library.models.Unigram([*((name, 0.0) for name in plan.specials), *ordered], plan.specials.index(UNK), False)


KINDS: dict[str, Callable[[Recipe, Iterable[str]], Any]] = {
    "word": train_counts,
    "char": train_counts,
    "bpe": train_bpe,
    "wordpiece": train_wordpiece,
    "unigram": train_unigram,
}
