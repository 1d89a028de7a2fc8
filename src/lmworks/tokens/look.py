"""What is inside a tokenizer: its steps, its tokens, and the traps that it sets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.tokens.by_hand import HIDDEN, PRINTABLE
from lmworks.tokens.tokenizer import Tokenizer, read_config

STEPS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
PARTS = ("normalizers", "pretokenizers", "processors", "decoders")
BULKY = ("type", "vocab", "merges", "precompiled_charsmap", "special_tokens")
SHORT = 120  # characters of a setting that are shown
PROBES = {  # what a tokenizer may lose: the smallest text that shows it
    "capitals": "Ab aB",
    "accents": "é ñ ü",
    "blanks before a text": " a",
    "several blanks": "a  b",
    "blanks beside signs": "a, b .c",
    "line ends": "a\nb\n\nc",
    "tabs": "a\tb",
    "wide letters and ligatures": "ｆ ﬁ ²",
    "composed and decomposed forms": "é e\u0301",
    "control characters": "a\u0007b\u200bc",
    "emoji": "😀 👩\u200d👧",
    "Greek": "ὁ λόγος",
    "Cyrillic": "слово",
    "Hindi": "शब्द",
    "Chinese": "词语",
}
BYTE = re.compile("<0x[0-9A-F]{2}>")
PLACEHOLDER = re.compile(r"\W*(unused|reserved|extra_id|placeholder)\w*\W*", re.IGNORECASE)


def open_tokenizer(source: str | Path) -> tuple[Tokenizer, Path]:
    """Read a tokenizer from a file, a folder, or a model of the Hub; return it and its folder."""
    path = Path(source)
    if path.is_file():
        return Tokenizer.from_file(path, config=read_config(path.parent)), path.parent
    folder = find_folder(str(source))
    return Tokenizer.from_pretrained(folder), folder


def list_steps(tokenizer: Tokenizer) -> list[tuple[str, str, str]]:
    """Return (stage, type, settings) for every step from text to ids and back."""
    state = json.loads(tokenizer.backend.to_str())
    rows = []
    for stage in STEPS:
        for step in flatten(state.get(stage)):
            rest = {key: value for key, value in step.items() if key not in BULKY and value is not None}
            said = json.dumps(rest, ensure_ascii=False)[1:-1]
            rows.append((stage, str(step.get("type")), said if len(said) <= SHORT else f"{said[:SHORT]}…"))
    return rows


def flatten(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return a step, or those that a sequence of steps is made of."""
    if not step:
        return []
    inner = next((step[name] for name in PARTS if isinstance(step.get(name), list)), None)
    return [step] if inner is None else [one for part in inner for one in flatten(part)]


def cut_up(tokenizer: Tokenizer, text: str) -> list[dict[str, Any]]:
    """Return the tokens of a text as its model reads it: id, token, the text it covers, where that is."""
    found = tokenizer.encode_inputs([text])[0]
    return [
        {"id": id, "token": token, "start": start, "end": end, "text": text[start:end], "special": bool(special)}
        for id, token, (start, end), special in zip(
            found.ids, found.tokens, found.offsets, found.special_tokens_mask, strict=True
        )
    ]


