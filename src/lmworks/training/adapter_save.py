"""Write an adapter that is on a model as a PEFT folder, which peft reads.

The parts of a matrix that the base's file holds fused go under its one name: their A, and their pieces of B one below
the other, zeros for a part that is not adapted.

Shapes: I inputs, O outputs, R rank, V vocab_size, D hidden_size, N trained rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmworks.base.files import write_json
from lmworks.models.checkpoint import alias
from lmworks.models.families import ADAPTED, HEADS, TASK_TYPES, write_config
from lmworks.models.heads import Model
from lmworks.models.numbered import to_template
from lmworks.models.weights import State
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.bottleneck import bottleneck_settings, bottleneck_tensors
from lmworks.training.lora import active_adapter, base_of, frozen_matrix
from lmworks.training.lora_layers import Bottleneck, LowRank, Prefix, Rows, Whole, adapted_layers
from lmworks.training.peft_format import ADAPTER, DELTA, Settings, write_folder
from lmworks.training.prefix import prefix_settings, prefix_tensors
from lmworks.training.targets import EMBEDDING, PROJECTION, Site, find_sites, is_embedding, published_rows

VLLM = "vLLM refuses adapters with {}: merge it into its base (lmworks merge) to serve it there"
OURS = "peft has no such adapter: lmworks alone reads {}"


def save_adapter(
    model: Model, folder: str | Path, *, base: str | Path, name: str | None = None, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Write an adapter (None: the active one) of a model as a PEFT folder; each file is whole or absent.

    `base` is what others will find the base model by: a name on the Hub, or a folder. A `tokenizer` is saved beside it
    where tokens were added. Returns the facts: `layers`, `copied`, `tokens`, `bytes`, and `notes`: who refuses it.
    """
    name, folder = name or active_adapter(model), Path(folder)
    on = {layer: module.adapters[name] for layer, module in adapted_layers(model).items() if name in module.adapters}
    sites, tensors = find_sites(model), State()
    adapted: dict[str, LowRank] = {}
    tokens: dict[str, list[int]] = {}
    for site in sites:
        found = [on.get(layer) for layer in site.layers]
        first = next((adapter for adapter in found if isinstance(adapter, LowRank)), None)
        if first is not None:
            adapted[site.key] = first
            tensors |= join(model, site, found, first)
        elif isinstance(found[0], Rows) and not (model.is_tied and site.layers == (PROJECTION,)):
            tensors[site.key + DELTA] = found[0].rows
            tokens[site.key] = list(found[0].tokens)
    copies = read_copies(model, on)
    tensors |= copies | new_embedding(model, sites, tokens, copies)
    settings = describe(model, sites, adapted, copies, tokens, str(base))
    settings, more = describe_method(model, sites, on, settings)
    write_folder(folder, settings, tensors | more)
    write_json(folder / ADAPTED, write_config(model.config, model.kind))
    if tokenizer is not None:
        tokenizer.save(folder)
    held = (("modules_to_save", copies), ("DoRA", settings.dora), ("trained tokens", tokens))
    refused = " and ".join(what for what, there in held if there)
    notes = [VLLM.format(refused)] if refused and settings.method == "lora" else []
    if settings.method == "adapter":
        notes = [OURS.format("bottlenecks")]
    elif settings.method == "prefix" and model.kind not in TASK_TYPES:
        notes = [OURS.format("a prefix before this head")]
    others = sum(isinstance(module, Bottleneck | Prefix) for module in on.values())
    return {
        "layers": len(adapted) + others, "copied": list(settings.copied),
        "tokens": len(next(iter(tokens.values()), [])),
        "bytes": (folder / ADAPTER).stat().st_size, "notes": notes,
    }  # fmt: skip


def join(model: Model, site: Site, found: Sequence[object], first: LowRank) -> State:
    """Return the tensors of one published matrix."""
    bs: list[Tensor] = []
    magnitudes: list[Tensor] = []
    for layer, adapter in zip(site.layers, found, strict=True):
        frozen = frozen_matrix(model, layer).float()
        if isinstance(adapter, LowRank):
            bs.append(adapter.B)
            magnitudes += [] if adapter.magnitude is None else [adapter.magnitude]
        else:  # a part that was left out: what changes nothing
            bs.append(torch.zeros(len(frozen), first.rank, device=frozen.device))
            magnitudes += [] if first.magnitude is None else [torch.linalg.norm(frozen, dim=1)]
    a, b = ("embedding_A", "embedding_B") if is_embedding(model, site.layers[0]) else ("A.weight", "B.weight")
    state = {f"{site.key}.lora_{a}": first.A, f"{site.key}.lora_{b}": torch.cat(bs)}
    return state | ({f"{site.key}.lora_magnitude_vector": torch.cat(magnitudes)} if magnitudes else {})


