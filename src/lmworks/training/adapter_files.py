"""Adapters between a model and a PEFT folder, and a base model opened together with an adapter.

A matrix that the file holds fused is several layers here: one A, and a B that is cut into theirs. What the file has
beside low-rank matrices is of three kinds: copies of whole layers (`modules_to_save`), rows of trained tokens, and an
embedding that had been given more rows before, which replaces the base's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmworks.base.errors import FormatError
from lmworks.models.checkpoint import head_rows, load_model, modernize, read_config, strip
from lmworks.models.config import Config
from lmworks.models.families import ADAPTED, find_base, put_head, read_kind
from lmworks.models.folder import VOCABULARIES
from lmworks.models.heads import Model
from lmworks.models.numbered import merge_layers
from lmworks.models.resize import fit_tokenizer, resize_tokens
from lmworks.models.weights import State, read_tensors
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_save import save_adapter
from lmworks.training.bottleneck import take_bottlenecks
from lmworks.training.int8 import quantize_base
from lmworks.training.lora import (
    DEFAULT,
    activate,
    base_of,
    copy_layers,
    frozen_matrix,
    remove_adapter,
    train_rows,
    wrap,
)
from lmworks.training.lora_layers import LowRank
from lmworks.training.peft_format import ADAPTER, DELTA, Settings, read_adapter, read_settings
from lmworks.training.prefix import take_prefix
from lmworks.training.targets import EMBEDDING, PROJECTION, find_sites, is_embedding, matches, published_rows, rename

PARTS = re.compile(r"(.+)\.lora_(A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector)")
__all__ = ["Opened", "load_adapter", "open_adapter", "save_adapter"]


class Opened(NamedTuple):
    """A base model with an adapter on it."""

    model: Model
    base: Path
    tokenizer: Path | None  # the folder that has it
    facts: dict[str, Any]

    def home(self, folder: Path) -> Path:
        """Return where what else belongs to the model is: an adapter of peft's has none of it."""
        return folder if (folder / ADAPTED).is_file() else self.base


def open_adapter(folder: str | Path, *, base: str | Path | None = None, int8: bool = False) -> Opened:
    """Read an adapter's base, by the name in its config or the one given, and put the adapter on it.

    With `int8` the base's matrices are held in eight bits.

    Labels and head are those of the adapted_config.json beside the adapter; without one, peft's task type and the size
    of the saved head decide. Raises InputError and FormatError that name the folder at fault.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    tensors = read_adapter(folder, settings.method)
    place = find_base(folder, str(base or settings.base))
    kind, labels = read_head(folder, read_config(place))
    model = load_model(place, kind, labels=labels, new_head=bool(settings.copied))
    if int8:
        quantize_base(model)
    held = {modernize(strip(key, model)) for key in (*read_tensors(place), *tensors)}
    missing = [row.key for row in head_rows(model) if strip(row.key, model) not in held]
    if missing:
        raise FormatError("neither the adapter nor its base holds the whole head", where=str(folder),
                          found=f"missing: {', '.join(missing)}", fix="save it with the adapter")  # fmt: skip
    facts = load_adapter(model, folder)
    holder = next((f for f in (folder, place) if any((f / name).is_file() for name in VOCABULARIES)), None)
    return Opened(model, place, holder, {**facts, "base": str(base or settings.base)})


def read_head(folder: Path, c: Config) -> tuple[str, tuple[str, ...]]:
    """Return the head that an adapter was trained with, and its labels; `c` is the base's config."""
    own = read_config(folder) if (folder / ADAPTED).is_file() else put_head(c, folder)
    return read_kind(own), own.labels


