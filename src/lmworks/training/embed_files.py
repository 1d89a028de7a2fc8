"""The files by which sentence-transformers reads a folder: which modules make a vector of a text, and how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lmworks.base.files import confine, own_file, read_json, read_value, write_json, write_text
from lmworks.models.folder import list_modules
from lmworks.tasks.embed import MODULES, SETTINGS, FeatureExtraction

SENTENCE = "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
POOLING = "1_Pooling"
NAMES = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
PACKAGE = "sentence_transformers.models."
CLASSES = ("Transformer", "Pooling", "Normalize")


def write_recipe(source: Path, out: Path, task: FeatureExtraction, *, hidden_size: int) -> None:
    """Write modules.json and what it names: that of the `source` folder, or the task's own where it has none.

    The length at which texts are cut is the task's.
    """
    settings: dict[str, Any] = {"do_lower_case": task.recipe.lower_case}
    if (source / MODULES).is_file():
        for name in list_modules(source):
            place, target = (confine(folder, name, by=MODULES) for folder in (source, out))
            if (place / "config.json").is_file():
                target.mkdir(exist_ok=True)
                shutil.copyfile(own_file(place / "config.json"), target / "config.json")
        for name in (MODULES, SENTENCE):
            if (source / name).is_file():
                shutil.copyfile(own_file(source / name), out / name)
        first = str(read_value(source / MODULES)[0].get("path") or "")
        found = (confine(source, first, by=MODULES) / f"sentence_{name}_config.json" for name in SETTINGS)
        settings = next((read_json(path) for path in found if path.is_file()), settings)
        place = confine(out, first, by=MODULES)
    else:
        classes = CLASSES if task.normalize else CLASSES[:2]
        rows = [
            {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": PACKAGE + name}
            for i, name in enumerate(classes)
        ]
        write_text(out / MODULES, json.dumps(rows, indent=2) + "\n")
        (out / POOLING).mkdir(exist_ok=True)
        modes = {f"pooling_mode_{name}": task.pooling == kind for kind, name in NAMES.items()}
        write_json(out / POOLING / "config.json", {"word_embedding_dimension": hidden_size, **modes})
        place = out
    place.mkdir(exist_ok=True)
    write_json(place / LENGTH, {**settings, "max_seq_length": task.length})
