"""Train a tokenizer on texts.

    bpe    byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019): all 256 bytes are tokens
    char   one token a code point; a character that training never saw becomes <|unk|>

Every kind is one `tokenizer.json` that the tokenizers library, transformers and transformers.js read alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.tokens.tokenizer import EOS, PAD, UNK, Tokenizer, guard, repair

Kind = Literal["bpe", "char"]
BYTES = 256
ENOUGH = 100_000_000  # characters: more than this changes no merge that matters, and memory stays bounded
PIECE = 65_536  # characters handed over at once


def train_tokenizer(
    texts: Iterable[str], *, kind: Kind = "bpe", vocab_size: int = 4096, min_frequency: int = 2
) -> Tokenizer:
    """Return a tokenizer of at most `vocab_size` tokens; it is smaller when the texts do not hold that many.

    Ids 0 and 1 are `<|endoftext|>` (begins and ends documents) and `<|pad|>`; char has `<|unk|>` as id 2.
    `min_frequency` is how often bpe must see a pair to merge it.
    """
    if kind not in KINDS:
        raise InputError(f"unknown tokenizer kind {kind!r}", expected=", ".join(KINDS))
    special = [EOS, PAD] if kind == "bpe" else [EOS, PAD, UNK]
    least = len(special) + (BYTES if kind == "bpe" else 1)
    if vocab_size < least:
        raise InputError(
            f"the vocabulary is too small for the tokenizer {kind}", found=str(vocab_size), expected=f"at least {least}"
        )
    backend = KINDS[kind](texts, vocab_size, min_frequency, special)
    return Tokenizer(backend, config=make_config(backend, special))


def make_config(backend: Any, special: list[str]) -> dict[str, Any]:
    """Return tokenizer_config.json in the fields that transformers 4, transformers 5 and transformers.js all read."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 gives GPT-2 token types, too
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        **({"unk_token": UNK} if UNK in special else {}),
        "added_tokens_decoder": {str(backend.token_to_id(name)): {"content": name, **flags} for name in special},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int, special: list[str]) -> Any:
    """Merge the most frequent pairs of bytes within words, cut as GPT-2 cuts them."""
    library = require("tokenizers", extra="text")
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
    guard(lambda: backend.train_from_iterator(sample(texts), trainer), "the tokenizer cannot be trained on this text")
    return backend


def sample(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in pieces; past ENOUGH characters only every second piece, past twice that every fourth, …"""
    pieces = (text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE))
    taken = 0
    for i, piece in enumerate(pieces):
        if i % (1 << (taken // ENOUGH)) == 0:
            taken += len(piece)
            yield repair(piece)


def train_char(texts: Iterable[str], vocab_size: int, min_frequency: int, special: list[str]) -> Any:
    """Give every code point of the texts a token; if there are too many, the most frequent."""
    library = require("tokenizers", extra="text")
    counts = Counter(chain.from_iterable(map(repair, texts)))
    kept = sorted(sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - len(special)])
    vocabulary = {token: i for i, token in enumerate([*special, *kept])}
    backend = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    backend.decoder = library.decoders.Fuse()
    backend.add_special_tokens(special)
    return backend


KINDS: dict[str, Callable[[Iterable[str], int, int, list[str]], Any]] = {"bpe": train_bpe, "char": train_char}
