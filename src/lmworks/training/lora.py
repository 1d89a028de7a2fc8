"""Adapters on a whole model: choose layers by name, wrap them, switch between adapters, merge them, take them off.

    add_lora(model, rank=8)                              attention's queries and values, and the head of a task
    add_lora(model, targets=["c_attn", "mlp"])           published names, ours, parts of either, or patterns
    add_lora(model, targets="all-linear", dora=True)

A matrix that is published fused (GPT-2's c_attn, ModernBERT's Wqkv and Wi) is several layers here. Its adapter has one
A and a B as tall as all of them: they share A and hold a piece of B each, so that files and gradients are the same.
With dropout each of them drops inputs of its own, where peft drops the same for all.

Shapes: I inputs, O outputs, R rank, V vocab_size, D hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.heads import Model
from lmworks.models.prefix import PrefixSlot
from lmworks.training.int8 import Int8Linear
from lmworks.training.lora_layers import (
    Adapted,
    Bottleneck,
    LoraEmbedding,
    LoraLinear,
    LowRank,
    Prefixed,
    Rows,
    TokenRows,
    Whole,
    adapted_layers,
)
from lmworks.training.targets import EMBEDDING, PROJECTION, choose, is_embedding, whole_layers

DEFAULT = "default"  # the name of an adapter, here as in peft


class Count(NamedTuple):
    """How many numbers are trained, of all."""

    trainable: int
    total: int


def add_lora(
    model: Model, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
    targets: str | Sequence[str] | None = None, rslora: bool = False, dora: bool = False,
    whole: Sequence[str] | None = None, tokens: Sequence[int] = (), seed: int = 0, name: str = DEFAULT,
) -> Model:  # fmt: skip
    """Freeze a model and put a fresh adapter on it, in place: it answers as before until it is trained.

    `targets` are layers, under our names or the published ones, whole, in part ("query", "attention") or as a pattern;
    "all-linear"; None: queries and values. `whole` are layers of which a copy is trained as it is; None: the head of a
    task, as it is new there. `tokens` are ids whose embeddings are trained, and their rows of the projection. A is
    drawn as peft draws it, uniform within 1 / sqrt(I), from a generator of its own; B is 0 (an embedding's A is 0, its
    B normal). Raises InputError for a name that no layer has.
    """
    check_numbers(rank, alpha, dropout)
    remove_adapter(model, name)
    copied = whole_layers(model, whole)
    chosen = choose(model, targets, {*copied, *([EMBEDDING, PROJECTION] if tokens else [])})
    generator = torch.Generator().manual_seed(seed)
    for _, layers in chosen:
        a: nn.Parameter | None = None  # of all parts of a fused matrix
        for layer in layers:
            frozen = frozen_matrix(model, layer)  # (O, I), (D, V)
            outputs, inputs = frozen.shape
            drawn, b = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            if is_embedding(model, layer):
                b.normal_(generator=generator)
            elif a is None:
                drawn.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            a = nn.Parameter(drawn.to(frozen.device)) if a is None else a
            magnitude = torch.linalg.norm(frozen.float(), dim=1) if dora else None
            settings: dict[str, Any] = {"alpha": alpha, "dropout": dropout, "rslora": rslora}
            wrap(model, layer, name, LowRank(a, b.to(frozen.device), magnitude=magnitude, **settings))
    copy_layers(model, copied, name)
    if tokens:
        train_rows(model, tokens, name)
    activate(model, name)
    return model


def check_numbers(rank: int, alpha: float, dropout: float) -> None:
    """Raise InputError for numbers that no adapter can have."""
    for what, value, good, expected in (
        ("rank", rank, isinstance(rank, int) and rank >= 1, "1 or more"),
        ("alpha", alpha, alpha > 0, "above 0"),
        ("dropout", dropout, 0 <= dropout < 1, "0 or more, below 1"),
    ):
        if not good:
            raise InputError(f"no adapter can have this {what}", found=str(value), expected=expected)


def base_of(model: Model, layer: str) -> nn.Module:
    """Return a layer without its adapters."""
    module = model.get_submodule(layer)
    return module.base if isinstance(module, Adapted) else module


def frozen_matrix(model: Model, layer: str) -> Tensor:
    """Return the matrix (O, I) of a layer without its adapters; an embedding's (D, V)."""
    weight = base_of(model, layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_embedding(model, layer) else weight.detach()


def wrap(model: Model, layer: str, name: str, adapter: nn.Module) -> None:
    """Put an adapter on a layer, beside those of other names."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise InputError("this cannot be the name of an adapter", found=name, expected="letters, digits and '_'")
    module, base = model.get_submodule(layer), base_of(model, layer)
    kind: type[Adapted[Any]] = (
        TokenRows if isinstance(adapter, Rows)
        else Prefixed if isinstance(base, PrefixSlot)
        else Whole if not isinstance(adapter, LowRank | Bottleneck)
        else LoraEmbedding if isinstance(base, nn.Embedding)
        else LoraLinear
    )  # fmt: skip
    if isinstance(module, Adapted) and type(module) is not kind:
        raise InputError("a layer carries one kind of adapter", where=layer, found=f"{type(module).__name__} and "
                         f"{kind.__name__}", fix="leave the layer out of one of them, or unload the other")  # fmt: skip
    if not isinstance(module, Adapted):
        module = kind(base).train(base.training)
        parent, _, leaf = layer.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    module.adapters[name] = adapter.train(module.training)


def copy_layers(model: Model, layers: Sequence[str], name: str, values: Mapping[str, Tensor] | None = None) -> None:
    """Put trainable copies of layers on them, holding `values` by our names where they are given."""
    made: dict[str, nn.Module] = {}
    for layer in layers:
        made[layer] = twin = copy.deepcopy(base_of(model, layer))
        for leaf, parameter in list(twin.named_parameters()):
            given = (values or {}).get(f"{layer}.{leaf}", parameter.detach())
            setattr(twin, leaf, nn.Parameter(given.to(parameter.device, torch.float32, copy=True)))
    if model.is_tied and {EMBEDDING, PROJECTION} <= made.keys():
        one, two = made[EMBEDDING], made[PROJECTION]
        if torch.equal(one.weight, two.weight):  # type: ignore[arg-type]
            two.weight = one.weight
    for layer, twin in made.items():
        wrap(model, layer, name, twin)


def train_rows(model: Model, tokens: Sequence[int], name: str, values: Mapping[str, Tensor] | None = None) -> None:
    """Make the embeddings of some tokens trainable, and their rows of the projection to the vocabulary.

    `values` (N, D) are by layer, where they are given; a layer that they leave out stays as it is.
    """
    size = model.config.vocab_size
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong:
        raise InputError("the model has no such tokens", found=str(wrong[:5])[1:-1], expected=f"0 to {size - 1}",
                         fix="resize the embeddings first")  # fmt: skip
    layers = [EMBEDDING, *([PROJECTION] if model.spec.outputs == "vocab" else [])]
    given = values or {layer: frozen_rows(model, layer, tokens) for layer in layers}
    made = {layer: Rows(tokens, rows.float().clone(), size) for layer, rows in given.items()}
    if model.is_tied:
        made[PROJECTION] = made[EMBEDDING]
    for layer, rows in made.items():
        wrap(model, layer, name, rows.to(frozen_matrix(model, layer).device))


def frozen_rows(model: Model, layer: str, tokens: Sequence[int]) -> Tensor:
    """Return the rows (N, D) of some tokens without any adapter."""
    weight = base_of(model, layer).weight
    assert isinstance(weight, Tensor)
    return weight.detach()[list(tokens)]


def activate(model: Model, name: str | None) -> None:
    """Let the model act, and be trained, with this adapter; None: as it is without any."""
    known = adapter_names(model)
    if name is not None and name not in known:
        raise InputError(f"the model carries no adapter {name!r}", expected=", ".join(known) or "none is there",
                         fix=did_you_mean(name, known).strip())  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in adapted_layers(model).values():
        module.active = name or ""
        for parameter in parts(module.current()):
            parameter.requires_grad_(True)


def parts(module: nn.Module | None) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module that may be absent."""
    if module is not None:
        yield from module.parameters()


def adapter_names(model: Model) -> list[str]:
    """Return the adapters that the model carries."""
    return list(dict.fromkeys(name for module in adapted_layers(model).values() for name in module.adapters))


def active_adapter(model: Model) -> str:
    """Return the adapter that the model acts with; raise InputError where there is none."""
    active = next((module.active for module in adapted_layers(model).values() if module.active), "")
    if not active:
        raise InputError("no adapter is active", expected=", ".join(adapter_names(model)) or "a model with adapters")
    return active


def trainable_parameters(model: Model) -> Count:
    """Count the numbers that are trained and all that the model holds; what is shared counts once."""
    frozen = sum(module.q.numel() for module in model.modules() if isinstance(module, Int8Linear))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Count(sum(p.numel() for p in model.parameters() if p.requires_grad), total + frozen)


def remove_adapter(model: Model, name: str) -> None:
    """Take one adapter off, in place, and leave the others."""
    for layer, module in adapted_layers(model).items():
        if name in module.adapters:
            del module.adapters[name]
            if not len(module.adapters):
                put(model, layer, module.base)


def unload(model: Model) -> Model:
    """Take every adapter off, in place: the model is what it was, and can be trained as a whole."""
    for name, module in adapted_layers(model).items():
        put(model, name, module.base)
    return model.requires_grad_(True)


def merge_lora(model: Model) -> dict[str, Any]:
    """Work the active adapter into the weights, in place, in float32; every adapter is gone then.

    Returns the facts: `adapter`, `merged` (how many layers), `untied` (an embedding that was the projection as well is
    not any longer, as only one of them was adapted).
    """
    name, tied = active_adapter(model), model.is_tied
    layers = adapted_layers(model)
    merged = [layer for layer, module in layers.items() if module.current() is not None]
    with torch.no_grad():
        plain = {layer: module.merged() for layer, module in layers.items()}  # before any of a tied pair changes
    for layer, module in plain.items():
        put(model, layer, module)
    untied = False
    if tied:
        embedding, projection = (model.get_parameter(f"{layer}.weight") for layer in (EMBEDDING, PROJECTION))
        untied = not torch.equal(embedding, projection)
        if untied:
            model.config = model.transformer.config = replace(model.config, tie_word_embeddings=False)
        else:
            model.tie()
    model.requires_grad_(True)
    return {"adapter": name, "merged": len(merged), "untied": untied}


def put(model: Model, layer: str, module: nn.Module) -> None:
    """Put a module in the place of a layer."""
    parent, _, leaf = layer.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
