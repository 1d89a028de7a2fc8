"""Configs as they were published: read like transformers reads them, and written so that nothing is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import PUBLISHED

from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.families import architecture, read_config, read_kind, write_config

SMALL = {  # what makes a network small without changing its kind
    "vocab_size": 120, "hidden_size": 64, "dim": 64, "n_embd": 64, "intermediate_size": 48, "hidden_dim": 48,
    "num_hidden_layers": 4, "n_layers": 4, "n_layer": 4, "num_attention_heads": 4, "n_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "local_attention": 12, "max_window_layers": 2, "image_size": 64,
}  # fmt: skip


def read_as_5(hf: dict[str, Any], folder: Path) -> Path:
    """Let transformers 5 read a config and write it in its own form."""
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text(json.dumps(hf))
    transformers.AutoConfig.from_pretrained(folder / "old").save_pretrained(folder / "new")
    return folder / "new"


def shape(folder: Path) -> dict[str, Any]:
    """Return everything a Config says but where it came from."""
    found = dataclasses.asdict(read_config(folder))
    del found["source"]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_generations_say_the_same(name: str, tmp_path: Path) -> None:
    """The published form and what transformers 5 makes of it describe the same network, labels and tokens."""
    new = read_as_5(PUBLISHED[name], tmp_path)
    old, again = shape(tmp_path / "old"), shape(new)
    if name == "meta-llama/Llama-3.1-8B-Instruct":  # transformers keeps only what it knows
        assert old["eos_token_id"] == (128001, 128008, 128009)
    assert old == again


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    """R82: every key of the file, known or not, is there unchanged when it is written again."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    config = read_config(tmp_path)
    kind = read_kind(config)
    assert architecture(config.model_type, kind) == PUBLISHED[name]["architectures"][0]
    written = write_config(config, kind)
    for key, value in PUBLISHED[name].items():
        assert written[key] == value, key


@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_numbers_of_a_small_twin(name: str, tmp_path: Path) -> None:
    """A small network with every other setting as published gives transformers' numbers, from the old form too."""
    hf = {key: SMALL.get(key, value) for key, value in PUBLISHED[name].items()}
    hf["sliding_window"] = 9 if hf.get("sliding_window") and hf.get("use_sliding_window", True) else None
    if hf["model_type"] not in {"mistral", "qwen2"}:
        del hf["sliding_window"]
    ends = {key: 3 for key in hf if key.endswith("_token_id") and hf[key] is not None and key != "pad_token_id"}
    hf |= ends | ({"pad_token_id": 1} if hf.get("pad_token_id") else {})
    torch.manual_seed(0)
    reference = getattr(transformers, hf["architectures"][0])(transformers.AutoConfig.from_pretrained(
        write_json(tmp_path / "old", hf)
    )).eval()  # fmt: skip
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path / "old")
    write_json(tmp_path / "old", hf)  # the old form again, beside the weights
    model = load_model(tmp_path / "old")
    x = torch.randn(2, 3, 64, 64) if hf["model_type"] == "vit" else torch.randint(4, 120, (2, 60))
    expected = reference(x).logits
    assert torch.allclose(model(x), expected, atol=1e-5)
    save_model(model, tmp_path / "again")
    reloaded, info = type(reference).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(reloaded.eval()(x).logits, expected)


def write_json(folder: Path, value: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(value))
    return folder
