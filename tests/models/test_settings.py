"""Settings that a published config.json may hold: obeyed as transformers obeys them, or refused by their names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmworks.base.errors import LmworksError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.families import find_head, read_config

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": None, "eos_token_id": None}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DISTIL = {"vocab_size": 60, "dim": 24, "hidden_dim": 48, "n_layers": 2, "max_position_embeddings": 64}
MODERN = {**SIZES, "local_attention": 8, "cls_token_id": None, "sep_token_id": None}
DEBERTA = {**SIZES, "relative_attention": True, "position_buckets": 8, "max_relative_positions": -1,
           "pos_att_type": ["p2c", "c2p"], "share_att_key": True}  # fmt: skip
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
    "phi": ("PhiForCausalLM", DECODER),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForMaskedLM", {**SIZES, "type_vocab_size": 2}),
    "albert": ("AlbertForMaskedLM", {**SIZES, "embedding_size": 16}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "modernbert": ("ModernBertForMaskedLM", MODERN),
    "deberta-v2": ("DebertaV2ForMaskedLM", DEBERTA),
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [2.0, 3.0, 4.0, 6.0]}
LONG_8 = {**LONG, "original_max_position_embeddings": 8}
MIXED = ["full_attention", "sliding_attention"] * 2
LINEAR = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 160000.0},
          "sliding_attention": DEFAULT}  # fmt: skip
OBEYED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"is_causal": True}),
    ("llama", {"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "rope_scaling": LLAMA3, "rope_theta": 500.0}),
    ("llama", {"rope_parameters": {**DEFAULT, "rope_theta": 77.0}, "rope_scaling": {}}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": LONG_8, "original_max_position_embeddings": 16}),
    ("phi3", {"rope_scaling": LONG_8}),
    ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 8}),
    ("mistral", {"layer_types": MIXED}),
    ("phi3", {"layer_types": MIXED, "sliding_window": 5}),
    ("qwen2", {"layer_types": MIXED, "sliding_window": 5, "use_sliding_window": True}),
    ("qwen2", {"layer_types": None, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}),
    ("modernbert", {"layer_types": None}),
    ("modernbert", {"layer_types": MIXED, "rope_scaling": None}),
    ("modernbert", {"sliding_window": 2}),
    ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 50.0}, "sliding_attention": DEFAULT}}),
    ("distilbert", {"num_attention_heads": 4, "dim": 32}),
    ("distilbert", {"num_attention_heads": 8, "n_heads": 4, "hidden_size": 32, "num_hidden_layers": 3}),
    ("gpt2", {"num_attention_heads": 8, "hidden_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 32}),
    ("qwen2", {"head_dim": 16}),
    ("phi", {"head_dim": 16}),
    ("phi3", {"head_dim": 16}),
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"is_causal": False}, "is_causal")
      for name in ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2")),
    ("llama", {"is_causal": None}, "is_causal"),
    ("bert", {"is_causal": False, "is_decoder": True}, "is_causal"),
    ("llama", {"rope_parameters": DEFAULT, "rope_scaling": YARN}, "yarn"),
    ("modernbert", {"rope_parameters": LINEAR}, "rope_type"),
    ("modernbert", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
    ("modernbert", {"layer_types": MIXED[:3]}, "layer_types"),
    ("modernbert", {"layer_types": [*MIXED[:3], "chunked_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": MIXED[:3], "sliding_window": 5, "use_sliding_window": True}, "layer_types"),
    ("deberta-v2", {"relative_attention": None}, "relative_attention"),
    ("deberta-v2", {"max_relative_positions": 2**24}, "max_relative_positions"),
    ("bert", {"num_labels": 10**9, "id2label": None}, "num_labels"),
]  # fmt: skip


def write(folder: Path, family: str, more: dict[str, Any]) -> dict[str, Any]:
    """Write config.json as a stranger may have stated it."""
    head, base = BASES[family]
    hf = {"model_type": family, "architectures": [head], **base, **more}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    return hf


def name_case(case: tuple[Any, ...]) -> str:
    """Return the family and the keys of a case."""
    return f"{case[0]} {' '.join(f'{key}={str(value)[:24]}' for key, value in case[1].items())}"


@pytest.mark.parametrize("case", OBEYED, ids=name_case)
@torch.inference_mode()
def test_obeyed(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The numbers are transformers' ones for the same file, also after it was saved by us."""
    hf = write(tmp_path / "their", *case)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "their")
    reference = getattr(transformers, hf["architectures"][0])(config).eval()
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    reference.save_pretrained(tmp_path / "their")
    write(tmp_path / "their", *case)
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    model = load_model(tmp_path / "their")
    assert torch.allclose(model(ids), expected, atol=2e-4)
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == case[0]
    assert torch.allclose(load_model(tmp_path / "ours")(ids), expected, atol=2e-4)


@pytest.mark.parametrize("case", REFUSED, ids=name_case)
def test_refused(case: tuple[str, dict[str, Any], str], tmp_path: Path) -> None:
    """What would give other numbers, or take minutes to read, ends in an error that names the key."""
    write(tmp_path, *case[:2])
    began = time.monotonic()
    with pytest.raises(LmworksError, match=case[2]):
        read_config(tmp_path)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("family", ["qwen3", "albert", "deberta-v2"])
def test_null_is_missing(family: str, tmp_path: Path) -> None:
    """A null leaves the family's own default in place."""
    keys = ("head_dim", "hidden_dropout_prob", "layer_norm_eps")
    write(tmp_path / "null", family, dict.fromkeys(keys))
    hf = write(tmp_path / "absent", family, {})
    kept = {key: value for key, value in hf.items() if key not in keys}
    (tmp_path / "absent" / "config.json").write_text(json.dumps(kept))
    assert read_config(tmp_path / "null") == read_config(tmp_path / "absent")


@pytest.mark.parametrize(
    ("family", "key", "act"),
    [("deberta-v2", "pooler_hidden_act", "mish"), ("modernbert", "classifier_activation", "quick_gelu")],
)
def test_unknown_activation_of_a_head(family: str, key: str, act: str, tmp_path: Path) -> None:
    """It is named, and so are those that there are."""
    write(tmp_path, family, {key: act})
    with pytest.raises(LmworksError, match=key) as error:
        find_head(read_config(tmp_path), "SequenceClassification")
    assert error.value.found == act
