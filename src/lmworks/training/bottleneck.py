"""Bottleneck adapters: a narrow network after attention and after the MLP of every block, the only thing trained.

    h = W x + b,  y = h + U act(D h + d) + u        W attention's output projection, or the MLP's last

Placed as by Houlsby et al. (2019): on what each half of a block gives, before it is added to the stream. The later,
cheaper place of Pfeiffer et al. (2021) reads the stream after the last norm of a block, which only post-norm models
have; this one means the same in post-norm, pre-norm and parallel blocks. U and u start at 0: a fresh adapter changes
nothing. Dropout, where the model has any, comes after the adapter.

Shapes: O outputs of the layer, R size of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import strip
from lmworks.models.heads import Model, NoDraw
from lmworks.models.layers import ACTIVATIONS
from lmworks.models.weights import State
from lmworks.training.lora import DEFAULT, activate, copy_layers, frozen_matrix, remove_adapter, wrap
from lmworks.training.lora_layers import Bottleneck
from lmworks.training.peft_format import Settings
from lmworks.training.targets import Site, find_sites, matches, rename, whole_layers

PLACES = ("attention.o_proj", "mlp.down_proj")
MARK = ".bottleneck_"  # in tensors' names, between the layer's and "down.weight"
START = 1e-2  # of D, as in Houlsby et al.: near zero, so that training starts gently


def add_bottleneck(
    model: Model, *, size: int = 48, act: str = "gelu", whole: Sequence[str] | None = None, seed: int = 0,
    name: str = DEFAULT,
) -> Model:  # fmt: skip
    """Freeze a model and put a bottleneck after each half of every block: it answers as before until it is trained.

    `whole` are layers of which a copy is trained as it is; None: the head of a task. Raises InputError for a size or
    an activation that cannot be.
    """
    if size < 1:
        raise InputError("no adapter can have this bottleneck", found=str(size), expected="1 or more")
    if act not in ACTIVATIONS:
        raise InputError("there is no such activation", found=act, expected=", ".join(ACTIVATIONS))
    remove_adapter(model, name)
    generator = torch.Generator().manual_seed(seed)
    for site in places(model):
        frozen = frozen_matrix(model, site.layers[0])  # (O, I)
        adapter = make_bottleneck(len(frozen), size, act)
        with torch.no_grad():
            for key, parameter in adapter.named_parameters():
                parameter.zero_()
                if key == "down.weight":
                    parameter.normal_(0.0, START, generator=generator)
        wrap(model, site.layers[0], name, adapter.to(frozen.device))
    copy_layers(model, whole_layers(model, whole), name)
    activate(model, name)
    return model


def places(model: Model) -> list[Site]:
    """Return the matrices that bottlenecks come after."""
    return [site for site in find_sites(model) if any(matches(place, site.layers[0]) for place in PLACES)]


def make_bottleneck(outputs: int, size: int, act: str) -> Bottleneck:
    """Return a bottleneck whose numbers are still to be set."""
    with NoDraw():
        return Bottleneck(nn.Linear(outputs, size), nn.Linear(size, outputs), act=act)


def bottleneck_tensors(sites: Sequence[Site], on: Mapping[str, nn.Module]) -> State:
    """Return the tensors of an adapter by published names: "….o_proj.bottleneck_down.weight"."""
    return {
        f"{site.key}{MARK}{key}": parameter
        for site in sites
        if isinstance(on.get(site.layers[0]), Bottleneck)
        for key, parameter in on[site.layers[0]].named_parameters()
    }


def bottleneck_settings(on: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what adapter_config.json says of bottlenecks."""
    first = next(module for module in on.values() if isinstance(module, Bottleneck))
    return {"bottleneck_size": first.down.out_features, "bottleneck_act": first.act}


def take_bottlenecks(
    model: Model, tensors: State, settings: Settings, problems: list[str]
) -> list[tuple[str, nn.Module]]:
    """Take the bottlenecks out of a file's tensors: our layers with theirs; complaints go to `problems`."""
    found: dict[str, State] = {}
    for key in [key for key in tensors if MARK in key]:
        layer, _, leaf = key.partition(MARK)
        found.setdefault(layer, {})[leaf] = tensors.pop(key).float()
    act = str(settings.own.get("bottleneck_act", "gelu"))
    if act not in ACTIVATIONS:
        raise InputError("there is no such activation", found=act, expected=", ".join(ACTIVATIONS))
    sites = {strip(site.key, model): site for site in places(model)}
    adapters: list[tuple[str, nn.Module]] = []
    for key, state in found.items():
        site = sites.pop(strip(rename(model, key), model), None)
        if site is None:
            problems.append(f"no such layer: {key}")
            continue
        outputs = len(frozen_matrix(model, site.layers[0]))
        size = max(len(state["down.weight"]), 1) if "down.weight" in state else 1
        shapes = {"down.weight": (size, outputs), "down.bias": (size,), "up.weight": (outputs, size),
                  "up.bias": (outputs,)}  # fmt: skip
        wrong = [
            f"wrong shape: {key}{MARK}{leaf} is {shape_of(state.get(leaf))}, not {shape}"
            for leaf, shape in shapes.items()
            if shape_of(state.get(leaf)) != shape
        ]
        problems += wrong
        if not wrong:
            adapter = make_bottleneck(outputs, size, act)
            adapter.load_state_dict(state)
            adapters.append((site.layers[0], adapter.to(frozen_matrix(model, site.layers[0]).device)))
    problems += [f"missing: the bottleneck after {site.key}" for site in sites.values()]
    return adapters


def shape_of(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Return a tensor's shape, None for one that is absent."""
    return None if tensor is None else tuple(tensor.shape)
