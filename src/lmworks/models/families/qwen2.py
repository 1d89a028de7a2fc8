"""Qwen2: Llama with biases on queries, keys and values (Yang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.families import llama
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, read_decoder, read_window, shared, write_decoder

NAME, PREFIX = "Qwen2", "model."
KEYS, TRANSPOSED, IGNORED = llama.KEYS, llama.TRANSPOSED, llama.IGNORED


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder."""
    return {"Model": HeadSpec(outputs="none"), **decoder_heads(qa_prefix="transformer.")}


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; the window counts only where `use_sliding_window` says so."""
    f, fields = Fields(hf), read_decoder(hf, norm="rms_norm_eps", positions=32768)
    size = f.integer("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
    window = read_window(hf, fields["num_hidden_layers"], size, f.integer("max_window_layers", 28))
    return Config(model_type="qwen2", norm="rms", gated=True, attention_bias=True, output_bias=False, mlp_bias=False,
                  **window, **fields, **shared(hf, tie=False))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    kinds = ["sliding_attention" if i in c.local_layers else "full_attention" for i in range(c.num_hidden_layers)]
    return {**write_decoder(c, norm="rms_norm_eps"), "use_sliding_window": bool(c.local_layers), "layer_types": kinds,
            "sliding_window": c.window, "max_window_layers": min(c.local_layers, default=28)}  # fmt: skip
