"""The weight files of a model folder, memory-mapped: one `model.safetensors`, or the shards that an index names.

Weights are read from safetensors only: a pickle can run code.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmworks.base.errors import FormatError
from lmworks.base.files import read_json
from lmworks.base.safetensors_header import check_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAIN = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")  # a file beside the index
State = dict[str, Tensor]


def read_tensors(folder: Path) -> State:
    """Return every tensor of `model.safetensors`, or of the shards that its index names, memory-mapped."""
    tensors: State = {}
    for name in find_files(folder):
        path = folder / name
        if path.exists():
            check_header(path)  # before anything is allocated for what the file claims to hold
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in tensors:
                        raise FormatError(f"the tensor {key} is in two files", where=str(path))
                    tensors[key] = file.get_tensor(key)
        except FileNotFoundError:
            named = f"{INDEX} names it" if name != WEIGHTS else ""
            raise FormatError(
                f"{name} is missing", where=str(folder), found=named, fix="fetch the whole checkpoint"
            ) from None
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{name} is not a whole safetensors file", where=str(path), found=str(error), fix="fetch it again"
            ) from None
    return tensors


def find_files(folder: Path) -> list[str]:
    """Return the names of the weight files in `folder`; an index may not name any other place."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise FormatError("the index holds no file names", where=str(folder / INDEX), expected="a weight_map")
        outside = sorted(name[:200] for name in set(names.values()) if not PLAIN.fullmatch(name))
        if outside:
            raise FormatError(
                "the index points outside its folder", where=str(folder / INDEX), found=", ".join(map(ascii, outside)),
                expected="names of files beside the index: letters, digits, '-', '_' and '.', then .safetensors",
            )  # fmt: skip
        return sorted(set(names.values()))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    fix = f"lmworks convert {folder} -o OUT (a pickle can run code)" if pickled else "fetch the whole checkpoint"
    if (folder / "adapter_config.json").is_file():
        fix = "this is an adapter: lmworks.load opens it with its base, and lmworks merge makes a LoRA a whole model"
    graphs = sorted(path.name for path in folder.glob("onnx/*.onnx"))
    if graphs and not pickled:
        raise FormatError(
            "this folder holds graphs alone: this needs weights", where=str(folder), found=", ".join(graphs),
            fix="begin with the model that was exported; a graph answers in its own task and dtype alone",
        )  # fmt: skip
    raise FormatError(
        "there are no weights that can be read safely",
        where=str(folder),
        found=", ".join(pickled) or "no weights",
        expected=f"{WEIGHTS} or {INDEX}",
        fix=fix,
    )