def load_adapter(model: Model, folder: str | Path, *, name: str = DEFAULT, trainable: bool = False) -> dict[str, Any]:
    """Put the adapter of a PEFT folder on a model, in place, and let the model act with it.

    Returns the facts: `adapter`, `method`, `layers`, `rank`, and `notes`: sentences for the user, such as that the
    embeddings were resized for tokens that were added. Raises one FormatError that lists everything that does not fit,
    as for an adapter of another base model.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    tensors = read_adapter(folder, settings.method)
    problems: list[str] = []
    take = {"adapter": take_bottlenecks, "prefix": take_prefix}.get(settings.method)
    adapters: list[tuple[str, nn.Module]] = [] if take is None else take(model, tensors, settings, problems)
    held = len(adapters)
    note = make_room(model, tensors, settings, folder)
    pairs: dict[str, State] = {}
    plain: State = {}
    deltas: State = {}
    for key, tensor in tensors.items():
        found = PARTS.fullmatch(key)
        if found:
            pairs.setdefault(found[1], {})[found[2].removesuffix(".weight")] = tensor.float()
        elif key.endswith(DELTA):
            deltas[key.removesuffix(DELTA)] = tensor
        else:
            plain[key.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")] = tensor
    copies, replaced = read_plain(model, plain, settings, problems)
    adapters += make_adapters(model, pairs, settings, problems)
    rows, tokens = read_rows(model, deltas, settings, problems)
    if not (problems or adapters or copies or rows):
        problems = ["it holds nothing"]
    if problems:
        raise FormatError(
            "the adapter does not fit this model", where=str(folder / ADAPTER),
            found="\n    ".join(["", *merge_layers(problems)]), expected="the layers of its own base model",
            fix=f"its base is {settings.base}" if settings.base else "",
        )  # fmt: skip
    remove_adapter(model, name)
    replace_base(model, replaced)
    for layer, adapter in adapters:
        wrap(model, layer, name, adapter)
    copy_layers(model, list(dict.fromkeys(key.rpartition(".")[0] for key in copies)), name, copies)
    if rows:
        train_rows(model, tokens, name, rows)
    activate(model, name)
    if not trainable:
        model.requires_grad_(False)
    return {"adapter": name, "method": settings.method, "layers": len(pairs) + held, "rank": settings.rank,
            "notes": [note] if note else []}  # fmt: skip


def make_room(model: Model, tensors: State, settings: Settings, folder: Path) -> str:
    """Give the model the rows that an adapter's tokens need, and say so; "" where it has them."""
    if model.config.vision is not None:
        return ""
    embedding = next(strip(site.key, model) for site in find_sites(model) if EMBEDDING in site.layers)
    rows = [1 + max(ids) for ids in settings.tokens.values() if ids]
    for key, tensor in tensors.items():
        bare = strip(key, model).replace(".base_layer.", ".")
        if bare == f"{embedding}.weight":
            rows.append(len(tensor))
        elif bare == f"{embedding}.lora_embedding_A" and tensor.ndim == 2:
            rows.append(tensor.shape[1])
    before, needed = model.config.vocab_size, max(rows, default=0)
    if needed <= before and any((folder / name).is_file() for name in VOCABULARIES):
        return fit_tokenizer(model, Tokenizer.from_pretrained(folder), where="the adapter's folder")
    if needed <= before:
        return ""
    resize_tokens(model, needed)
    return f"the embeddings were resized from {before} to {needed} rows, those that the adapter was trained with"


def make_adapters(
    model: Model, pairs: Mapping[str, State], settings: Settings, problems: list[str]
) -> list[tuple[str, LowRank]]:
    """Return our layers with their adapters; the parts of a fused matrix share A and have their rows of B."""
    sites = {strip(site.key, model): site for site in find_sites(model)}
    adapters = []
    for key, found in pairs.items():
        site = sites.get(strip(rename(model, key), model))
        if site is None:
            problems.append(f"no such layer: {key}")
            continue
        prefix = "embedding_" if is_embedding(model, site.layers[0]) else ""
        names = [f"{prefix}A", f"{prefix}B", *(["magnitude_vector"] if settings.dora else [])]
        if set(names) != set(found):
            problems.append(f"incomplete: {key} has {', '.join(sorted(found))}, not {', '.join(names)}")
            continue
        matrices = [frozen_matrix(model, layer) for layer in site.layers]  # (O, I) each
        heights, device = [len(matrix) for matrix in matrices], matrices[0].device
        rank = max(len(found[names[0]]) if found[names[0]].ndim else 0, 1)
        shapes = ((rank, matrices[0].shape[1]), (sum(heights), rank), (sum(heights),))
        wrong = [
            f"wrong shape: {key}.lora_{name} is {tuple(found[name].shape)}, not {shape}"
            for name, shape in zip(names, shapes, strict=False)
            if tuple(found[name].shape) != shape
        ]
        problems += wrong
        if wrong:
            continue
        a = nn.Parameter(found[names[0]].to(device))
        bs = torch.split(found[names[1]], heights)
        magnitudes = torch.split(found[names[2]], heights) if settings.dora else [None] * len(heights)
        for layer, b, magnitude in zip(site.layers, bs, magnitudes, strict=True):
            adapter = LowRank(
                a, b.clone(), alpha=settings.alpha_of(site.key), dropout=settings.dropout, rslora=settings.rslora,
                magnitude=None if magnitude is None else magnitude.clone(),
            )  # fmt: skip
            adapters.append((layer, adapter.to(device)))
    return adapters