def read_copies(model: Model, on: Mapping[str, torch.nn.Module]) -> State:
    """Return the layers that the adapter has copies of, under published names."""
    layers = {layer for layer in on if isinstance(model.get_submodule(layer), Whole)}

    def value(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        return getattr(on[layer] if layer in layers else base_of(model, layer), leaf).detach()  # type: ignore[no-any-return]

    state = {
        row.key: row.join({name: value(name) for name in row.names})
        for row in published_rows(model)
        if any(name.rpartition(".")[0] in layers for name in row.names)
    }
    if model.is_tied and PROJECTION in layers:
        state[alias(model, "project.weight")] = value(f"{PROJECTION}.weight").clone()
    return state


def new_embedding(model: Model, sites: Sequence[Site], tokens: Mapping[str, list[int]], copies: State) -> State:
    """Return the embedding, and the projection, of a model that was given more tokens; nothing where the rest tells.

    The base's own file lacks the new rows, so that a reader could not make them.
    """
    before = int(model.config.source.get("vocab_size", model.config.vocab_size))
    trained = set().union(*tokens.values())
    if model.config.vision is not None or trained.issuperset(range(before, model.config.vocab_size)):
        return {}
    return {
        f"{site.key}.weight": base_of(model, site.layers[0]).weight.detach().clone()  # type: ignore[operator]
        for site in sites
        if site.layers == (EMBEDDING,) or (site.layers == (PROJECTION,) and model.spec.outputs == "vocab")
        if f"{site.key}.weight" not in copies
    }


def describe(
    model: Model, sites: Sequence[Site], adapted: Mapping[str, LowRank], copies: State,
    tokens: Mapping[str, list[int]], base: str,
) -> Settings:  # fmt: skip
    """Return what adapter_config.json says: the usual rank and alpha, and the layers that have others."""
    adapters = list(adapted.values())
    usual = {what: Counter(getattr(adapter, what) for adapter in adapters).most_common(1) for what in ("rank", "alpha")}
    rank, alpha = (usual[what][0][0] if usual[what] else 8 for what in ("rank", "alpha"))
    modules = dict.fromkeys(key.rpartition(".")[0] for key in copies)
    copied = dict.fromkeys(top if (top := key.partition(".")[0]) in HEADS else key for key in modules)
    task = TASK_TYPES.get(model.kind)
    expects_head = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # peft reads a head for these whatever is stated
    free = [site.key for site in sites if site.key not in modules]
    return Settings(
        base=base, task_type=task if copied or not expects_head else None, rank=rank, alpha=alpha,
        dropout=max((adapter.dropout for adapter in adapters), default=0.0),
        rslora=any(adapter.rslora for adapter in adapters), dora=any(a.magnitude is not None for a in adapters),
        transposed=any(site.transposed for site in sites if site.key in adapted),
        targets=shorten(list(adapted), free), copied=tuple(copied),
        ranks={key: adapter.rank for key, adapter in adapted.items() if adapter.rank != rank},
        alphas={key: adapter.alpha for key, adapter in adapted.items() if adapter.alpha != alpha}, tokens=tokens,
    )  # fmt: skip


def describe_method(
    model: Model, sites: Sequence[Site], on: Mapping[str, torch.nn.Module], settings: Settings
) -> tuple[Settings, State]:
    """Return the settings and the tensors of bottlenecks or a prefix; of LoRA nothing more.

    Without a task peft would leave a prefix out in silence; it refuses a task that it does not know.
    """
    kinds = {type(module) for module in on.values()}
    if Bottleneck in kinds:
        return replace(settings, method="adapter", own=bottleneck_settings(on)), bottleneck_tensors(sites, on)
    if Prefix in kinds:
        task = TASK_TYPES.get(model.kind, model.kind)
        own = prefix_settings(model, on)
        return replace(settings, method="prefix", task_type=task, own=own), prefix_tensors(on)
    return settings, {}


def shorten(chosen: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest endings that name the chosen layers and no others: all "….query" -> ("query",)."""
    found: dict[str, None] = {}
    for key in chosen:
        inner = to_template(key)[0].partition(".{}.")[2] or key
        endings = [".".join(inner.split(".")[i:]) for i in range(inner.count("."), -1, -1)] + [key]
        alike = ([k for k in keys if f".{k}".endswith(f".{ending}")] for ending in endings)
        found[next((e for e, group in zip(endings, alike, strict=True) if set(group) <= set(chosen)), key)] = None
    return tuple(found)
