"""A folder of ours as vLLM takes it: what it reads of a folder is there, and names what it knows.

vLLM itself needs graphics cards and is not run; it reads configurations, tokenizers and names as transformers does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_page import made_folder

from lmworks.runtime.predictor import load

# of vllm/model_executor/models/registry.py, _TEXT_GENERATION_MODELS
KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM",
         "Phi3ForCausalLM", "GPT2LMHeadModel"}  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    """A Llama that `lmworks build` trained for a moment."""
    return made_folder()


def test_the_configuration_says_what_vllm_asks(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert set(config["architectures"]) <= KNOWN
    assert config["dtype"] == config["torch_dtype"] == "float32"
    read = transformers.AutoConfig.from_pretrained(folder)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings", "eos_token_id"):  # fmt: skip
        assert getattr(read, name) == config[name], name
    assert "auto_map" not in config and not list(folder.glob("*.py")), "nothing to trust with --trust-remote-code"


def test_weights_tokenizer_and_answers_are_those_of_transformers(folder: Path) -> None:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load(folder, runtime="torch")
    text = "the red fox"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert (
        ours.generate(text, max_tokens=8, temperature=0.0).text.strip()
        == tokenizer.decode(written, skip_special_tokens=True).strip()
    )
