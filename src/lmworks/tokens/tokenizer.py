"""One tokenizer for every model: a wrapper over a `tokenizer.json`.

`encode` adds no special tokens (GPT-2's convention): what a model sees is what was asked for. A special token that is
spelled out in a text ("<|endoftext|>") is read as that token, here as in transformers and transformers.js.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_json, write_text
from lmworks.base.optional import require

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: no UTF-8 can hold it
T = TypeVar("T")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: Any, *, config: dict[str, Any] | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; `config` is its tokenizer_config.json."""
        self.backend, self.config = backend, dict(config or {})

    @classmethod
    def from_file(cls, path: str | Path, *, config: dict[str, Any] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; raise FormatError where it is missing or damaged."""
        library = require("tokenizers", extra="text")
        path = Path(path)
        if not path.is_file():
            raise FormatError(
                "tokenizer.json is missing", where=str(path.parent), fix="check that the folder is complete"
            )
        backend = guard(lambda: library.Tokenizer.from_file(str(path)), f"{path.name} cannot be read", str(path))
        backend.no_padding()  # a file may carry settings that would change ids behind our back
        backend.no_truncation()
        return cls(backend, config=config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json` and, where there is one, `tokenizer_config.json` from a model folder."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"there is no model folder {folder}", fix="check the path")
        path = folder / "tokenizer_config.json"
        return cls.from_file(folder / "tokenizer.json", config=read_json(path) if path.exists() else None)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: "a b" -> [64, 275]. A lone surrogate counts as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all processors."""
        run, whole = self.backend.encode_batch_fast, [repair(text) for text in texts]
        encodings = guard(lambda: run(whole, add_special_tokens=False), "the tokenizer failed on this text")
        return [encoding.ids for encoding in encodings]

    def encode_inputs(self, texts: Sequence[str | tuple[str, str]]) -> list[Any]:
        """Encode texts, or pairs of texts, as the model was trained to read them: with its special tokens.

        Each result is a `tokenizers.Encoding`: ids, type_ids, offsets (in characters), word_ids, sequence_ids,
        special_tokens_mask.
        """
        whole = [repair(text) if isinstance(text, str) else (repair(text[0]), repair(text[1])) for text in texts]
        run = self.backend.encode_batch
        found: list[Any] = guard(lambda: run(whole, add_special_tokens=True), "the tokenizer failed on this text")
        return found

    def encode_windows(self, text: str, *, before: str | None = None, length: int, overlap: int) -> list[Any]:
        """Encode a text in windows of at most `length` tokens, special ones included, as `encode_inputs` does.

        Neighbours share `overlap` tokens. `before` (a question) is repeated at the start of every window. Offsets are
        those of the whole text. Raises InputError where a window has no room for more than the overlap.
        """
        first = None if before is None else self._bare(before)
        room = length - self.backend.num_special_tokens_to_add(first is not None) - (0 if first is None else len(first))
        if room <= overlap:
            raise InputError(
                "there is no room for the text in a window",
                found=f"{max(room, 0)} tokens beside the question and the special tokens, {overlap} of them overlap",
                fix="shorten the question, or choose a smaller overlap",
            )
        rest = self._bare(text)
        rest.truncate(room, stride=overlap)
        join, parts = self.backend.post_process, [rest, *rest.overflowing]
        return [join(part) if first is None else join(first, part) for part in parts]

    def _bare(self, text: str) -> Any:
        run, whole = self.backend.encode, repair(text)
        return guard(lambda: run(whole, add_special_tokens=False), "the tokenizer failed on this text")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that make no character show as U+FFFD."""
        run, plain = self.backend.decode, [int(id) for id in ids]
        return str(guard(lambda: run(plain, skip_special_tokens=skip_special_tokens), "these ids cannot be decoded"))

    def save(self, folder: str | Path, *, max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers 4 and 5 and transformers.js read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config | ({} if max_length is None else {"model_max_length": max_length})
        write_json(folder / "tokenizer_config.json", config)
        tokenizer = json.loads(self.backend.to_str())
        write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=1))

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, special ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document, or None."""
        return self.find("eos_token", EOS)

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch; in our own tokenizers never the one that ends a document."""
        return self.find("pad_token", PAD)

    @property
    def unk_id(self) -> int | None:
        """The token for what the vocabulary lacks, or None when nothing can be lacking.

        GPT-2's configuration names an unknown token that its bytes never need: the model itself decides.
        """
        if type(self.backend.model).__name__ == "BPE":
            name = self.backend.model.unk_token
            found: int | None = self.backend.token_to_id(name) if name else None
            return found
        return self.find("unk_token", UNK)

    @cached_property
    def is_lossless(self) -> bool:
        """True when every text survives encoding and decoding: byte-level, all 256 bytes, no rewriting."""
        alphabet = require("tokenizers", extra="text").pre_tokenizers.ByteLevel.alphabet()
        byte_level = {"type": "ByteLevel", "add_prefix_space": False}.items() <= self.pre_tokenizer.items()
        whole = all(self.backend.token_to_id(byte) is not None for byte in alphabet)
        return byte_level and whole and self.backend.normalizer is None and self.unk_id is None

    @property
    def pre_tokenizer(self) -> dict[str, Any]:
        """How texts are cut before they are encoded, as tokenizer.json says it; {} where they are not."""
        found = self.backend.pre_tokenizer
        state: dict[str, Any] = {} if found is None else json.loads(found.__getstate__())
        return state

    def knows(self, text: str) -> bool:
        """Say whether this very text survives encoding and decoding; where it does not, bits per byte mean nothing."""
        return self.is_lossless or self.decode(self.encode(text), skip_special_tokens=False) == text

    def token(self, id: int) -> str | None:
        """Return the token of an id as the vocabulary spells it."""
        found: str | None = self.backend.id_to_token(id)
        return found

    def find(self, key: str, usual: str) -> int | None:
        """Return the id of the special token that the config names under `key`, else of the usual one."""
        named = self.config.get(key) or usual
        named = named.get("content") if isinstance(named, dict) else named
        found: int | None = self.backend.token_to_id(named) if isinstance(named, str) else None
        return found


def repair(text: str) -> str:
    """Return the text with every lone surrogate replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def guard(call: Callable[[], T], what: str, where: str = "") -> T:
    """Run a call into the library; its panics derive from BaseException and would pass every `except Exception`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise FormatError(what, where=where, found=str(error)[:300] or type(error).__name__) from None
