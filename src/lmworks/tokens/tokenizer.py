"""One tokenizer for every model: a wrapper over a `tokenizer.json`, or over what is built from older files.

`encode` adds no special tokens (GPT-2's convention): what a model sees is what was asked for. A special token that is
spelled out in a text ("<|endoftext|>") is read as that token, here as in transformers and transformers.js.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.files import read_json, read_own, write_json, write_text
from lmworks.base.optional import require
from lmworks.tokens import legacy

EOS, PAD, UNK = "<|endoftext|>", "<|pad|>", "<|unk|>"
USUAL = {  # where nothing names a special token: the first of these that the vocabulary has
    "bos_token": ("<s>", "<|begin_of_text|>", EOS),
    "eos_token": (EOS, "</s>", "<|end_of_text|>"),
    "pad_token": (PAD, "[PAD]", "<pad>"),
    "unk_token": (UNK, "[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
ENDLESS = 10**9  # a model_max_length from here on means that nobody said one
PLAIN_CLASSES = (None, "TokenizersBackend")  # they mean nothing to transformers 4
TEMPLATES = "additional_chat_templates"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: no UTF-8 can hold it
FAILED, SOURCE = "the tokenizer failed on this text", "tokenizer.json, vocab.txt, vocab.json or tokenizer.model"
T = TypeVar("T")


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, backend: Any, *, config: dict[str, Any] | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; `config` is its tokenizer_config.json."""
        self.backend, self.config = backend, dict(config or {})

    @classmethod
    def from_file(cls, path: str | Path, *, config: dict[str, Any] | None = None) -> Tokenizer:
        """Read a `tokenizer.json`, or one of the older vocabulary files; raise FormatError where it is damaged."""
        path = Path(path)
        if path.name in legacy.FILES:
            return cls.from_older_files(path.parent, config=config or {})
        library = require("tokenizers", extra="text")
        if not path.is_file():
            raise FormatError("tokenizer.json is missing", where=str(path.parent), fix="fetch the whole folder")
        read = library.Tokenizer.from_buffer
        backend = guard(lambda: read(read_own(path)), f"{path.name} cannot be read", str(path))
        backend.no_padding()  # a file may carry settings that would change ids behind our back
        backend.no_truncation()
        return cls(backend, config=config)

    @classmethod
    def from_older_files(cls, folder: Path, *, config: dict[str, Any]) -> Tokenizer:
        """Build the tokenizer from `vocab.txt`, `vocab.json` and `merges.txt`, or `tokenizer.model`."""
        what = "the tokenizer cannot be built from these files"
        backend, names = guard(lambda: legacy.make_backend(folder, config), what, str(folder))
        return cls(backend, config=config | names)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a model folder: `tokenizer.json` where there is one, else the older files."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"there is no model folder {folder}", fix="check the path")
        config = read_config(folder)
        if (folder / "tokenizer.json").is_file():
            found = cls.from_file(folder / "tokenizer.json", config=config)
            guard(lambda: legacy.agree(found.backend, config), "tokenizer_config.json cannot be used", str(folder))
            return found
        return cls.from_older_files(folder, config=config)

    def check_fits(self, rows: int, *, where: str = "") -> None:
        """Raise FormatError where there are more tokens than the embedding has rows; fewer are usual."""
        if self.vocab_size > rows:
            raise FormatError(
                "the tokenizer does not belong to this model: it has more tokens than the embedding",
                where=where,
                found=f"{self.vocab_size} tokens in the tokenizer (tokenizer.json)",
                expected=f"at most {rows}, the rows of the embedding",
                fix="use the tokenizer that the model was trained with, or let the model learn the others: "
                "lmworks finetune … --add-tokens fit",
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: "a b" -> [64, 275]. A lone surrogate counts as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all processors."""
        run, whole = self.backend.encode_batch_fast, [repair(text) for text in texts]
        encodings = guard(lambda: run(whole, add_special_tokens=False), FAILED, SOURCE)
        return [encoding.ids for encoding in encodings]

    def encode_bare(self, texts: Sequence[str]) -> list[Any]:
        """Encode texts without special tokens; the results are those of `encode_inputs`."""
        run, whole = self.backend.encode_batch, [repair(text) for text in texts]
        found: list[Any] = guard(lambda: run(whole, add_special_tokens=False), FAILED, SOURCE)
        return found

    def encode_inputs(self, texts: Sequence[str | tuple[str, str]]) -> list[Any]:
        """Encode texts, or pairs of texts, as the model was trained to read them: with its special tokens.

        Each result is a `tokenizers.Encoding`: ids, type_ids, offsets (in characters), word_ids, sequence_ids,
        special_tokens_mask.
        """
        whole = [repair(text) if isinstance(text, str) else (repair(text[0]), repair(text[1])) for text in texts]
        run = self.backend.encode_batch
        found: list[Any] = guard(lambda: run(whole, add_special_tokens=True), FAILED, SOURCE)
        return found

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued, after the tokens that the model expects at a start."""
        return list(self.encode_inputs([text])[0].ids)

    def encode_windows(self, text: str, *, before: str | None = None, length: int, overlap: int) -> list[Any]:
        """Encode a text in windows of at most `length` tokens, special ones included, as `encode_inputs` does.

        Neighbours share `overlap` tokens. `before` (a question) is repeated at the start of every window. Offsets are
        those of the whole text. Raises InputError where a window has no room for more than the overlap.
        """
        return guard(lambda: self._windows(text, before, length, overlap), FAILED, SOURCE)

    def _windows(self, text: str, before: str | None, length: int, overlap: int) -> list[Any]:
        first = None if before is None else self._bare(before)
        room = length - self.backend.num_special_tokens_to_add(first is not None) - (0 if first is None else len(first))
        if room <= overlap:
            raise InputError(
                "there is no room for the text in a window",
                found=f"{max(room, 0)} tokens beside the question and the special tokens, {overlap} of them overlap",
                fix="shorten the question, or choose a smaller overlap",
            )
        rest = self._bare(text)
        if len(rest) <= room:  # (joined by hand, a whole text would keep its sequence id beside the new one)
            return self.encode_inputs([text if before is None else (before, text)])
        rest.truncate(room, stride=overlap)
        join, parts = self.backend.post_process, [rest, *rest.overflowing]
        return [join(part) if first is None else join(first, part) for part in parts]  # each by itself: see the tests

    def _bare(self, text: str) -> Any:
        run, whole = self._untrimmed.encode, repair(text)
        return guard(lambda: run(whole, add_special_tokens=False), FAILED, SOURCE)

    @cached_property
    def _untrimmed(self) -> Any:
        """The backend, without a post-processor that moves offsets past spaces: joining windows runs it again."""
        processor = self.backend.post_processor
        if processor is None or b'"trim_offsets":true' not in processor.__getstate__():
            return self.backend
        twin = require("tokenizers", extra="text").Tokenizer.from_str(self.backend.to_str())
        twin.post_processor = None
        return twin

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; bytes that make no character show as U+FFFD."""
        run, plain = self.backend.decode, [int(id) for id in ids]
        return str(guard(lambda: run(plain, skip_special_tokens=skip_special_tokens), "these ids cannot be decoded"))

    def save(self, folder: str | Path, *, max_length: int | None = None) -> None:
        """Write tokenizer.json and its companions as transformers 4 and 5 and transformers.js read them.

        A chat template goes into chat_template.jinja, which transformers 5 reads first, and into the config.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key != "auto_map"}  # code that others would run
        config |= {} if max_length is None else {"model_max_length": max_length}
        if config.get("tokenizer_class") in PLAIN_CLASSES:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # else transformers 4 adds types
        if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 wants a dict under this name
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        added = self.backend.get_added_tokens_decoder()
        config["added_tokens_decoder"] = {str(id): flags(token) for id, token in sorted(added.items())}
        named = {key: config[key] for key in (*USUAL, "additional_special_tokens") if config.get(key)}
        write_json(folder / "special_tokens_map.json", plain(named))
        write_json(folder / "tokenizer_config.json", config)
        tokenizer = json.loads(self.backend.to_str())
        write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=1))
        for name, template in self.chat_templates.items():
            path = folder / template_file(name)
            path.parent.mkdir(exist_ok=True)
            write_text(path, template)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, special ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document, or None."""
        return self.find("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document, or None."""
        return self.find("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The token that fills a batch; in our own tokenizers never the one that ends a document."""
        return self.find("pad_token")

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a hidden word, or None."""
        return self.find("mask_token")

    @property
    def cls_id(self) -> int | None:
        """The token that begins an encoder's input, or None; RoBERTa's is its bos."""
        return self.find("cls_token", *(["<s>"] if self.backend.token_to_id("<mask>") is not None else []))

    @property
    def sep_id(self) -> int | None:
        """The token that ends each text of an encoder's input, or None; RoBERTa's is its eos."""
        return self.find("sep_token", *(["</s>"] if self.backend.token_to_id("<mask>") is not None else []))

    @property
    def unk_id(self) -> int | None:
        """The token for what the vocabulary lacks, or None when nothing can be lacking.

        GPT-2's configuration names an unknown token that its bytes never need: the model itself decides.
        """
        if type(self.backend.model).__name__ == "BPE":
            name = self.backend.model.unk_token
            found: int | None = self.backend.token_to_id(name) if name else None
            return found
        return self.find("unk_token")

    @property
    def model_max_length(self) -> int | None:
        """The tokens that the model takes at most, or None where the files do not say."""
        value = self.config.get("model_max_length")
        return int(value) if isinstance(value, int | float) and 0 < value < ENDLESS else None

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """The side on which a batch is filled."""
        return "left" if self.config.get("padding_side") == "left" else "right"

    @property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates by name; the usual one is `default`."""
        found = self.config.get("chat_template")
        rows = found if isinstance(found, list) else [{"name": "default", "template": found}]
        named = {row.get("name"): row.get("template") for row in rows if isinstance(row, dict)}
        return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}

    @property
    def chat_template(self) -> str | None:
        """The template that turns messages into a prompt (`lmworks.tokens.chat.render_chat`), or None."""
        return self.chat_templates.get("default")

    @cached_property
    def is_lossless(self) -> bool:
        """True when every text survives encoding and decoding: byte-level, all 256 bytes, nothing is rewritten."""
        alphabet = require("tokenizers", extra="text").pre_tokenizers.ByteLevel.alphabet()
        byte_level = {"type": "ByteLevel", "add_prefix_space": False}.items() <= self.pre_tokenizer.items()
        eats = any(token.lstrip or token.rstrip for token in self.backend.get_added_tokens_decoder().values())  # blanks
        whole = not eats and all(self.backend.token_to_id(byte) is not None for byte in alphabet)
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
        found: str | None = guard(lambda: self.backend.id_to_token(id), "this id cannot be a token's")
        return found

    def find(self, key: str, *usual: str) -> int | None:
        """Return the id of the special token that the config names under `key`, else of the first usual one.

        A config that says null says that there is none.
        """
        names = [legacy.content(self.config[key])] if self.config.get(key) else []
        if key not in self.config:
            names = [*usual, *USUAL.get(key, ())]
        return next((id for name in names if (id := self.backend.token_to_id(name)) is not None), None)


