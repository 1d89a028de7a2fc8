"""Model folders in the Hub's layout: read strictly, written reversibly.

Published tensor names exist only here and in the families' tables. `make_rows` lays the table of a family over our
parameters once; `from_hf` and `to_hf` walk the same rows in opposite directions, so they are inverse to the bit.
Weights are read from safetensors only: a pickle can run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_bytes, write_json
from lmworks.models.families import Family, find_family, read_config, token_ids, write_config
from lmworks.models.heads import CausalLM

__all__ = ["load_model", "read_config", "save_model"]

BODY, HEAD, TIED = "transformer.", "head.project", "head.project.weight"
HEAD_KEY, TIED_KEY = "lm_head", "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One tensor of a file, and the parameters of ours that it holds."""

    key: str  # in the file, with the family's prefix
    names: tuple[str, ...]  # ours; several where the file fuses them along their outputs
    shapes: tuple[torch.Size, ...]  # ours
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        first = (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return first[::-1] if self.transposed else first

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield our parameters as views of the file's tensor."""
        tensor = tensor.t() if self.transposed else tensor
        return zip(self.names, torch.split(tensor, [shape[0] for shape in self.shapes]), strict=True)

    def join(self, state: State) -> Tensor:
        """Return the file's tensor: the inverse of `split`."""
        parts = [state[name] for name in self.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (tensor.t() if self.transposed else tensor).contiguous()


def load_model(folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> CausalLM:
    """Read a causal language model in evaluation mode; every missing, unused or mis-shaped tensor is one FormatError's.

    The network is laid out without memory and the mapped tensors are assigned to it: nothing is drawn, nothing copied
    unless the file holds another dtype. `dtype=None` keeps the file's own, whatever it is.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = CausalLM(config, seed=None)
    family, rows = find_family(config.model_type), make_rows(model)
    state = from_hf(read_tensors(folder), rows, family, tied=config.tie_word_embeddings, where=str(folder))
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(tensor if dtype is None else tensor.to(dtype))
        setattr(model.get_submodule(module), leaf, parameter)
    model.tie()
    return model.eval()


def save_model(model: CausalLM, folder: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each atomically; a tied head is left out.

    Raises InputError for weights that are not finite. Settings that are in the folder's generation_config.json stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError("the weights hold NaN or infinity", found=", ".join(broken), fix="use an earlier checkpoint")
    rows = make_rows(model)
    dtype = str(state[rows[0].names[0]].dtype).removeprefix("torch.")
    write_bytes(folder / WEIGHTS, serialize(to_hf(state, rows), metadata={"format": "pt"}))
    path = folder / "generation_config.json"
    ids = {name: value for name, value in token_ids(model.config).items() if value is not None}
    write_json(path, {"_from_model_config": True, **(read_json(path) if path.exists() else {}), **ids})
    write_json(folder / "config.json", {**write_config(model.config), "dtype": dtype, "torch_dtype": dtype})


def make_rows(model: CausalLM) -> list[Row]:
    """Lay the family's table over the model: one row a tensor of the file, in the order of our parameters."""
    family = find_family(model.config.model_type)
    theirs_of: dict[str, tuple[str, tuple[str, ...]]] = {}  # our template -> theirs, and all of ours that it holds
    for theirs, ours in family.KEYS.items():
        targets = (ours,) if isinstance(ours, str) else ours
        theirs_of.update(dict.fromkeys(targets, (theirs, targets)))
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    rows = []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if module == HEAD:
            if not (name == TIED and model.config.tie_word_embeddings):
                rows.append(Row(f"{HEAD_KEY}.{leaf}", (name,), (shape,), False))
            continue
        template, layer = to_template(module.removeprefix(BODY))
        theirs, targets = theirs_of[template]
        if template == targets[0]:  # the other parts of a fused tensor are in the row of its first
            names = tuple(f"{BODY}{target.format(layer)}.{leaf}" for target in targets)
            key = f"{family.PREFIX}{theirs.format(layer)}.{leaf}"
            transposed = theirs in family.TRANSPOSED and len(shape) == 2
            rows.append(Row(key, names, tuple(shapes[name] for name in names), transposed))
    return rows


def from_hf(file: State, rows: list[Row], family: Family, *, tied: bool, where: str = "") -> State:
    """Return our parameters, as views of the file's tensors; with every complaint in one FormatError.

    Keys may come with or without the family's prefix. A tied head may be in the file if it equals the embedding.
    """
    given: dict[str, str] = {}  # their key without prefix -> as it stands in the file
    problems = []
    for key in file:
        bare = key.removeprefix(family.PREFIX)
        if to_template(bare)[0] in family.IGNORED:
            continue
        if bare in given:
            problems.append(f"twice: {given[bare]} and {key}")
        given[bare] = key
    state: State = {}
    for row in rows:
        found = given.pop(row.key.removeprefix(family.PREFIX), None)
        if found is None:
            problems.append(f"missing: {row.key} {row.shape}")
        elif tuple(file[found].shape) != row.shape:
            problems.append(f"wrong shape: {found} is {tuple(file[found].shape)}, not {row.shape}")
        elif not file[found].is_floating_point():
            problems.append(f"not a float: {found} is {file[found].dtype}")
        else:
            state.update(row.split(file[found]))
    if tied and TIED_KEY in given:
        head, embedding = file[given.pop(TIED_KEY)], state.get(f"{BODY}embeddings.tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            problems.append(f"{TIED_KEY} differs from the embedding although config.json ties them")
    problems += [f"unused: {key}" for key in given.values()]
    if problems:
        raise FormatError(
            "the weights do not fit config.json",
            where=where,
            found="\n    ".join(["", *problems]),
            fix="check that config.json and the weights belong together",
        )
    return state


def to_hf(state: State, rows: list[Row]) -> State:
    """Return the file's tensors: the exact inverse of `from_hf`."""
    return {row.key: row.join(state) for row in rows}


def to_template(key: str) -> tuple[str, str]:
    """Take the layer's number out of a name: "layers.3.mlp.up_proj" -> ("layers.{}.mlp.up_proj", "3")."""
    number = re.search(r"\.(\d+)\.", key)
    return (f"{key[: number.start()]}.{{}}.{key[number.end() :]}", number[1]) if number else (key, "")


def read_tensors(folder: Path) -> State:
    """Return every tensor of `model.safetensors`, or of the shards that its index names, memory-mapped."""
    tensors: State = {}
    for name in find_files(folder):
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in tensors:
                        raise FormatError(f"the tensor {key} is in two files", where=str(path))
                    tensors[key] = file.get_tensor(key)
        except FileNotFoundError:
            raise FormatError(f"{name} is missing", where=str(folder), fix="fetch the whole checkpoint") from None
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
        outside = sorted(name for name in set(names.values()) if Path(name).name != name)
        if outside:  # plain names only; where they are links, as in the Hub's cache, the user's disk decides
            raise FormatError(
                "the index points outside its folder", where=str(folder / INDEX), found=", ".join(outside),
                expected="names of files beside the index",
            )  # fmt: skip
        return sorted(set(names.values()))
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    raise FormatError(
        "there are no weights that can be read safely",
        where=str(folder),
        found=", ".join(pickled) or "no weights",
        expected=f"{WEIGHTS} or {INDEX}",
        fix="convert it to safetensors: a pickle can run code" if pickled else "fetch the whole checkpoint",
    )
