"""Qwen3: Qwen2 whose queries and keys are normalised head by head, without their biases (Yang et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmworks.models.config import Config
from lmworks.models.families import qwen2
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import fill

NAME, PREFIX = "Qwen3", "model."
KEYS: dict[str, str | tuple[str, ...]] = {
    **qwen2.KEYS,
    **{f"layers.{{}}.self_attn.{name}_norm": f"layers.{{}}.attention.{name}_norm" for name in "qk"},
}
TRANSPOSED, IGNORED, heads = qwen2.TRANSPOSED, qwen2.IGNORED, qwen2.heads


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config; a head has 128 numbers where it says nothing."""
    bias = Fields(hf).flag("attention_bias", False)
    found = qwen2.config(fill(hf, head_dim=128))
    return replace(found, model_type="qwen3", qk_norm=True, attention_bias=bias, output_bias=None, source=hf)


def to_hf(c: Config) -> dict[str, Any]:
    """Write what `config` reads."""
    return {**qwen2.to_hf(c), "attention_bias": c.attention_bias}
