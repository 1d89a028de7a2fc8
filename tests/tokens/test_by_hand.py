"""The readable BPE learns the merges of the tokenizers library, and GPT-2's own vocabulary gives GPT-2's ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tokens.test_legacy import FOLDERS

from lmworks.tokens import by_hand
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

CORPORA = {"conlang/tokipona/wikipesija.txt": 300, "udhr/jpn.txt": 250, "books/botchan.txt": 200}
KNOWN = {  # ids of GPT-2, as llama.cpp's tests have them (models/ggml-vocab-gpt-2.gguf.inp and .out, MIT)
    "ied 4 ½ months": [798, 604, 25208, 1933],
    "Führer": [37, 9116, 71, 11751],
    "   ": [220, 220, 220],
    "\n\n": [628],
    "\n\n\n": [628, 198],
    "\t\n": [197, 198],
    "Hello world": [15496, 995],
    " Hello World!": [18435, 2159, 0],
    "Hello, world!": [15496, 11, 995, 0],
    " this is 🦙.cpp": [428, 318, 12520, 99, 247, 13, 20322],
    "w048 7tuijk dsdfhu": [86, 47202, 767, 28047, 45961, 288, 82, 7568, 13415],
    "нещо на Български": [
        22177, 16843, 141, 231, 15166, 12466, 121, 16142, 12466, 239, 141, 232, 30143, 140, 111, 16142, 21169, 21727,
        31583, 18849,
    ],
    "    Hello\n    Hello": [220, 220, 220, 18435, 198, 220, 220, 220, 18435],
    "\n =": [198, 796],
    "' era": [6, 6980],
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～": [
        15496, 11, 331, 6, 439, 0, 1374, 389, 345, 30325, 223, 5633, 22755, 239, 46349, 111, 28839, 101, 18040, 32432,
        98, 43291, 1485, 1415, 24309, 25465, 171, 121, 252,
    ],
    "3": [18], "33": [2091], "333": [20370], "3333": [24840], "33333": [2091, 20370], "333333333": [24840, 2091, 20370],
}  # fmt: skip


def spell(piece: bytes, backend: Tokenizer) -> str:
    """Return a piece in the letters of byte-level tokens: ids 2 to 257 are the bytes in the order of their ids."""
    letters = dict(zip(by_hand.ORDER, (backend.token(id) for id in range(2, 258)), strict=True))
    return "".join(str(letters[byte]) for byte in piece)


@pytest.mark.parametrize("name", CORPORA)
def test_merges_are_those_of_the_library(name: str, data_folder: Path) -> None:
    """Row 25. Of equal counts the lower ids win: on these corpora that decides dozens of merges."""
    text = (data_folder / name).read_text("utf-8")[:120_000]
    theirs = train_tokenizer([text], vocab_size=258 + CORPORA[name])
    merges = by_hand.learn([text], CORPORA[name])
    expected = json.loads(theirs.backend.to_str())["model"]["merges"]
    assert [[spell(one, theirs), spell(two, theirs)] for one, two in merges] == expected
    pieces = by_hand.encode(text, merges)
    assert [spell(piece, theirs) for piece in pieces] == [theirs.token(id) for id in theirs.encode(text)]
    assert b"".join(pieces).decode() == text


def test_rare_pairs_are_left_alone() -> None:
    assert by_hand.learn(["ab ab ac"], 9) == [(b"a", b"b")]
    assert by_hand.learn(["ab ab ac"], 9, min_frequency=3) == []
    assert by_hand.encode("abab", [(b"a", b"b")]) == [b"ab", b"ab"]
    assert by_hand.join([b"a"] * 3, (b"a", b"a")) == [b"aa", b"a"]


def test_the_published_vocabulary_gives_known_ids(data_folder: Path, tmp_path: Path) -> None:
    """GPT-2's ids of other people's tests, through the library and through the readable encoder."""
    gpt2 = Tokenizer.from_pretrained(FOLDERS["gpt2"](tmp_path, data_folder))
    assert {text: gpt2.encode(text) for text in KNOWN} == KNOWN
    letters = {letter: byte for byte, letter in ((b, spell_byte(b)) for b in range(256))}
    state = json.loads(gpt2.backend.to_str())["model"]
    merges = [tuple(bytes(letters[c] for c in part) for part in pair) for pair in state["merges"]]
    ids = {bytes(letters[c] for c in token): id for token, id in state["vocab"].items() if set(token) <= set(letters)}
    for text, expected in KNOWN.items():
        assert [ids[piece] for piece in by_hand.encode(text, merges)] == expected  # type: ignore[arg-type]


def spell_byte(byte: int) -> str:
    """Return GPT-2's letter of a byte."""
    place = by_hand.ORDER.index(byte) - len(by_hand.PRINTABLE)
    return chr(byte) if place < 0 else chr(256 + place)
