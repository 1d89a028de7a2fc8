"""The folder of an n-gram model, and from its texts to tokens.

    DIR/model.arpa          the model as KenLM and SRILM read it
    DIR/model.safetensors   the same to the last bit, read in a moment
    DIR/config.json         order, smoothing, what a token is
    DIR/vocab.json          the words by id, or tokenizer.json where the tokens are a tokenizer's

Words are what stands between blanks; `<s>`, `</s>`, `<unk>` and `<UNK>` that are written out in a text are left out
in training and unknown in scoring, as KenLM's --skip_symbols has it; a reader of ARPA files takes <UNK> for <unk>.

Shapes: N tokens of a stream, V vocabulary.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_bytes, write_json
from lmworks.base.safetensors_header import check_header
from lmworks.base.types import Ints
from lmworks.models.ngram import NgramModel
from lmworks.models.ngram_arpa import BEGIN, END, UNKNOWN, read_arpa, write_arpa
from lmworks.models.ngram_smoothing import Level
from lmworks.text.read import read_documents
from lmworks.tokens.batch import make_stream
from lmworks.tokens.tokenizer import Tokenizer

ARPA, ARRAYS, VOCABULARY, TYPE = "model.arpa", "model.safetensors", "vocab.json", "lmworks-ngram"
WORD = "word"
SYMBOLS = tuple(name.encode() for name in (BEGIN, END, UNKNOWN, UNKNOWN.upper()))
ODD = re.compile(rb"[\0\x0b\x0c]")  # Python splits at two of these, KenLM at the other one
BLANKS = re.compile(rb"[\0\t\n\r ]+")


@dataclass(frozen=True)
class Opened:
    """A model, what its tokens are called, and how a text becomes tokens."""

    model: NgramModel
    names: list[str]
    kind: str
    tokenizer: Tokenizer | None = None
    ids: dict[bytes, int] = field(default_factory=dict, repr=False)

    @property
    def unknown(self) -> int | None:
        """The id of what the vocabulary lacks; None where it lacks nothing."""
        return 1 if self.tokenizer is None else self.tokenizer.unk_id

    def encode(self, lines: Sequence[bytes]) -> Ints:
        """Return the stream `[eos] line [eos] line [eos] …`, (N,)."""
        if self.tokenizer is not None:
            return make_stream(self.tokenizer, [line.decode() for line in lines])
        stream, end = array("i", [0]), array("i", [0])
        for line in lines:
            stream.extend([self.ids.get(word, 1) for word in split(line)])
            stream += end
        return np.frombuffer(stream, np.int32)

    def sizes(self, lines: Sequence[bytes], stream: Ints) -> NDArray[np.int64]:
        """Return how many tokens of their stream each line takes, its end included."""
        ends = np.flatnonzero(stream[1:] == self.model.eos_id)
        if self.tokenizer is not None and len(ends) != len(lines):  # the end token is spelled out in a line
            return np.array([1 + len(ids) for ids in self.tokenizer.encode_batch([line.decode() for line in lines])])
        return np.diff(ends, prepend=-1)

    def context(self, text: str) -> list[int]:
        """Return the tokens of a context; one that begins with <s> begins a sentence."""
        begins = text.lstrip().startswith(BEGIN)
        ids: list[int] = self.encode([text.lstrip().removeprefix(BEGIN).encode()])[1:-1].tolist()
        return [self.model.eos_id] * begins + ids

    def text(self, ids: Sequence[int]) -> str:
        """Return tokens as text."""
        return " ".join(self.names[i] for i in ids) if self.tokenizer is None else self.tokenizer.decode(ids)


def read_lines(texts: str | Path, column: str | None = None) -> list[bytes]:
    """Return the lines of a file or folder in UTF-8; raise InputError where there is no word."""
    lines: list[bytes] = []
    for document in read_documents(texts, column=column):
        found = document.text.encode("utf-8", "replace").split(b"\n")
        lines += found if found[-1] else found[:-1]
    if not any(map(split, lines)):
        raise InputError("there is no text", where=str(texts), fix="give a file with a sentence on each line")
    return lines


def split(line: bytes) -> list[bytes]:
    """Return the words of a line, cut where KenLM cuts."""
    return [word for word in BLANKS.split(line) if word] if ODD.search(line) else line.split()


def count_words(lines: Iterable[bytes], vocab_size: int | None) -> tuple[NDArray[np.int32], list[str]]:
    """Return the stream (N,) and the words by id; of more than `vocab_size` the rarest become UNKNOWN."""
    ids: defaultdict[bytes, int] = defaultdict(lambda: len(ids) + 2)
    number = ids.__getitem__
    stream, end = array("i", [0]), array("i", [0])
    for line in lines:
        words = split(line)
        if any(symbol in line for symbol in SYMBOLS):
            words = [word for word in words if word not in SYMBOLS]
        stream.extend(map(number, words))
        stream += end
    tokens, names = np.frombuffer(stream, np.int32), [END, UNKNOWN, *(word.decode() for word in ids)]
    if vocab_size is None or vocab_size >= len(names):
        return tokens, names
    if vocab_size < 3:
        raise InputError("--vocab-size is out of range", found=str(vocab_size), expected="3 or more")
    counts = np.bincount(tokens, minlength=len(names))[2:]
    kept = np.sort(np.argsort(-counts, kind="stable")[: vocab_size - 2]) + 2
    place = np.ones(len(names), np.int32)
    place[0], place[kept] = 0, np.arange(2, vocab_size)
    return place[tokens], [END, UNKNOWN, *(names[i] for i in kept)]


def save(opened: Opened, folder: Path, settings: dict[str, Any]) -> None:
    """Write the files of a model."""
    from safetensors.numpy import save as serialize

    model = opened.model
    arrays: dict[str, NDArray[Any]] = {"unigrams": model.unigrams}
    for k, level in enumerate(model.levels, 2):
        arrays |= {f"{k}.keys": level.keys, f"{k}.logprobs": level.logprobs, f"{k}.backoff": level.backoff}
    write_bytes(folder / ARRAYS, serialize({name: np.ascontiguousarray(values) for name, values in arrays.items()}))
    if opened.tokenizer is None:
        write_json(folder / VOCABULARY, {"words": opened.names})
    else:
        opened.tokenizer.save(folder)
    names = [END if i == model.eos_id else name for i, name in enumerate(opened.names)]
    with (folder / ARPA).open("w", encoding="utf-8", newline="\n") as file:
        write_arpa(model, names, file)
    write_json(folder / "config.json", {"model_type": TYPE, **settings, "order": model.order, "eos_id": model.eos_id})


def load(path: str | Path) -> Opened:
    """Open a folder that `train` wrote, or an ARPA file; raise FormatError where it is damaged."""
    path = Path(path)
    if path.is_dir() and not (path / ARRAYS).is_file():
        found = sorted(path.glob("*.arpa"))
        if not found:
            raise InputError("there is no n-gram model here", where=str(path), expected=f"{ARRAYS} or a file .arpa",
                             fix="make one: lmworks ngram train FILE -o DIR")  # fmt: skip
        path = found[0]
    if path.is_file():
        model, names = read_arpa(path)
        return Opened(model, names, WORD, None, {name.encode(): i for i, name in enumerate(names) if i > 1})
    if not path.is_dir():
        raise InputError("there is no such model", where=str(path), fix="check the path")
    return load_folder(path)


def load_folder(path: Path) -> Opened:
    """Open a folder that `train` wrote."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = read_json(path / "config.json")
    if config.get("model_type") != TYPE:
        where, found = str(path / "config.json"), str(config.get("model_type"))[:100]
        raise InputError("this is no n-gram model", where=where, found=found, expected=TYPE)
    try:
        check_header(path / ARRAYS)
        arrays = load_file(path / ARRAYS)
        check_numbers(arrays, config["order"], config["eos_id"])
        levels = tuple(
            Level(arrays[f"{k}.keys"], arrays[f"{k}.logprobs"], arrays[f"{k}.backoff"])
            for k in range(2, config["order"] + 1)
        )
        unigrams, eos, smoothing, kind = (arrays["unigrams"], config["eos_id"], config["smoothing"], config["kind"])
    except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
        what = "this n-gram model is damaged"
        where = f"{path / ARRAYS}, config.json"
        raise FormatError(what, where=where, found=str(error)[:200], fix="train it again") from None
    model = NgramModel(len(unigrams), eos, unigrams, levels, smoothing)
    if kind != WORD:
        tokenizer = Tokenizer.from_pretrained(path)
        names = [tokenizer.token(i) or f"<{i}>" for i in range(tokenizer.vocab_size)]
        return Opened(model, names, kind, tokenizer)
    words = read_json(path / VOCABULARY).get("words")
    names = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    if len(names) != len(unigrams):
        raise FormatError("the vocabulary does not fit the model", where=str(path / VOCABULARY),
                          found=f"{len(names)} words", expected=str(len(unigrams)))  # fmt: skip
    return Opened(model, names, kind, None, {name.encode(): i for i, name in enumerate(names) if i > 1})


