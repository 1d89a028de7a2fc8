"""Model folders in the Hub's layout: read strictly, write reversibly.

Published tensor names exist only here and in the families' tables. `from_hf` and `to_hf` are inverse to the bit.
Weights are read from safetensors only: a pickle can run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import confine, read_json, write_bytes, write_json
from lmworks.models.config import Config
from lmworks.models.families import Family, find_family
from lmworks.models.heads import CausalLM

BODY = "transformer."  # our name of the body inside CausalLM
HEAD = {"lm_head": "head.project"}
LEGACY_LEAVES = {"gamma": "weight", "beta": "bias"}
State = dict[str, Tensor]


def read_config(folder: str | Path) -> tuple[Config, dict[str, Any]]:
    """Return our Config and the published config as it stands, from `folder/config.json`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}", where=str(folder), fix="check the path")
    hf = read_json(folder / "config.json")
    family = find_family(str(hf.get("model_type")), where=str(folder / "config.json"))
    try:
        config = family.config(hf)
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise FormatError("config.json does not describe a model", where=str(folder), found=str(error)) from None
    ids: dict[str, Any] = {f"{name}_token_id": hf.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if isinstance(ids["eos_token_id"], list):
        ids["eos_token_id"] = tuple(ids["eos_token_id"])
    return replace(config, **ids), hf


def load_model(folder: str | Path) -> CausalLM:
    """Read a causal language model; every missing, unused and mis-shaped tensor is listed in one FormatError.

    The network is laid out without memory and the mapped tensors are assigned to it, so nothing is initialised twice.
    16-bit and 64-bit weights become float32.
    """
    folder = Path(folder)
    config, hf = read_config(folder)
    family = find_family(config.model_type)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = {name: parameter.shape for name, parameter in model.state_dict().items()}
    state, unused = from_hf(read_tensors(folder), expected, family)
    if config.tie_word_embeddings:
        state.setdefault("head.project.weight", state.get(f"{BODY}embeddings.tokens.weight", torch.empty(0)))
    check_complete(state, expected, unused, folder)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    if config.tie_word_embeddings:
        model.tie()
    model.hf_config = hf
    return model.eval()


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each atomically; a tied head is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, family = model.config, find_family(model.config.model_type)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("head.project.weight")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"the tensor {name} holds NaN or infinity", fix="go back to an earlier checkpoint")
    write_json(folder / "config.json", config_to_hf(model))
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
    write_bytes(folder / "model.safetensors", serialize(to_hf(state, family), metadata={"format": "pt"}))


def config_to_hf(model: CausalLM) -> dict[str, Any]:
    """Return the published config: what it was read from, overlaid with what our Config says."""
    c, family = model.config, find_family(model.config.model_type)
    return {
        **model.hf_config,
        **family.to_hf(c),
        "architectures": [family.architecture],
        "model_type": c.model_type,
        "dtype": "float32",
        "torch_dtype": "float32",
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
        "use_cache": True,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
    }


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of `model.safetensors`, or of the shards that its index names, memory-mapped."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FormatError("the index has no weight_map of file names", where=str(index))
        files = sorted(set(weight_map.values()))
    else:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        raise FormatError(
            "there are no weights that can be read safely",
            where=str(folder),
            found=pickled.name if pickled else "no weights",
            expected="model.safetensors or model.safetensors.index.json",
            fix="convert the checkpoint to safetensors" if pickled else "check that the download is complete",
        )
    for name in files:
        path = confine(folder, name)
        if not path.exists():
            raise FormatError(f"{name} is missing", where=str(folder), fix="check that the download is complete")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise FormatError(
                f"{name} is not a whole safetensors file", where=str(path), found=str(error), fix="fetch it again"
            ) from None


def from_hf(
    tensors: Iterator[tuple[str, Tensor]], expected: dict[str, torch.Size], family: Family
) -> tuple[State, list[str]]:
    """Rename, transpose and split published tensors into ours; return them and the names that nothing asked for."""
    state: State = {}
    unused: list[str] = []
    for key, tensor in tensors:
        if key.endswith(family.ignored):
            continue
        names, template = find_target(key, family)
        if not names or any(name not in expected for name in names):
            unused.append(key)
            continue
        if template in family.transposed and tensor.ndim == 2:
            tensor = tensor.t().contiguous()
        sizes = [expected[name][0] for name in names if expected[name]]
        if len(names) > 1 and tensor.ndim and sum(sizes) == tensor.shape[0]:
            state.update(zip(names, (part.contiguous() for part in torch.split(tensor, sizes)), strict=True))
        else:
            state.update(dict.fromkeys(names, tensor))
    return state, unused


def find_target(key: str, family: Family) -> tuple[list[str], str]:
    """Return our names for a published tensor and its row in the table: ([], "") where the table has none."""
    module, _, leaf = key.removeprefix(family.prefix).rpartition(".")
    leaf = LEGACY_LEAVES.get(leaf, leaf)
    if module in HEAD:
        return [f"{HEAD[module]}.{leaf}"], module
    number = re.search(r"(?<=\.)\d+(?=\.)", module)
    template = module if number is None else f"{module[: number.start()]}{{}}{module[number.end() :]}"
    target = family.keys.get(template, ())
    layer = number[0] if number else ""
    return [
        f"{BODY}{name.format(layer)}.{leaf}" for name in ((target,) if isinstance(target, str) else target)
    ], template


def to_hf(state: State, family: Family) -> State:
    """Return the published tensors: the exact inverse of `from_hf`."""
    published: State = {}
    inverse = {ours: theirs for theirs, ours in HEAD.items()}
    rows = {(names[0] if isinstance(names, tuple) else names): (theirs, names) for theirs, names in family.keys.items()}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if module in inverse:
            published[f"{inverse[module]}.{leaf}"] = tensor.contiguous()
            continue
        module = module.removeprefix(BODY)
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        template = module if number is None else f"{module[: number.start()]}{{}}{module[number.end() :]}"
        if template not in rows:
            continue  # a later part of a fused tensor: joined at its first part
        theirs, names = rows[template]
        layer = number[0] if number else ""
        if isinstance(names, tuple):
            tensor = torch.cat([state[f"{BODY}{part.format(layer)}.{leaf}"] for part in names])
        if theirs in family.transposed and tensor.ndim == 2:
            tensor = tensor.t()
        published[f"{family.prefix}{theirs.format(layer)}.{leaf}"] = tensor.contiguous()
    return published


def check_complete(state: State, expected: dict[str, torch.Size], unused: list[str], folder: Path) -> None:
    """Raise one FormatError that lists every missing, unused and mis-shaped tensor."""
    problems = [f"missing {name} {tuple(shape)}" for name, shape in expected.items() if name not in state]
    problems += [f"unused {name}" for name in unused]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        raise FormatError(
            "the weights do not fit the config",
            where=str(folder),
            found="\n    ".join(problems),
            fix="check that config.json and the weights belong together",
        )
