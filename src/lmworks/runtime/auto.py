"""The names that people know: `AutoModelForMaskedLM.from_pretrained(name)`, `BertForMaskedLM.from_pretrained(name)`.

The names are torch-free; `from_pretrained` needs torch and returns our module.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lmworks.base.errors import InputError
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.models.families import published_names, read_config

if TYPE_CHECKING:
    from lmworks.runtime.pretrained import Pretrained

AUTO = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "CausalLM",
    "AutoModelForImageClassification": "ImageClassification",
    "AutoModelForMaskedLM": "MaskedLM",
    "AutoModelForMultipleChoice": "MultipleChoice",
    "AutoModelForNextSentencePrediction": "NextSentencePrediction",
    "AutoModelForQuestionAnswering": "QuestionAnswering",
    "AutoModelForSequenceClassification": "SequenceClassification",
    "AutoModelForTokenClassification": "TokenClassification",
}


class AutoClass:
    """A head, for one family or for any."""

    kind: ClassVar[str]
    model_type: ClassVar[str | None]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None, **settings: Any) -> Pretrained:
        """Read a model folder, or a model of the Hub by its name: our torch module, in evaluation mode.

        `settings` are those of `load_model`: `dtype`, and `new_head=True` with `labels` for a head to be trained. The
        Hub's token is read from the environment. Raises InputError for another family's checkpoint.
        """
        require("torch", extra="torch")
        from lmworks.runtime.pretrained import Pretrained

        if "torch_dtype" in settings:  # the older name
            settings.setdefault("dtype", settings.pop("torch_dtype"))
        folder = find_folder(name_or_path, revision=revision)
        found = read_config(folder).model_type
        if cls.model_type not in (None, found):
            raise InputError(
                f"this is not a checkpoint for {cls.__name__}", where=str(folder), found=f"model_type {found!r}",
                expected=f"{cls.model_type!r}", fix="use the Auto class of the same task",
            )  # fmt: skip
        return Pretrained.read(folder, cls.kind, **settings)


@cache
def find_class(name: str) -> type[AutoClass] | None:
    """Return the class of this name, or None: "AutoModel", "BertForMaskedLM", "GPT2LMHeadModel" …"""
    if name in AUTO:
        return type(name, (AutoClass,), {"kind": AUTO[name], "model_type": None})
    if name in published_names():
        model_type, kind = published_names()[name]
        return type(name, (AutoClass,), {"kind": kind, "model_type": model_type})
    return None
