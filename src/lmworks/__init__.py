"""lmworks: turn your text, or a published checkpoint, into a small model that gives the same answers everywhere."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmworks.api import build, evaluate, generate, train, verify
    from lmworks.base.errors import InputError, LmworksError
    from lmworks.base.report import Report
    from lmworks.runtime.predictor import AutoModelForCausalLM, load

PUBLIC = {  # name -> module; imported at first use, so that `import lmworks` costs nothing
    "AutoModelForCausalLM": "lmworks.runtime.predictor",
    "InputError": "lmworks.base.errors",
    "LmworksError": "lmworks.base.errors",
    "Report": "lmworks.base.report",
    "build": "lmworks.api",
    "evaluate": "lmworks.api",
    "generate": "lmworks.api",
    "load": "lmworks.runtime.predictor",
    "train": "lmworks.api",
    "verify": "lmworks.api",
}

__all__ = [
    "AutoModelForCausalLM",
    "InputError",
    "LmworksError",
    "Report",
    "build",
    "evaluate",
    "generate",
    "load",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'lmworks' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
