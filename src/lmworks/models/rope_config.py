"""Read and write the rotary settings of a published config, in both generations.

transformers 4: rope_theta beside rope_scaling {type or rope_type, factor, …}.
transformers 5: rope_parameters {rope_theta, rope_type, …}.
"""

from __future__ import annotations

from typing import Any

from lmworks.base.errors import InputError
from lmworks.models.config import Config, RopeScaling

SUPPORTED = ("default", "llama3")


def read_rope(hf: dict[str, Any], *, default_theta: float) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` for our Config; raise InputError for a kind that we do not have."""
    found = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in SUPPORTED:
        raise InputError(f"rope type {kind!r} is not supported", expected=", ".join(SUPPORTED))
    theta = float(found.get("rope_theta", hf.get("rope_theta", default_theta)))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    try:
        scaling = RopeScaling(
            factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_max_position_embeddings=int(found["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise InputError("the llama3 rope settings are incomplete", found=f"no {missing}") from None
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_to_hf(c: Config) -> dict[str, Any]:
    """Return the keys of both generations."""
    if c.rope_scaling is None:
        return {"rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    s = c.rope_scaling
    scaling = {
        "rope_type": "llama3",
        "factor": s.factor,
        "low_freq_factor": s.low_freq_factor,
        "high_freq_factor": s.high_freq_factor,
        "original_max_position_embeddings": s.original_max_position_embeddings,
    }
    both = {**scaling, "rope_theta": c.rope_theta}
    return {"rope_theta": c.rope_theta, "rope_scaling": scaling, "rope_parameters": both}
