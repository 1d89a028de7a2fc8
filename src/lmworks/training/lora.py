"""Adapters on a whole model: choose layers by name, wrap them, switch between adapters, merge them, take them off.

    add_lora(model, rank=8)                              attention's queries and values, and the head of a task
    add_lora(model, targets=["c_attn", "mlp"])           published names, ours, parts of either, or patterns
    add_lora(model, targets="all-linear", dora=True)

A matrix that is published fused (GPT-2's c_attn, ModernBERT's Wqkv and Wi) is several layers here. Its adapter has one A
and a B as tall as all of them: they share A and hold a piece of B each, so that files and gradients are the same.

Shapes: I inputs, O outputs, R rank, V vocab_size, D hidden_size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.checkpoint import BODY, HEAD, Row, alias, make_rows
from lmworks.models.heads import Model
from lmworks.training.int8 import Int8Linear
from lmworks.training.lora_layers import (
    Adapted,
    LoraEmbedding,
    LoraLinear,
    LowRank,
    Rows,
    TokenRows,
    Whole,
    adapted_layers,
)

DEFAULT = "default"  # the name of an adapter, here as in peft
ALL_LINEAR = "all-linear"
USUAL = ("q_proj", "v_proj")  # as in peft, where the whole of a fused matrix is adapted
USUAL_OF = {"phi": (*USUAL, "up_proj", "down_proj")}
EMBEDDING, PROJECTION = f"{BODY}embeddings.tokens", f"{HEAD}project"


class Site(NamedTuple):
    """One published matrix, and the layers here that it holds."""

    key: str  # "bert.encoder.layer.0.attention.self.query"
    layers: tuple[str, ...]  # "transformer.layers.0.attention.q_proj"; several where it is fused
    transposed: bool  # stored (in, out)


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
    drawn as peft draws it, uniform within 1 / sqrt(I), from a generator of its own; B is 0. Raises InputError for a
    name that no layer has.
    """
    check_numbers(rank, alpha, dropout)
    copied = whole_layers(model, whole)
    chosen = choose(model, targets, {*copied, *([EMBEDDING, PROJECTION] if tokens else [])})
    generator = torch.Generator().manual_seed(seed)
    for site, layers in chosen:
        a, width = None, None
        for layer in layers:
            frozen = frozen_matrix(model, layer)  # (O, I), (D, V)
            outputs, inputs = frozen.shape
            if is_embedding(model, layer):  # zeros in A here, so that only the rows of a batch have a gradient
                a = torch.zeros(rank, inputs)
                b = torch.empty(outputs, rank).normal_(generator=generator)
            else:
                bound = inputs**-0.5
                a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator) if width is None else a
                b = torch.zeros(outputs, rank)
            shared = width if width is not None else nn.Parameter(a.to(frozen.device))
            magnitude = torch.linalg.norm(frozen.float(), dim=1) if dora else None
            wrap(model, layer, name, LowRank(shared, b.to(frozen.device), alpha=alpha, dropout=dropout, rslora=rslora,
                                             magnitude=magnitude))  # fmt: skip
            width = shared
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


def published_rows(model: Model) -> list[Row]:
    """Return the rows of the model's file, whether or not it carries adapters."""
    return make_rows(Model(model.config, model.kind, model.spec, seed=None))


def find_sites(model: Model) -> list[Site]:
    """Return every matrix that an adapter may sit on, in the file's order; a tied projection too."""
    sites = [
        Site(row.key.removesuffix(".weight"), tuple(name.removesuffix(".weight") for name in row.names), row.transposed)
        for row in published_rows(model)
        if row.key.endswith(".weight") and len(row.shape) == 2
    ]
    tied = alias(model, "project.weight").removesuffix(".weight") if model.is_tied else ""
    return [*sites, Site(tied, (PROJECTION,), False)] if tied else sites


def choose(
    model: Model, targets: str | Sequence[str] | None, excluded: Collection[str]
) -> list[tuple[Site, tuple[str, ...]]]:
    """Return the matrices that the targets name, each with the layers of it that are adapted."""
    sites = [site for site in find_sites(model) if not excluded & set(site.layers)]
    if targets is None:
        wanted = USUAL_OF.get(model.config.model_type, USUAL)
        return [(s, s.layers) for s in sites if any(matches(t, layer) for layer in s.layers for t in wanted)]
    if targets == ALL_LINEAR:
        vocabulary = {PROJECTION} if model.spec.outputs == "vocab" else set()
        return [(s, s.layers) for s in sites if not (is_embedding(model, s.layers[0]) or vocabulary & set(s.layers))]
    names = [targets] if isinstance(targets, str) else list(targets)
    chosen, used = [], set()
    for site in sites:
        by_key = {t for t in names if matches(t, site.key)}
        by_layer = {layer: {t for t in names if matches(t, layer)} for layer in site.layers}
        layers = site.layers if by_key else tuple(layer for layer in site.layers if by_layer[layer])
        used |= by_key.union(*by_layer.values())
        if layers:
            chosen.append((site, layers))
    for target in names:
        if target not in used:
            raise no_such_layer(target, [path for site in sites for path in (site.key, *site.layers)])
    if not chosen:
        raise InputError("an adapter needs at least one layer", fix=f'name some, or choose "{ALL_LINEAR}"')
    return chosen


