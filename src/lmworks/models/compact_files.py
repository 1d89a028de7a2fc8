"""Folders of models with compact layers: a config.json that no other reader takes for the published model's.

    lmworks_quantization   layers: what each compact layer is; sizes: what the published config has no words for, fewer
                           heads of the same size; and the published type, instead of which the file names our own

The tensors of a compact layer stand in model.safetensors under "lmworks." and our name of them; all others under their
published names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import FormatError, InputError
from lmworks.models.compact import (
    COMPACT,
    Grid,
    LowRankLinear,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedLinear,
    unpack4,
)
from lmworks.models.config import Config
from lmworks.models.custom import OWN
from lmworks.models.families import COMPACT_KEY, read_compact

State = dict[str, Tensor]


def compact_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the compact layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, COMPACT)}


def describe_layer(layer: nn.Module) -> dict[str, Any]:
    """Return what config.json says of a layer."""
    if isinstance(layer, LowRankLinear):
        return {"kind": "low-rank", "rank": layer.left.shape[1]}
    if isinstance(layer, TiedLinear):
        return {"kind": "tied"}
    assert isinstance(layer, Quantized)
    kind = "embedding" if isinstance(layer, QuantizedEmbedding) else "linear"
    return {"kind": kind, "shape": list(layer.shape), **layer.grid.to_dict()}


def sayable(c: Config) -> Config:
    """Return the config with as many heads of this size as the width has room for: what the family can write."""
    heads = max(c.hidden_size // c.head_dim, 1)
    return replace(c, num_attention_heads=heads, num_key_value_heads=heads, head_dim=c.hidden_size // heads)


def describe_layers(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return what config.json says of all of them."""
    return {name: describe_layer(layer) for name, layer in layers.items()}


def own_state(state: Mapping[str, Tensor], published: Iterable[str], model: nn.Module) -> State:
    """Return the tensors that no row of the family's table holds, under names that no published file has."""
    held = set(published)
    parts = ("weight", "q", "scale", "zero")  # which the embedding has
    tied = {f"head.project.{part}" for part in parts} if getattr(model, "is_tied", False) else set()
    return {f"{OWN}{name}": tensor.contiguous() for name, tensor in state.items() if name not in held | tied}


def read_layers(c: Config) -> dict[str, dict[str, Any]]:
    """Return what config.json says of the compact layers; {} for a published model."""
    layers = read_compact(c).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise FormatError(f"config.json: {COMPACT_KEY} is not what we write", fix="write the model again")
    return layers


def restore(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], tensors: State, where: str,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Put the compact layers of a folder, and plain tensors that stand beside them, into the network, in place.

    Raises FormatError for tensors that do not fit what config.json says, InputError for a dtype that whole numbers
    cannot have.
    """
    if dtype not in (None, torch.float32) and any(said.get("kind") != "low-rank" for said in layers.values()):
        raise InputError("a quantized model runs in its own numbers", where=where, found=str(dtype), fix="--dtype fp32")
    found = {name.removeprefix(OWN): tensor for name, tensor in tensors.items()}
    problems = []
    for name, said in sorted(layers.items(), key=lambda item: item[1].get("kind") == "tied"):  # after what it shares
        own = {key.rpartition(".")[2]: found.pop(key) for key in list(found) if key.rpartition(".")[0] == name}
        try:
            parent = model.get_submodule(name.rpartition(".")[0])
            plain = getattr(parent, name.rpartition(".")[2])
            layer = tie(model, own) if said.get("kind") == "tied" else make_layer(said, own, plain)
            setattr(parent, name.rpartition(".")[2], layer if dtype is None else layer.to(dtype))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, InputError) as error:
            problems.append(f"{name} ({error})")
    for name, tensor in found.items():
        module, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(module)
            fits = getattr(owner, leaf).shape == tensor.shape
        except AttributeError:
            fits = False
        if fits:
            setattr(owner, leaf, nn.Parameter(tensor if dtype is None else tensor.to(dtype)))
        else:
            problems.append(name)
    problems += [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if problems:
        raise FormatError("the compact layers do not fit config.json", where=where, found=", ".join(problems[:8]),
                          fix="write the model again with lmworks quantize or lmworks prune")  # fmt: skip


def tie(model: nn.Module, own: State) -> TiedLinear:
    """Return the projection by the embedding's own numbers."""
    table, bias = model.get_submodule("transformer.embeddings.tokens"), own.pop("bias", None)
    check(isinstance(table, QuantizedEmbedding) and not own, "the embedding's numbers")
    assert isinstance(table, QuantizedEmbedding)
    check(bias is None or tuple(bias.shape) == table.shape[:1], "its bias")
    return TiedLinear(table, bias=bias)


def make_layer(said: Mapping[str, Any], own: State, plain: nn.Module) -> nn.Module:
    """Return the layer that a config.json describes, from its tensors; `plain` is the one that it replaces."""
    shape = tuple(getattr(plain, "weight").shape)  # noqa: B009 (a Linear or an Embedding)
    bias = own.pop("bias", None)
    if said["kind"] == "low-rank":
        left, right = own.pop("left"), own.pop("right")
        check(not own and (left.shape[0], right.shape[1], left.shape[1]) == (*shape, right.shape[0]), "its factors")
        return LowRankLinear(left, right, bias)
    settings = {key: value for key, value in said.items() if key not in ("kind", "shape")}
    grid = Grid(**settings)
    q, scale, zero, span = own.pop("q"), own.pop("scale"), own.pop("zero", None), own.pop("span", None)
    columns = (shape[1] + 1) // 2 if grid.bits == 4 else shape[1]
    check(not own and tuple(q.shape) == (shape[0], columns), "its numbers")
    check(q.dtype == (torch.uint8 if grid.bits == 4 else torch.int8), "their type")
    check((zero is None) == grid.symmetric, "its zeros")
    groups = -(-shape[1] // grid.per) if isinstance(grid.per, int) else 1
    check(tuple(scale.shape) == ((1, 1) if grid.per == "tensor" else (shape[0], groups)), "its scales")
    check(zero is None or zero.shape == scale.shape, "its zeros")
    numbers = unpack4(q, shape[1]) if grid.bits == 4 else q
    if said["kind"] == "embedding":
        return QuantizedEmbedding(numbers, scale, zero, grid)
    check(bias is None or tuple(bias.shape) == shape[:1], "its bias")
    check((span is not None) == (grid.activations == "static"), "its calibration")
    return QuantizedLinear(numbers, scale, zero, grid, bias=bias, span=span)


def check(good: bool, what: str) -> None:
    """Raise ValueError unless `good`."""
    if not good:
        raise ValueError(f"{what} do not fit")
