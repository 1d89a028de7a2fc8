"""XLM-RoBERTa: RoBERTa with a vocabulary for a hundred languages (Conneau et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmworks.models.config import Config
from lmworks.models.families import roberta

NAME, PREFIX = "XLMRoberta", "roberta."
KEYS, TRANSPOSED, IGNORED = roberta.KEYS, roberta.TRANSPOSED, roberta.IGNORED
heads, to_hf = roberta.heads, roberta.to_hf


def config(hf: Mapping[str, Any]) -> Config:
    """Read a published config."""
    return replace(roberta.config(hf), model_type="xlm-roberta")
