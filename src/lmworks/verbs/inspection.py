"""What a model folder holds, from its small files and the headers of its large ones: instant for any size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.files import read_json
from lmworks.base.report import Cell, Report, Table
from lmworks.base.safetensors_header import TensorInfo, check_header
from lmworks.models.families import FAMILIES, LABELLED, OWN_KEYS, TASKS, read_config
from lmworks.models.parameters import TOKENS, count_parameters
from lmworks.runtime.choice import list_choices

Warnings = list[str]
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "model.safetensors", INDEX, "onnx")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
NAMES = {  # what we call it: what config.json may call it
    "context_length": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "image_size": ("image_size",),
}
SPECIAL = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model",
              "sentencepiece.bpe.model")  # fmt: skip


def inspect_folder(folder: str | Path) -> Report:
    """Describe a model folder: structure, parameters, files, tokenizer, labels, receipt, and what is wrong with it.

    Unknown families are described as far as their files go. Damaged weights and tokenizers become warnings. Raises
    InputError for a folder without a model and FormatError for an unreadable config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    files = {p.relative_to(folder).as_posix(): p for level in ("*", "*/*") for p in folder.glob(level) if p.is_file()}
    if not any(path in files or (folder / path).is_dir() for path in MODEL_FILES) and not list_pickles(files):
        found = ", ".join(sorted(files)[:10]) or "nothing"
        raise InputError("this folder holds no model", where=str(folder), found=found, expected=", ".join(MODEL_FILES))
    warnings: Warnings = []
    config = read_json(files["config.json"]) if "config.json" in files else {}
    described = describe_config(folder, config, files, warnings)
    tensors = read_headers(folder, files, warnings)
    tokenizer = describe_tokenizer(files, warnings)
    dtypes = sorted({info.dtype for info in tensors.values()})
    values: dict[str, Any] = {
        "folder": str(folder),
        **described,
        "parameters": count_parameters(tensors, described["tie_word_embeddings"]),
        "dtypes": {dtype: sum(t.size for t in tensors.values() if t.dtype == dtype) for dtype in dtypes},
        "tensors": len(tensors),
        "tokenizer": tokenizer,
        "chat_template": has_chat_template(files),
        "pooling": describe_pooling(files, warnings),
        "adapter": pick(files, "adapter_config.json", ("base_model_name_or_path", "peft_type", "r"), warnings),
        "graphs": {name: files[name].stat().st_size for name in sorted(files) if name.endswith(".onnx")},
        "receipt": pick(files, "lmworks.json", ("data_sha256", "seed", "scores", "versions"), warnings),
        "certificate": describe_certificate(files, warnings),
        "auto": list_choices(folder),
        "bytes": sum(path.stat().st_size for path in files.values()),
        "files": {name: files[name].stat().st_size for name in sorted(files)},
        "warnings": warnings,
    }
    check_fit(values, tensors, warnings)
    return Report(f"{name_of(folder)}: {headline(values)}", values, tables=tables(values), notes=tuple(warnings))


def name_of(folder: Path) -> str:
    """Return the folder's name; for a snapshot in the Hub's cache, the model's."""
    folder = folder.resolve()
    cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return cached.removeprefix("models--").replace("--", "/") or folder.name


def list_pickles(files: Mapping[str, Path]) -> list[str]:
    """Return the names of weight files that can run code, or that only other frameworks read."""
    return sorted(name for name in files if name.endswith(PICKLES) and name != "training_args.bin")