def read_plain(model: Model, tensors: State, settings: Settings, problems: list[str]) -> tuple[State, State]:
    """Return whole layers under our names: the adapter's own copies, and what replaces the base's tensors."""
    rows = {strip(row.key, model): row for row in published_rows(model)}
    tied = {strip(site.key, model): site for site in find_sites(model) if site.layers == (PROJECTION,)}
    copies: State = {}
    replaced: State = {}
    for key, tensor in tensors.items():
        module, _, leaf = strip(key, model).rpartition(".")
        row = rows.get(f"{module}.{leaf}")
        twin = row is None and leaf == "weight" and module in tied
        shape = row.shape if row else (model.config.vocab_size, model.config.embedding_size or model.config.hidden_size)
        if row is None and not twin:
            problems.append(f"no such layer: {key}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"wrong shape: {key} is {tuple(tensor.shape)}, not {shape}")
        else:
            parts = dict(row.split(tensor)) if row else {f"{PROJECTION}.weight": tensor}
            own = any(matches(name, key.rpartition(".")[0]) for name in settings.copied)
            (copies if own else replaced).update(parts)
    first, second = (replaced.get(f"{layer}.weight") for layer in (EMBEDDING, PROJECTION))
    if model.is_tied and second is not None:
        if first is None or not torch.equal(first, second):
            problems.append("the projection differs from the embedding although they are one tensor")
        del replaced[f"{PROJECTION}.weight"]
    return copies, replaced


def replace_base(model: Model, values: State) -> None:
    """Put other tensors in the place of the base's."""
    for key, tensor in values.items():
        layer, _, leaf = key.rpartition(".")
        old = getattr(base_of(model, layer), leaf)
        new = nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False)
        setattr(base_of(model, layer), leaf, new)
        if model.is_tied and key == f"{EMBEDDING}.weight":
            base_of(model, PROJECTION).weight = new


def read_rows(
    model: Model, deltas: State, settings: Settings, problems: list[str]
) -> tuple[dict[str, Tensor], list[int]]:
    """Return the trained rows of the embedding, and of the projection where it has its own, and their tokens."""
    sites = {strip(site.key, model): site for site in find_sites(model)}
    found: dict[str, Tensor] = {}
    tokens: list[int] = []
    for key, tensor in deltas.items():
        site = sites.get(strip(key, model))
        tied = model.is_tied and site is not None and site.layers == (PROJECTION,)
        if tied and any(torch.equal(tensor, other) for twin, other in deltas.items() if twin != key):
            continue  # peft writes the rows of a tied embedding under both names
        ids = next((ids for name, ids in settings.tokens.items() if not name or matches(name, key)), [])
        wanted = (len(ids), model.config.embedding_size or model.config.hidden_size)
        if site is None or site.layers not in ((EMBEDDING,), *([] if model.is_tied else [(PROJECTION,)])):
            problems.append(f"no such embedding: {key}")
        elif tuple(tensor.shape) != wanted or (tokens and ids != tokens):
            problems.append(f"wrong rows: {key} has {tuple(tensor.shape)}, not {wanted}")
        else:
            tokens = ids
            found[site.layers[0]] = tensor
    return found, tokens
