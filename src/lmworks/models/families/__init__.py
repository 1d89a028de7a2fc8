"""The families: each turns a published config into ours and back, and names its tensors in one table. Torch-free.

A row of KEYS maps a published module to ours; `{}` is the layer's number. A tuple splits one fused tensor into several
along its outputs: the sizes are those of our modules, so grouped heads and unequal parts need no numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lmworks.base.errors import FormatError, InputError, LmworksError, did_you_mean
from lmworks.base.files import read_json
from lmworks.models.config import Config
from lmworks.models.families import gpt2, llama


class Family(Protocol):
    """What a module of this folder holds."""

    ARCHITECTURE: str  # of the published class with a language-model head
    PREFIX: str  # of the body's tensors in files that have a head
    KEYS: dict[str, str | tuple[str, ...]]
    TRANSPOSED: frozenset[str]  # modules whose matrix is stored (in, out)
    IGNORED: frozenset[str]  # tensors that hold no weights: masks and constants

    def config(self, hf: Mapping[str, Any], /) -> Config:
        """Read a published config."""
        ...

    def to_hf(self, c: Config, /) -> dict[str, Any]:
        """Write one: what is particular to the family."""
        ...


FAMILIES: dict[str, Family] = {
    "gpt2": gpt2,
    "llama": llama,
}


def find_family(model_type: str) -> Family:
    """Return the family of a config's `model_type`, or raise InputError that lists the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"the model type {model_type!r} is not supported",
            expected=", ".join(sorted(FAMILIES)),
            fix=did_you_mean(model_type, FAMILIES).strip(),
        )
    return FAMILIES[model_type]


def read_config(folder: str | Path) -> Config:
    """Read `folder/config.json`; an error names the file. All of its keys survive in `Config.source`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    hf = read_json(folder / "config.json")
    try:
        return find_family(str(hf.get("model_type"))).config(hf)
    except LmworksError as error:
        kind = FormatError if isinstance(error, FormatError) else InputError
        where = str(folder / "config.json")
        raise kind(error.what, where=where, found=error.found, expected=error.expected, fix=error.fix) from None


def write_config(c: Config) -> dict[str, Any]:
    """Return the published form of a Config.

    Where it was read from a file, the file's own values stay as they are, also those that we do not know, but for what
    has been changed since; what the other generation of readers expects is added.
    """
    ours = describe(c)
    if not c.source:
        return ours
    before = describe(find_family(c.model_type).config(c.source))
    changed = {key: value for key, value in ours.items() if before[key] != value}
    return {**ours, **c.source, **changed, "architectures": ours["architectures"]}


def describe(c: Config) -> dict[str, Any]:
    """Return everything that a Config says, in published names."""
    family = find_family(c.model_type)
    return {
        "architectures": [family.ARCHITECTURE],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        **family.to_hf(c),
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
        "use_cache": True,
        **token_ids(c),
    }


def token_ids(c: Config) -> dict[str, int | list[int] | None]:
    """Return the special tokens in published names."""
    eos = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    return {"bos_token_id": c.bos_token_id, "eos_token_id": eos, "pad_token_id": c.pad_token_id}
