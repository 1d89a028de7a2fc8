"""Special tokens as published files name them, and saved folders that transformers 4, 5 and transformers.js read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tokens.real_texts import real_texts
from tests.tokens.test_legacy import FLAGS, FOLDERS, MINILM, check_same
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def published(folder: Path, **config: Any) -> Path:
    """Write a folder with a tokenizer.json that has `<s> </s> <pad>` and what `config` says."""
    tokenizer = train_tokenizer(["some text to train on, again and again"], vocab_size=300)
    tokenizer.backend.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_start|>"])
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_special_tokens_come_from_the_config_then_the_map_then_usage(tmp_path: Path) -> None:
    """C25: a wrong end or padding token is silent."""
    folder = published(tmp_path, eos_token={"__type": "AddedToken", "content": "</s>", **FLAGS}, unk_token=None)
    names = {"eos_token": "<s>", "bos_token": {"content": "<s>", **FLAGS}, "unk_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    ours = Tokenizer.from_pretrained(folder)
    token = ours.backend.token_to_id
    assert ours.eos_id == token("</s>")
    assert ours.bos_id == token("<s>")
    assert ours.pad_id == token("<|pad|>")  # nothing names it: the usual one
    assert (ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id) == (None, None, None, None)
    (folder / "tokenizer_config.json").write_text('{"pad_token": null, "eos_token": "<nowhere>"}')
    again = Tokenizer.from_pretrained(folder)
    assert (again.pad_id, again.eos_id) == (None, None)  # null means none; a token that is not there is none


@pytest.mark.parametrize(("value", "found"), [(512, 512), (1e30, None), (10**30, None), (None, None), ("x", None)])
def test_model_max_length(value: Any, found: int | None, tmp_path: Path) -> None:
    """C32: what nobody said is no limit."""
    assert Tokenizer.from_pretrained(published(tmp_path, model_max_length=value)).model_max_length == found


def test_padding_side(tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(published(tmp_path, padding_side="left")).padding_side == "left"
    assert Tokenizer.from_pretrained(published(tmp_path)).padding_side == "right"


@pytest.mark.parametrize("name", ["minilm", "roberta", "qwen2", "phi"])
def test_a_saved_folder_is_the_original_to_transformers(name: str, tmp_path: Path, data_folder: Path) -> None:
    """C8: first saved by transformers 5, then by us, then read by transformers 5."""
    if name == "minilm":
        shutil.copytree(MINILM, tmp_path / "from", ignore=shutil.ignore_patterns("*.safetensors", "vocab.txt"))
    else:
        (tmp_path / "older").mkdir()
        AutoTokenizer.from_pretrained(FOLDERS[name](tmp_path / "older", data_folder)).save_pretrained(tmp_path / "from")
    before = AutoTokenizer.from_pretrained(tmp_path / "from")
    ours = Tokenizer.from_pretrained(tmp_path / "from")
    ours.save(tmp_path / "to")
    after = AutoTokenizer.from_pretrained(tmp_path / "to")
    texts = real_texts(data_folder, count=24)
    check_same(ours, before, texts)
    check_same(Tokenizer.from_pretrained(tmp_path / "to"), after, texts)
    assert [after(text)["input_ids"] for text in texts] == [before(text)["input_ids"] for text in texts]
    assert [getattr(after, key) for key in NAMES] == [getattr(before, key) for key in NAMES]
    assert after.added_tokens_encoder == before.added_tokens_encoder
    assert after.model_max_length == before.model_max_length


def test_what_transformers_4_needs_is_written(tmp_path: Path) -> None:
    """C8: it knows no TokenizersBackend, takes extra_special_tokens for a dict, and reads special_tokens_map.json."""
    mask = {"__type": "AddedToken", "content": "<mask>", **FLAGS, "lstrip": True}
    folder = published(
        tmp_path,
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<|im_start|>"],
        eos_token="</s>",
        mask_token=mask,
        my_own_key={"kept": [1, 2]},
        chat_template=CHATML,
    )
    ours = Tokenizer.from_pretrained(folder)
    ours.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # GPT-2 would add types to its embeddings
    assert "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert config["my_own_key"] == {"kept": [1, 2]}
    assert config["chat_template"] == CHATML
    named = json.loads((tmp_path / "saved" / "special_tokens_map.json").read_text())
    assert named["eos_token"] == "</s>"
    assert named["mask_token"] == {key: value for key, value in mask.items() if key != "__type"}
    added = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["added_tokens"]
    assert {str(row.pop("id")): row for row in added} == config["added_tokens_decoder"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token, str(theirs.mask_token), theirs.chat_template) == ("</s>", "<mask>", CHATML)
    assert "<|im_start|>" in theirs.all_special_tokens
    assert theirs("<|im_start|>user")["input_ids"] == ours.encode("<|im_start|>user")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    again.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_named_class_is_kept(tmp_path: Path) -> None:
    Tokenizer.from_pretrained(MINILM).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "BertTokenizer"
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__ == "BertTokenizer"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "BertTokenizer"),
        ("gpt2", "GPT2Tokenizer"),
        ("roberta", "RobertaTokenizer"),
        ("phi", "CodeGenTokenizer"),
    ],
)
def test_a_family_is_named_where_the_folder_did_not(name: str, kind: str, tmp_path: Path, data_folder: Path) -> None:
    """Or transformers 4 would give DistilBERT and GPT-2 token types, which they fail on or add to their embeddings."""
    FOLDERS[name](tmp_path, data_folder)
    Tokenizer.from_pretrained(tmp_path).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == kind


def test_the_jinja_file_comes_before_the_config(tmp_path: Path) -> None:
    """As transformers 5 reads a folder that has both."""
    folder = published(tmp_path, chat_template="old", eos_token="</s>")
    (folder / "chat_template.jinja").write_bytes(b"{{ bos_token }}\r\nnew")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.from_pretrained(folder).chat_template == theirs.chat_template == "{{ bos_token }}\nnew"
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_pretrained(folder).chat_template == "old"
    assert Tokenizer.from_pretrained(MINILM).chat_template is None


def test_named_templates_survive(tmp_path: Path) -> None:
    rows = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    ours = Tokenizer.from_pretrained(published(tmp_path, chat_template=rows))
    assert ours.chat_templates == {"default": "a", "tool_use": "b"}
    assert ours.chat_template == "a"
    ours.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == ours.chat_templates
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat_template"] == rows
    (tmp_path / "saved" / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_pretrained(tmp_path / "saved").chat_templates == ours.chat_templates
    ours.config["chat_template"] = [{"name": "../../outside", "template": "x"}]
    with pytest.raises(FormatError, match="cannot be a file's"):
        ours.save(tmp_path / "hostile")


@pytest.mark.parametrize(
    ("key", "value"), [("do_lower_case", False), ("strip_accents", True), ("tokenize_chinese_chars", False)]
)
def test_settings_beside_the_file_count(key: str, value: bool, tmp_path: Path) -> None:
    """A tokenizer_config.json that was edited changes BERT's tokens here as it does in transformers."""
    source = MINILM
    for name in ("tokenizer.json", "vocab.txt", "config.json"):
        shutil.copy(source / name, tmp_path / name)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, key: value}))
    text = "Zoë Müller lives in 東京 and LONDON"
    expected = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert Tokenizer.from_pretrained(tmp_path).encode_inputs([text])[0].ids == expected
    assert Tokenizer.from_pretrained(source).encode_inputs([text])[0].ids != expected or key == "strip_accents"
