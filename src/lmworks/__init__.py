"""lmworks: turn your text, or a published checkpoint, into a small model that gives the same answers everywhere."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on onnxruntime reports to its maker

if TYPE_CHECKING:
    from lmworks.api import build, distill, evaluate, finetune, generate, predict, search, train, tune, verify
    from lmworks.base.errors import InputError, LmworksError
    from lmworks.base.report import Report
    from lmworks.runtime.auto import AutoClass
    from lmworks.tokens.tokenizer import Tokenizer
    from lmworks.verbs.cleaning import clean
    from lmworks.verbs.cleaning_split import split
    from lmworks.verbs.cleaning_stats import stats

    AutoModel: type[AutoClass]
    AutoModelForCausalLM: type[AutoClass]
    AutoModelForImageClassification: type[AutoClass]
    AutoModelForMaskedLM: type[AutoClass]
    AutoModelForMultipleChoice: type[AutoClass]
    AutoModelForNextSentencePrediction: type[AutoClass]
    AutoModelForQuestionAnswering: type[AutoClass]
    AutoModelForSequenceClassification: type[AutoClass]
    AutoModelForTokenClassification: type[AutoClass]

PUBLIC = {  # name -> module; imported at first use, so that `import lmworks` costs nothing
    "InputError": "lmworks.base.errors",
    "LmworksError": "lmworks.base.errors",
    "Report": "lmworks.base.report",
    "build": "lmworks.api",
    "clean": "lmworks.verbs.cleaning",
    "distill": "lmworks.api",
    "evaluate": "lmworks.api",
    "finetune": "lmworks.api",
    "generate": "lmworks.api",
    "load": "lmworks.api",
    "predict": "lmworks.api",
    "search": "lmworks.api",
    "split": "lmworks.verbs.cleaning_split",
    "stats": "lmworks.verbs.cleaning_stats",
    "Tokenizer": "lmworks.tokens.tokenizer",
    "train": "lmworks.api",
    "tune": "lmworks.api",
    "verify": "lmworks.api",
}

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "InputError",
    "LmworksError",
    "Report",
    "Tokenizer",
    "build",
    "clean",
    "distill",
    "evaluate",
    "finetune",
    "generate",
    "load",
    "predict",
    "search",
    "split",
    "stats",
    "train",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    if "For" in name or "Model" in name:  # AutoModelForMaskedLM, BertForMaskedLM …
        found = import_module("lmworks.runtime.auto").find_class(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'lmworks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
