"""Tiny random models of transformers, saved as folders: the independent reference for the exporter and the runtimes.

Every parameter is moved away from its start: norms of 1 and biases of 0 would hide a norm or a bias that is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB, POSITIONS = 211, 96
GPT2 = {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": 64, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied-relu": {"tie_word_embeddings": False, "activation_function": "relu"},
    "gpt2-gelu": {"activation_function": "gelu", "n_inner": 80},
    "llama": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama-gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-llama3": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
}


def make_reference(variant: str, *, seed: int = 0) -> GPT2LMHeadModel | LlamaForCausalLM:
    """Return transformers' model of this variant, with weights that matter."""
    torch.manual_seed(seed)
    settings = VARIANTS[variant]
    if variant.startswith("gpt2"):
        model = GPT2LMHeadModel(GPT2Config(**{**GPT2, **settings}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None  # random models end at random: tests set ends themselves
    return model.eval()


def save_reference(variant: str, folder: Path) -> GPT2LMHeadModel | LlamaForCausalLM:
    """Write the variant's folder as transformers writes it; return the model."""
    model = make_reference(variant)
    model.save_pretrained(folder)
    return model
