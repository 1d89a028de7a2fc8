"""Which layers an adapter sits on: names that users give, ours or the published ones, and what they stand for.

"query"   "q_proj"   "attention"   "h.0.attn.c_attn"   ".*[qv]_proj"   "all-linear"   None: queries and values
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from torch import nn

from lmworks.base.errors import InputError, did_you_mean
from lmworks.models.checkpoint import BODY, HEAD, Row, alias, make_rows
from lmworks.models.heads import Model
from lmworks.training.lora_layers import Adapted

ALL_LINEAR = "all-linear"
USUAL = ("q_proj", "v_proj")  # as in peft, where the whole of a fused matrix is adapted
USUAL_OF = {"phi": (*USUAL, "up_proj", "down_proj")}
RENAMED = {  # layers that transformers 5, and so peft, calls otherwise than their tensors in files
    "vit": (("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2")),
}  # fmt: skip
EMBEDDING, PROJECTION = f"{BODY}embeddings.tokens", f"{HEAD}project"


class Site(NamedTuple):
    """One published matrix, and the layers here that it holds."""

    key: str  # "bert.encoder.layer.0.attention.self.query"
    layers: tuple[str, ...]  # "transformer.layers.0.attention.q_proj"; several where it is fused
    transposed: bool  # stored (in, out)


def published_rows(model: Model) -> list[Row]:
    """Return the rows of the model's file, whether or not it carries adapters."""
    return make_rows(Model(model.config, model.kind, model.spec, seed=None))


def find_sites(model: Model) -> list[Site]:
    """Return every matrix that an adapter may sit on, in the file's order; a tied projection too."""
    sites = [
        Site(
            rename(model, row.key.removesuffix(".weight")),
            tuple(name.removesuffix(".weight") for name in row.names),
            row.transposed,
        )
        for row in published_rows(model)
        if row.key.endswith(".weight") and len(row.shape) == 2
    ]
    tied = alias(model, "project.weight").removesuffix(".weight") if model.is_tied else ""
    return [*sites, Site(tied, (PROJECTION,), False)] if tied else sites


def rename(model: Model, key: str) -> str:
    """Return today's name of a layer; one that is today's stays."""
    for old, new in RENAMED.get(model.config.model_type, ()):
        key = key.replace(old, new)
    return key


def choose(
    model: Model, targets: str | Sequence[str] | None, excluded: AbstractSet[str]
) -> list[tuple[Site, tuple[str, ...]]]:
    """Return the matrices that the targets name, each with the layers of it that are adapted."""
    sites = [site for site in find_sites(model) if excluded.isdisjoint(site.layers)]
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


def is_embedding(model: Model, layer: str) -> bool:
    """Say whether a layer looks up rather than multiplies."""
    module = model.get_submodule(layer)
    return isinstance(module.base if isinstance(module, Adapted) else module, nn.Embedding)