def read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json with what transformers keeps beside it: special tokens and chat templates."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    config, beside = (read_json(path) if path.is_file() else {} for path in paths)
    config |= {key: value for key, value in beside.items() if key not in config}
    files = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    files |= {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    texts = {name: "\n".join(legacy.read_lines(path)) for name, path in files.items()}
    if texts:
        rows = [{"name": name, "template": text} for name, text in texts.items()]
        config["chat_template"] = texts["default"] if list(texts) == ["default"] else rows
    return config


def template_file(name: str) -> str:
    """Return the file of a chat template; raise FormatError for a name that would leave the folder."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise FormatError("a chat template has a name that cannot be a file's", found=name[:100])
    return "chat_template.jinja" if name == "default" else f"{TEMPLATES}/{name}.jinja"


def flags(token: Any) -> dict[str, Any]:
    """Return an added token as tokenizer_config.json holds it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def plain(value: Any) -> Any:
    """Return special tokens without the type mark that transformers 4 refuses in special_tokens_map.json."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items() if key != "__type"} if isinstance(value, dict) else value


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
    except (KeyboardInterrupt, SystemExit, MemoryError, LmworksError):
        raise
    except BaseException as error:
        raise FormatError(what, where=where, found=str(error)[:300] or type(error).__name__) from None