def matches(target: str, path: str) -> bool:
    """Say whether a target is a path, whole parts of one, or a pattern for all of it."""
    if f".{target}." in f".{path}.":
        return True
    try:
        return re.fullmatch(target, path) is not None
    except re.error:
        return False


def no_such_layer(target: str, paths: Sequence[str]) -> InputError:
    """Return the error for a target that matches nothing."""
    parts = sorted({part for path in paths for part in path.split(".") if not part.isdigit()})
    return InputError(
        f"no layer of this model is called {target!r}", expected=f"one of {', '.join(parts)}; or {ALL_LINEAR}",
        fix=did_you_mean(target, parts).strip(),
    )  # fmt: skip


def whole_layers(model: Model, names: Sequence[str] | None) -> list[str]:
    """Return the layers that are trained as copies; None: every layer of a task's head."""
    owners = {
        name.rpartition(".")[0]: row.key.rpartition(".")[0]
        for row in reversed(published_rows(model))  # so that a weight's name wins over a bias that lies elsewhere
        for name in row.names
    }
    if names is None:
        answers = model.spec.outputs not in ("vocab", "none")
        return [layer for layer in reversed(owners) if answers and layer.startswith(HEAD)]
    if model.is_tied:
        owners[PROJECTION] = alias(model, "project.weight").removesuffix(".weight")
    found = []
    for name in names:
        layers = [layer for layer, key in owners.items() if matches(name, layer) or matches(name, key)]
        if not layers:
            raise no_such_layer(name, [*owners, *owners.values()])
        found += layers
    if model.is_tied and {EMBEDDING, PROJECTION} & set(found):
        found += [EMBEDDING, PROJECTION]
    return list(dict.fromkeys(found))


def frozen_matrix(model: Model, layer: str) -> Tensor:
    """Return the matrix (O, I) of a layer without its adapters; an embedding's (D, V)."""
    module = model.get_submodule(layer)
    weight = module.frozen if isinstance(module, Adapted) else module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_embedding(model, layer) else weight.detach()


def is_embedding(model: Model, layer: str) -> bool:
    """Say whether a layer looks up rather than multiplies."""
    module = model.get_submodule(layer)
    return isinstance(module.base if isinstance(module, Adapted) else module, nn.Embedding)


def wrap(model: Model, layer: str, name: str, adapter: nn.Module) -> None:
    """Put an adapter on a layer; one of the same name is replaced."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise InputError("this cannot be the name of an adapter", found=name, expected="letters, digits and '_'")
    module = model.get_submodule(layer)
    base = module.base if isinstance(module, Adapted) else module
    kind: type[Adapted[Any]] = (
        TokenRows if isinstance(adapter, Rows)
        else Whole if not isinstance(adapter, LowRank)
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


def copy_layers(model: Model, layers: Sequence[str], name: str, values: dict[str, Tensor] | None = None) -> None:
    """Put trainable copies of layers on them, holding `values` by our names where they are given."""
    made: dict[str, nn.Module] = {}
    for layer in layers:
        module = model.get_submodule(layer)
        base = module.base if isinstance(module, Adapted) else module
        twin = copy.deepcopy(base)
        for leaf, parameter in list(twin.named_parameters()):
            given = (values or {}).get(f"{layer}.{leaf}", parameter.detach())
            setattr(twin, leaf, nn.Parameter(given.to(parameter.device, torch.float32, copy=True)))
        made[layer] = twin
    if values is None and model.is_tied and {EMBEDDING, PROJECTION} <= made.keys():
        made[PROJECTION].weight = made[EMBEDDING].weight
    for layer, twin in made.items():
        wrap(model, layer, name, twin)


def train_rows(model: Model, tokens: Sequence[int], name: str) -> None:
    """Make the embeddings of some tokens trainable, and their rows of the projection to the vocabulary."""
    size = model.config.vocab_size
    wrong = [token for token in tokens if not 0 <= token < size]
    if wrong:
        raise InputError("the model has no such tokens", found=str(wrong[:5])[1:-1], expected=f"0 to {size - 1}",
                         fix="resize the embeddings first")  # fmt: skip
    shared: Rows | None = None
    for layer in (EMBEDDING, *([PROJECTION] if model.spec.outputs == "vocab" else [])):
        if shared is None or not model.is_tied:
            module = model.get_submodule(layer)
            weight = module.frozen if isinstance(module, Adapted) else module.weight
            assert isinstance(weight, Tensor)
            shared = Rows(tokens, weight.detach()[list(tokens)].float(), size).to(weight.device)
        wrap(model, layer, name, shared)


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