def read_headers(folder: Path, files: Mapping[str, Path], warnings: Warnings) -> dict[str, TensorInfo]:
    """Return every tensor of the safetensors files; what cannot be read becomes a warning."""
    names = [name for name in ("model.safetensors", "adapter_model.safetensors") if name in files]
    if "model.safetensors" not in files and INDEX in files:
        shards = list(as_dict(read_part(files, INDEX, warnings).get("weight_map")).values())
        good = {name for name in shards if isinstance(name, str) and Path(name).name == name}
        if not good or not all(name in good for name in shards if isinstance(name, str)):
            warnings.append(f"{INDEX} does not name files beside it")
        names += sorted(good)
    if not names:
        pickles = list_pickles(files)
        if pickles:
            fix = "lmworks convert FOLDER -o OUT"
            warnings.append(f"the weights ({', '.join(pickles)}) are not safetensors: a pickle can run code; {fix}")
        elif not any(name.endswith(".onnx") for name in files):
            warnings.append("there are no weights")
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        try:
            tensors.update(check_header(folder / name))
        except LmworksError as error:
            warnings.append("; ".join(filter(None, (error.what, error.found, error.fix))))
    return tensors


def describe_config(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, Path], warnings: Warnings
) -> dict[str, Any]:
    """Return what config.json says about the structure and the labels."""
    model_type, named = config.get("model_type"), config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    own = as_dict(config.get(OWN_KEYS.get(str(model_type), "")))  # of a published type, held in a form of ours
    family = str(own.get("model_type", model_type))
    supported, tied = family in FAMILIES, config.get("tie_word_embeddings") is not False
    if not config:
        warnings.append("config.json is missing")
    elif not supported:
        warnings.append(f"the model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    else:
        try:
            tied = read_config(folder).tie_word_embeddings  # the family has its own default
        except LmworksError as error:
            warnings.append(f"config.json: {error.what} ({error.found or error.expected})")
    if "auto_map" in config:
        warnings.append("config.json asks for code of its repository, which is never run")
    places = (config, as_dict(config.get("text_config")))
    sizes = {
        name: next((p[key] for p in places for key in keys if isinstance(p.get(key), int)), None)
        for name, keys in NAMES.items()
    }
    sizes |= {name: own["sizes"][name] for name in sizes if name in as_dict(own.get("sizes"))}
    if family in ("roberta", "xlm-roberta") and sizes["context_length"]:
        padding = config.get("pad_token_id")
        sizes["context_length"] -= (padding if isinstance(padding, int) else 1) + 1  # positions start after padding's
    labels = as_dict(config.get("id2label"))
    return {
        "model_type": model_type,
        "family": family if supported else None,
        "architecture": architecture,
        "supported": supported,
        "task": "feature-extraction" if "modules.json" in files else find_task(architecture),
        **sizes,
        "tie_word_embeddings": tied,
        "problem_type": config.get("problem_type"),
        "labels": [str(labels[key]) for key in sorted(labels, key=as_id)],
    }


def as_id(key: str) -> tuple[int, str]:
    """Order the keys of id2label: by number, what is none last."""
    return (int(key), "") if key.isdecimal() else (10**9, key)


def find_task(architecture: str | None) -> str | None:
    """Return the pipeline name of a published class: "BertForMaskedLM" -> "fill-mask"."""
    names = {f"For{kind}" if kind != "Model" else kind: task for task, kind in TASKS.items()}
    names = {"LMHeadModel": "text-generation", "ForPreTraining": "fill-mask", **names}
    names["ForConditionalGeneration"] = "text2text-generation"
    return next((task for ending, task in names.items() if (architecture or "").endswith(ending)), None)


def describe_tokenizer(files: Mapping[str, Path], warnings: Warnings) -> dict[str, Any] | None:
    """Return the tokenizer's file, kind, number of ids, special tokens and longest input; None where there is none."""
    name = next((name for name in TOKENIZERS if name in files), None)
    if name is None:
        if "preprocessor_config.json" not in files:
            warnings.append(f"there is no tokenizer: none of {', '.join(TOKENIZERS)}")
        return None
    found: dict[str, Any] = {"file": name, "kind": None, "ids": None, "special_tokens": {}, "max_length": None}
    try:
        found["kind"], found["ids"] = read_vocabulary(files, name)
        for settings in ("special_tokens_map.json", "tokenizer_config.json"):
            given = read_json(files[settings]) if settings in files else {}
            for key in SPECIAL:
                token = given.get(key)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found["special_tokens"][key] = token
            longest = given.get("model_max_length")
            if isinstance(longest, int) and longest < 10**9:  # an enormous one means: no limit
                found["max_length"] = longest
    except (LmworksError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.append(f"the tokenizer cannot be read: {error.what if isinstance(error, LmworksError) else error!r}")
    return found


def read_vocabulary(files: Mapping[str, Path], name: str) -> tuple[str, int | None]:
    """Return the kind of a tokenizer and the number of its ids, holes included."""
    if name == "vocab.txt":
        return "WordPiece", len(files[name].read_text("utf-8").removesuffix("\n").split("\n"))
    if name == "vocab.json":
        ids = [*read_json(files[name]).values()]
        ids += read_json(files["added_tokens.json"]).values() if "added_tokens.json" in files else ()
        return "byte-level BPE", max(ids) + 1
    if name != "tokenizer.json":
        return "SentencePiece", None
    whole = read_json(files[name])
    model, added = whole["model"], [token["id"] for token in whole.get("added_tokens") or ()]
    vocabulary = model["vocab"]
    ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else [*vocabulary.values()]
    kind = model.get("type") or (
        "BPE" if "merges" in model else "Unigram" if isinstance(vocabulary, list) else "WordPiece"
    )
    byte_level = "ByteLevel" in str([whole.get("pre_tokenizer"), whole.get("decoder")])
    return f"byte-level {kind}" if byte_level else str(kind), max([*ids, *added], default=-1) + 1


def has_chat_template(files: Mapping[str, Path]) -> bool:
    """Say whether the folder knows how a conversation is written."""
    settings = files.get("tokenizer_config.json")
    return bool({"chat_template.jinja", "chat_template.json"} & set(files)) or bool(
        settings and "chat_template" in settings.read_text("utf-8", errors="replace")
    )


def as_dict(value: object) -> dict[str, Any]:
    """Return the value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_part(files: Mapping[str, Path], name: str, warnings: Warnings) -> dict[str, Any]:
    """Return a JSON object of the folder; empty where it is missing, with a warning where it is damaged."""
    try:
        return read_json(files[name]) if name in files else {}
    except LmworksError as error:
        warnings.append(error.what)
        return {}


def describe_pooling(files: Mapping[str, Path], warnings: Warnings) -> str | None:
    """Return how sentence-transformers makes one vector of many: "mean", "cls" …, several joined by +."""
    name = next((name for name in sorted(files) if name.endswith("_Pooling/config.json")), "")
    settings = read_part(files, name, warnings)
    modes = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    named = settings.get("pooling_mode")
    chosen = (
        [named] if isinstance(named, str) else [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes]
    )
    return "+".join(mode for mode in chosen if mode != "include_prompt") or None


def pick(files: Mapping[str, Path], name: str, keys: tuple[str, ...], warnings: Warnings) -> dict[str, Any] | None:
    """Return some keys of a JSON object of the folder; None where it is not there."""
    whole = read_part(files, name, warnings)
    return {key: whole.get(key) for key in keys} if whole else None


def describe_certificate(files: Mapping[str, Path], warnings: Warnings) -> dict[str, Any] | None:
    """Return the outcome of the last `verify`: passed, its date, and passed, failed or skipped for each runtime."""
    certificate = read_part(files, "certificate.json", warnings)
    if not certificate:
        return None
    runtimes = {
        f"{name} {dtype}": "passed" if cell.get("passed") else "skipped" if "skipped" in cell else "failed"
        for name, cells in as_dict(certificate.get("runtimes")).items()
        for dtype, cell in as_dict(cells).items()
        if isinstance(cell, dict)
    }
    if not certificate.get("passed"):
        warnings.append("the last verification failed: run lmworks verify")
    date = as_dict(certificate.get("checked")).get("date")
    return {"passed": bool(certificate.get("passed")), "date": date, "runtimes": runtimes}


def check_fit(values: Mapping[str, Any], tensors: Mapping[str, TensorInfo], warnings: Warnings) -> None:
    """Add a warning for parts that do not belong together, and for labels without names."""
    labels, tokenizer = values["labels"], values["tokenizer"] or {}
    labelled = bool(values["architecture"]) and values["architecture"].endswith(LABELLED)
    heads = (info for name, info in tensors.items() if re.search(r"^(classifier(\.out_proj)?|score)\.weight$", name))
    head = next(heads, None)
    unnamed = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    if labelled and unnamed and not (head and head.shape[0] == 1):  # one score needs no name
        warnings.append("the labels have no names: set id2label in config.json, or answers say LABEL_0")
    if labelled and labels and head and len(head.shape) == 2 and head.shape[0] != len(labels):
        warnings.append(f"config.json names {len(labels)} labels, and the head gives {head.shape[0]} scores")
    rows = [info.shape[0] for name, info in tensors.items() if TOKENS.search(name) and info.shape]
    known = rows[0] if rows else values["vocab_size"]
    if known and (tokenizer.get("ids") or 0) > known:
        warnings.append(
            f"the tokenizer has {tokenizer['ids']:,} ids and the embedding only {known:,} rows: "
            "they do not belong together, or the embedding must be resized"
        )


def headline(values: Mapping[str, Any]) -> str:
    """Return the folder in one line."""
    parameters = values["parameters"]
    count = f"{parameters['total']:,} parameters" if parameters else "no readable weights"
    return ", ".join(filter(None, (values["architecture"] or values["model_type"], values["task"], count)))


def tables(values: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the facts, the parameters and the files for people."""
    tokenizer, receipt, certificate = (values[key] or {} for key in ("tokenizer", "receipt", "certificate"))
    special = " ".join(dict.fromkeys((tokenizer.get("special_tokens") or {}).values()))
    labels, shown = values["labels"], ", ".join(values["labels"][:12])
    same, kind = values["model_type"] == values["family"], f" ({values['family'] or 'not supported'})"
    facts: dict[str, Cell] = {
        "model type": f"{values['model_type']}{'' if same else kind}",
        "architecture": values["architecture"],
        "task": values["task"],
        **{name.replace("_", " ").removeprefix("num "): values[name] for name in NAMES},
        "dtypes": ", ".join(values["dtypes"]),
        "bytes on disk": values["bytes"],
        "labels": f"{len(labels)}: {shown}{' …' if len(labels) > 12 else ''}" if labels else None,
        "tokenizer": tokenizer.get("kind") and f"{tokenizer['kind']}, {tokenizer['file']}",
        "tokenizer ids": tokenizer.get("ids"),
        "special tokens": special,
        "chat template": values["chat_template"] or None,
        "pooling": values["pooling"],
        "adapter of": values["adapter"] and str(values["adapter"]["base_model_name_or_path"]),
        "runs fastest here": "; ".join(f"{one['task']}: {one['why']}" for one in values["auto"]) or None,
        "made from data": receipt.get("data_sha256"),
        "verified": f"{'passed' if certificate['passed'] else 'failed'}, {certificate['date']}"
        if certificate
        else None,
    }
    rows = tuple((name, f"{value:,}" if type(value) is int else str(value)) for name, value in facts.items() if value)
    made = [Table("Model", ("fact", "value"), rows)]
    if values["parameters"]:
        total = max(values["parameters"]["total"], 1)
        counted = ((part, n, f"{n / total:.1%}") for part, n in values["parameters"].items() if n)
        made.append(Table("Parameters", ("part", "parameters", "share"), tuple(counted)))
    if isinstance(receipt.get("scores"), dict):
        scores = ((name, value) for name, value in receipt["scores"].items() if isinstance(value, str | int | float))
        made.append(Table("Scores when it was made", ("score", "value"), tuple(scores)))
    made.append(Table("Files", ("file", "bytes"), tuple(values["files"].items())))
    return tuple(made)
