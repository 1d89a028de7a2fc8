"""Tiny random checkpoints as transformers makes and saves them: the independent reference of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160}
LLAMA = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 160,
}  # fmt: skip
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}  # greedy search then ends by length only
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

CASES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **NO_TOKENS),
    "gpt2 odd head, untied, exact gelu, own width": lambda: transformers.GPT2Config(
        **{**GPT2, "n_embd": 60}, n_inner=72, activation_function="gelu", tie_word_embeddings=False, **NO_TOKENS
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, **NO_TOKENS),
    "llama grouped": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, **NO_TOKENS),
    "llama one kv head, tied, biases, own head size": lambda: transformers.LlamaConfig(
        **LLAMA, num_key_value_heads=1, head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        **NO_TOKENS,
    ),
    "llama 3": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, rope_parameters=LLAMA3, **NO_TOKENS),
}  # fmt: skip


@dataclass
class Case:
    """A reference model, and the folder that it was saved to."""

    name: str
    reference: Any
    folder: Path


def make_reference(config: Any) -> Any:
    """Return a random model moved away from identity: norms off 1, biases off 0, where faults would hide."""
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():  # a tied model repeats itself where positions are weak
            parameter.add_(torch.randn_like(parameter) * (1.0 if "wpe" in name else 0.15))
    return reference


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Every row of CASES in turn."""
    reference = make_reference(CASES[request.param]())
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return Case(request.param, reference, folder)