def follow(tokenizer: Tokenizer, text: str) -> tuple[str, list[str]]:
    """Return a text after the normalizer, and the words that it is then cut into."""
    backend = tokenizer.backend
    normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    if backend.pre_tokenizer is None:
        return normal, [normal]
    return normal, [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Say whether every byte has a token, so that nothing is unknown."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    known = tokenizer.backend.token_to_id
    if model.get("byte_fallback"):
        return all(known(f"<0x{byte:02X}>") is not None for byte in range(256))
    alphabet = require("tokenizers", extra="text").pre_tokenizers.ByteLevel.alphabet()
    return '"ByteLevel"' in json.dumps(tokenizer.pre_tokenizer) and all(
        known(letter) is not None for letter in alphabet
    )


def make_speller(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Return what gives the bytes that a token stands for, be they a part of a character; b"" for a special one.

    Byte-level BPE writes each byte as a letter: what prints as itself, the others as the letters from 256 on, in order.
    """
    decoder = json.dumps(json.loads(tokenizer.backend.to_str())["decoder"], ensure_ascii=False)
    special = {id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    letters = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}

    def spell(id: int) -> bytes:
        name = str(tokenizer.token(id))
        if id in special:
            return b""
        if '"ByteLevel"' in decoder and letters.keys() >= set(name):
            return bytes(letters[letter] for letter in name)
        if '"ByteFallback"' in decoder and BYTE.fullmatch(name):
            return bytes.fromhex(name[3:5])
        return (name.replace("▁", " ") if "▁" in decoder else tokenizer.decode([id])).encode()

    return spell


def find_lost(tokenizer: Tokenizer) -> list[str]:
    """Return the kinds of text (PROBES) that do not come back from their tokens."""
    return [name for name, text in PROBES.items() if not tokenizer.knows(text)]


def find_unused(tokenizer: Tokenizer, rows: int | None) -> dict[str, list[Any]]:
    """Return ids without a token below the highest, rows of the embedding beyond it, and tokens kept in reserve."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    ids = set(vocabulary.values())
    top = max(ids, default=-1) + 1
    return {
        "holes": sorted(set(range(top)) - ids),
        "rows_without_token": list(range(top, rows)) if rows is not None else [],
        "reserved": sorted((token for token in vocabulary if PLACEHOLDER.fullmatch(token)), key=vocabulary.__getitem__),
    }


def longest_tokens(tokenizer: Tokenizer, count: int = 10) -> list[tuple[int, str]]:
    """Return the tokens that stand for most characters, special ones left out: (id, text)."""
    special = set(tokenizer.backend.get_added_tokens_decoder())
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    likely = sorted(
        (id for id in vocabulary.values() if id not in special), key=lambda i: -len(str(tokenizer.token(i)))
    )
    texts = [(id, tokenizer.decode([id], skip_special_tokens=False)) for id in likely[: 20 * count]]
    return sorted(texts, key=lambda row: (-len(row[1]), row[0]))[:count]


def find_traps(tokenizer: Tokenizer, rows: int | None) -> list[str]:
    """Return sentences on what is known to go wrong with such a tokenizer."""
    traps = []
    top = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if rows is not None and top >= rows:
        traps.append(
            f"Its highest id is {top}, and the model's embedding has {rows} rows: such a token is an index out of "
            "range. lmworks finetune --add-tokens fit gives it rows."
        )
    model = json.loads(tokenizer.backend.to_str())["model"]
    unknown = model.get("unk_token") if model.get("type") != "Unigram" else model.get("unk_id")
    missing = unknown is None or (isinstance(unknown, str) and tokenizer.backend.token_to_id(unknown) is None)
    if missing and not has_byte_fallback(tokenizer):
        traps.append("It has no unknown token and not every byte: what it does not know vanishes or fails.")
    lost = find_lost(tokenizer)
    if lost:
        traps.append(f"Not everything comes back from its tokens: {', '.join(lost)}. Bits per byte may be undefined.")
    if tokenizer.pad_id is None:
        traps.append("It has no padding token, so texts cannot be put into one batch.")
    elif tokenizer.pad_id == tokenizer.eos_id:
        traps.append("Its padding token is the one that ends texts: a model that never learns the end never stops.")
    for key in ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token"):
        if tokenizer.config.get(key) and tokenizer.find(key) is None:
            traps.append(f"Its configuration names a {key} that the vocabulary lacks: {tokenizer.config[key]}.")
    eager = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if (t.lstrip or t.rstrip)]
    if eager:
        traps.append(f"These tokens take in the blanks beside them: {', '.join(eager[:5])}.")
    return traps
