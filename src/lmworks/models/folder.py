"""A whole model folder: the weights and configs, and what belongs to them beside them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from lmworks.base.errors import FormatError
from lmworks.base.files import confine, own_file, read_json, read_value, write_json
from lmworks.models.checkpoint import save_model
from lmworks.models.heads import Model
from lmworks.tokens.tokenizer import Tokenizer

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spm.model", "spiece.model",
                "sentencepiece.bpe.model")  # fmt: skip
GENERATION, MODULES = "generation_config.json", "modules.json"
COPIED = (  # as they are, where they are
    "preprocessor_config.json", "processor_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_*_config.json", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece*.model", "README*",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
log = logging.getLogger("lmworks")


def write_folder(model: Model, folder: Path, staged: Path) -> None:
    """Write a model that was read from `folder`, its tokenizer, and copies of what belongs to it beside them."""
    save_model(model, staged)
    if (folder / GENERATION).is_file():  # it may know better than config.json where a text ends
        written = read_json(staged / GENERATION) if (staged / GENERATION).is_file() else {}
        write_json(staged / GENERATION, {**written, **read_json(folder / GENERATION)})
    if has_tokenizer(folder):
        Tokenizer.from_pretrained(folder).save(staged)
    for pattern in COPIED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(own_file(path), staged / path.name)
    for name in list_modules(folder):
        source, target = confine(folder, name, by=MODULES), confine(staged, name, by=MODULES)
        if source == folder.resolve():  # the network itself, which was written afresh
            continue
        for path in sorted([*source.glob("*.json"), *source.glob("*.safetensors")]):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own_file(path), target / path.name)
        pickles = [f"{name}/{path.name}" for path in sorted(source.glob("*.bin"))]
        if pickles and not any(source.glob("*.safetensors")):
            log.warning("%s: a pickle is not copied, and sentence-transformers needs these weights: begin with a "
                        "model.safetensors beside it, which `lmworks convert %s -o NEW` makes",
                        ", ".join(pickles), source)  # fmt: skip


def list_modules(folder: Path) -> list[str]:
    """Return the folders of sentence-transformers' modules: ["1_Pooling"]."""
    try:
        if not (folder / MODULES).is_file():
            return []
        found = read_value(folder / MODULES)
        return [str(module["path"]) for module in found if module.get("path")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{MODULES} holds no list of modules", where=str(folder), found=str(error)) from None


def has_tokenizer(folder: Path) -> bool:
    """Say whether a folder has a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)
