"""Train a tokenizer on texts.

    bpe    byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019): every byte is a token, nothing is lost
    char   one token a code point; a character that training never saw becomes <|unk|>

Every kind is one `tokenizer.json` that the tokenizers library, transformers and transformers.js read alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.tokens.tokenizer import EOS, PAD, UNK, Tokenizer

Kind = Literal["bpe", "char"]
BYTES = 256


def train_tokenizer(
    texts: Iterable[str], *, kind: Kind = "bpe", vocab_size: int = 4096, min_frequency: int = 2
) -> Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens; it is smaller when the texts do not hold that many.

    Ids 0 and 1 are `<|endoftext|>` (begins and ends documents) and `<|pad|>`; char has `<|unk|>` as id 2.
    """
    if kind not in KINDS:
        raise InputError(f"unknown tokenizer kind {kind!r}", expected=", ".join(KINDS))
    backend, special = KINDS[kind](texts, vocab_size, min_frequency)
    names = {"bos_token": EOS, "eos_token": EOS, "pad_token": PAD} | ({"unk_token": UNK} if UNK in special else {})
    added = {
        str(backend.token_to_id(name)): {
            "content": name, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for name in special
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "added_tokens_decoder": added,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend, config=config)


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int) -> tuple[Any, list[str]]:
    """Merge the most frequent pairs of bytes within words, cut as GPT-2 cuts them."""
    library = require("tokenizers", extra="text")
    special = [EOS, PAD]
    if vocab_size < BYTES + len(special):
        raise InputError(
            "the vocabulary is too small for byte-level BPE",
            found=str(vocab_size),
            expected=f"at least {BYTES + len(special)}: every byte and {len(special)} special tokens",
        )
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend, special


def train_char(texts: Iterable[str], vocab_size: int, min_frequency: int) -> tuple[Any, list[str]]:
    """Give every code point of the texts a token, the most frequent first if there are too many."""
    library = require("tokenizers", extra="text")
    special = [EOS, PAD, UNK]
    counts: dict[str, int] = {}
    for text in texts:
        for character in set(text):
            counts[character] = counts.get(character, 0) + text.count(character)
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - len(special)])
    vocabulary = {token: i for i, token in enumerate([*special, *kept])}
    backend = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    backend.decoder = library.decoders.Fuse()
    backend.add_special_tokens(special)
    return backend, special


KINDS: dict[str, Callable[[Iterable[str], int, int], tuple[Any, list[str]]]] = {"bpe": train_bpe, "char": train_char}
