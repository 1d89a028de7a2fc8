"""Mistral: Llama in which every layer sees a sliding window (Jiang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.families import llama
from lmworks.models.hf_shared import decoder_heads, read_decoder, read_window, shared, write_decoder

NAME, PREFIX = "Mistral", "model."
KEYS, TRANSPOSED, IGNORED = llama.KEYS, llama.TRANSPOSED, llama.IGNORED


def heads(c: Config) -> Mapping[str, HeadSpec]:
    """The heads of a decoder."""
    return {"Model": HeadSpec(outputs="none"), **decoder_heads()}


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; no window where it states null, 4096 where it says nothing."""
    fields = read_decoder(hf, norm="rms_norm_eps", positions=4096 * 32)
    window = read_window({}, fields["num_hidden_layers"], hf.get("sliding_window", 4096), 0)  # layer_types say nothing
    return Config(model_type="mistral", norm="rms", gated=True, attention_bias=False, mlp_bias=False, **window,
                  **fields, **shared(hf, tie=False, bos=1, eos=2))  # fmt: skip


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return {**write_decoder(c, norm="rms_norm_eps"), "sliding_window": c.window}
