"""The wrapper over tokenizer.json against transformers, and what must never escape it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError, InputError
from lmworks.tokens.tokenizer import EOS, PAD, UNK, Tokenizer
from lmworks.tokens.train import train_tokenizer

ENGLISH = "the cat sat on the mat.\nThe dog did not.\n"
MIXED = "naïve café, 東京 and 12 345 \U0001f600!\n\n  indented\ttab\r\n"
TEXTS = [ENGLISH, MIXED] * 9
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates and NUL included


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=400)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return train_tokenizer(TEXTS, kind="char")


@pytest.fixture(params=["bpe", "char"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Path]:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    tokenizer.save(tmp_path, max_length=128)
    return tokenizer, tmp_path


def test_transformers_reads_the_saved_folder(saved: tuple[Tokenizer, Path]) -> None:
    """C8: tokenizer saved by one version unreadable elsewhere."""
    tokenizer, folder = saved
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (EOS, EOS, PAD)
    assert theirs.unk_token == (UNK if tokenizer.unk_id is not None else None)
    assert theirs.model_max_length == 128
    for text in [*TEXTS[:2], "unseen Ω here ?", "is n't it , no ?", f"a{EOS}b", ""]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # TokenizersBackend is refused by transformers 4
    assert config["clean_up_tokenization_spaces"] is False


def test_reload_gives_the_same_tokenizer(saved: tuple[Tokenizer, Path]) -> None:
    tokenizer, folder = saved
    again = Tokenizer.from_pretrained(folder)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    for name in ("vocab_size", "eos_id", "pad_id", "unk_id", "is_lossless"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_special_ids(bpe: Tokenizer, char: Tokenizer) -> None:
    """C25: with pad = eos, the end is masked away and a model never learns to stop."""
    assert (bpe.eos_id, bpe.pad_id, bpe.unk_id) == (0, 1, None)
    assert (char.eos_id, char.pad_id, char.unk_id) == (0, 1, 2)
    assert bpe.token(0) == EOS
    assert bpe.encode(f"a{EOS}") == [*bpe.encode("a"), 0]


def without_surrogates(text: str) -> str:
    """The text with a replacement character for each lone surrogate, which UTF-8 cannot hold."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_bpe_loses_nothing(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text), skip_special_tokens=False) == without_surrogates(text)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_char_gives_one_token_a_grapheme_cluster(char: Tokenizer, text: str) -> None:
    known = {cluster for line in TEXTS for cluster in regex.findall(r"\X", line)}
    assume(not any(token in text for token in char.backend.get_vocab() if token.startswith("<|")))
    whole = without_surrogates(text)
    clusters = [cluster for cluster, _ in char.backend.pre_tokenizer.pre_tokenize_str(whole)]
    ids = char.encode(text)
    assert "".join(clusters) == whole and len(ids) == len(clusters)
    assert [id == char.unk_id for id in ids] == [cluster not in known for cluster in clusters]
    assert char.knows(text) == (set(clusters) <= known)


def test_is_lossless_is_about_the_whole_tokenizer(bpe: Tokenizer, char: Tokenizer, data_folder: Path) -> None:
    assert bpe.is_lossless
    assert not char.is_lossless
    folder = data_folder / "tokenizers" / "gpt2"
    merges = [tuple(line.split()) for line in (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]]
    model = tokenizers.models.BPE(json.loads((folder / "encoder.json").read_text("utf-8")), merges)
    gpt2 = tokenizers.Tokenizer(model)
    for prefix in (False, True):
        gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        gpt2.decoder = tokenizers.decoders.ByteLevel()
        ours = Tokenizer(gpt2, config={"unk_token": EOS, "eos_token": EOS})
        assert ours.unk_id is None
        assert ours.is_lossless == (not prefix)
        assert ours.knows("word") == (not prefix)
    assert ours.encode("Hello world") == [18435, 995]
    gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.normalizer = tokenizers.normalizers.Lowercase()
    lower = Tokenizer(gpt2)
    assert not lower.is_lossless
    assert lower.knows("word")
    assert not lower.knows("Word")


def test_a_panic_becomes_an_error(tmp_path: Path) -> None:
    """The library's panics derive from BaseException: one such text would end a server's loop."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError, match="failed on this text"):
        tokenizer.encode("a" * 24 + "!")


def test_damaged_files_are_named(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model folder"):
        Tokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_pretrained(tmp_path)
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[]", whole.replace(b'"merges"', b'"merge"')):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="cannot be read"):
            Tokenizer.from_pretrained(tmp_path)


def test_settings_inside_a_file_do_not_change_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    """Published files carry truncation and padding; a text must not be cut behind the user's back."""
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode(TEXTS[0]) == bpe.encode(TEXTS[0])


def test_wrong_ids_end_in_an_error_or_in_nothing(bpe: Tokenizer) -> None:
    assert bpe.decode([10**6]) == ""
    with pytest.raises(FormatError, match="cannot be decoded"):
        bpe.decode([-1])


def test_a_token_that_eats_blanks_loses_something(bpe: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken("<ent>", rstrip=True)])
    tokenizer = Tokenizer(backend)
    assert not tokenizer.is_lossless and tokenizer.knows("a b") and not tokenizer.knows("a <ent> b")
