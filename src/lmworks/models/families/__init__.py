"""The families: each turns a published config into ours and back, and names its tensors in one table.

A row of KEYS maps a published module to ours; `{}` is the layer's number. A tuple splits one fused tensor into several;
the sizes come from the shapes that the network expects. `TRANSPOSED` modules are stored (in, out) instead of (out, in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.config import Config
from lmworks.models.families import gpt2, llama


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one published architecture meets our core."""

    config: Callable[[dict[str, Any]], Config]
    to_hf: Callable[[Config], dict[str, Any]]
    keys: dict[str, str | tuple[str, ...]]
    prefix: str  # of the body's tensors inside a model with a head
    architecture: str
    transposed: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()  # endings of tensors that hold no weights: masks and tables


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        config=gpt2.config,
        to_hf=gpt2.to_hf,
        keys=gpt2.KEYS,
        prefix="transformer.",
        architecture="GPT2LMHeadModel",
        transposed=gpt2.TRANSPOSED,
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "llama": Family(
        config=llama.config,
        to_hf=llama.to_hf,
        keys=llama.KEYS,
        prefix="model.",
        architecture="LlamaForCausalLM",
        ignored=(".rotary_emb.inv_freq",),
    ),
}


def find_family(model_type: str, *, where: str = "") -> Family:
    """Return the family of a config's `model_type`, or raise InputError that lists the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"model type {model_type!r} is not supported",
            where=where,
            expected=", ".join(sorted(FAMILIES)),
            fix=did_you_mean(str(model_type), FAMILIES).strip(),
        )
    return FAMILIES[model_type]