def check_numbers(arrays: dict[str, NDArray[Any]], order: Any, eos_id: Any) -> None:
    """Raise ValueError unless the arrays are those of a model: sorted keys in range, logarithms of probabilities."""
    V = len(arrays["unigrams"])
    if type(order) is not int or not 1 <= order <= len(arrays) or type(eos_id) is not int or not 0 <= eos_id < V:
        raise ValueError(f"order {order!r}, eos_id {eos_id!r}")
    logs, below = {"unigrams": arrays["unigrams"]}, V
    for k in range(2, order + 1):
        keys, backoff = arrays[f"{k}.keys"], arrays[f"{k}.backoff"]
        logs[f"{k}.logprobs"] = arrays[f"{k}.logprobs"]
        whole = keys.dtype == np.int64 and keys.ndim == 1 and bool((np.diff(keys) > 0).all())
        if not whole or (len(keys) and (keys[0] < 0 or keys[-1] >= below * V)):
            raise ValueError(f"{k}.keys are no n-grams in their order")
        if backoff.shape != (below,) or backoff.dtype != np.float64 or np.isnan(backoff).any():
            raise ValueError(f"{k}.backoff does not fit")
        below = len(keys)
        if logs[f"{k}.logprobs"].shape != (below,):
            raise ValueError(f"{k}.logprobs does not fit")
    for name, values in logs.items():
        if values.dtype != np.float64 or values.ndim != 1 or not (values <= 1e-6).all():
            raise ValueError(f"{name} holds what is no logarithm of a probability")
