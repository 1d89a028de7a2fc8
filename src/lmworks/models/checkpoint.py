"""Model folders in the Hub's layout: read strictly, written reversibly.

Published tensor names exist only here and in the families' tables. `make_rows` lays the table of a family over our
parameters once; `from_hf` and `to_hf` walk the same rows in opposite directions, so they are inverse to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_bytes, write_json
from lmworks.models.compact_files import compact_layers, describe_layers, own_state, read_layers, sayable
from lmworks.models.compact_files import restore as restore_compact
from lmworks.models.config import Config, HeadSpec
from lmworks.models.custom import OWN, Code, Part, is_own, is_replaced, own_tensors, read_parts, restore
from lmworks.models.families import (
    COMPACT_KEY,
    LABELLED,
    architecture,
    find_family,
    find_head,
    mark_compact,
    mark_custom,
    plain_source,
    read_config,
    read_kind,
    token_ids,
    unsayable,
    write_config,
)
from lmworks.models.heads import CausalLM, Head, Model, initialise
from lmworks.models.numbered import merge_layers, to_template
from lmworks.models.weights import WEIGHTS, State, read_tensors

__all__ = ["load_model", "read_config", "save_model"]

BODY, HEAD = "transformer.", "head."
SHARED = (*LABELLED, "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")  # heads that share tensor names
LEGACY = {"gamma": "weight", "beta": "bias"}  # norms in checkpoints that came from TensorFlow


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


def load_model(
    folder: str | Path, head: str | None = None, *, dtype: torch.dtype | None = torch.float32,
    labels: Sequence[str] | None = None, new_head: bool = False, seed: int = 0, code: Sequence[str | Code] = (),
) -> Model:  # fmt: skip
    """Read a model in evaluation mode; every missing, unused or mis-shaped tensor is one FormatError's.

    `head` is the head to read ("Model": none; None: what config.json names). The weights of other heads in the file are
    left out. With `new_head` a head that the file lacks is drawn from `seed`, for `labels`; otherwise it is an error.

    The network is laid out without memory and the mapped tensors are assigned to it: nothing is drawn, nothing copied
    unless the file holds another dtype. `dtype=None` keeps the file's own, whatever it is.

    `code` is that of the layers which its maker put in (models/custom.py): classes, or "FILE.py:Name".
    """
    folder = Path(folder)
    config = read_config(folder)
    if labels is not None:
        config = replace(config, labels=tuple(labels))
    kind = head or read_kind(config)
    model = make_empty(config, kind)
    if not new_head:
        check_task(model, folder)
    file = read_tensors(folder)
    if model.spec.otherwise and not has_head(model, file):
        other = replace(config, source={**config.source, **model.spec.otherwise})
        model = renamed if has_head(renamed := make_empty(other, kind), file) else model
    if model.spec.optional and not has_head(model, file):
        model.spec = HeadSpec(outputs="none")
        model.head = Head(config, model.spec)
    parts = read_parts(config)
    layers = read_layers(config)
    compact = bool(layers) or COMPACT_KEY in config.source
    own = {key: file.pop(key) for key in list(file) if (parts or compact) and key.startswith(OWN)}
    if compact:  # what is held in another form comes after the rest
        held = {key.removeprefix(OWN) for key in own} | {f"{layer}.weight" for layer in layers}
        held |= {f"{layer}.bias" for layer in layers}
        missing = [row for row in make_rows(model) if row.key not in file and held & set(row.names)]
        file |= {row.key: torch.empty(row.shape, device="meta") for row in missing}
    state = from_hf(file, model, where=str(folder), new_head=new_head, parts=parts)
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        parameter = torch.nn.Parameter(tensor if dtype is None else tensor.to(dtype))
        setattr(model.get_submodule(module), leaf, parameter)
    model.tie()
    if new_head:
        draw_head(model, seed, dtype or torch.float32)
    if compact:
        restore_compact(model, layers, own, str(folder), dtype)
        model.config = plain_source(model.config)
    if parts or code:
        restore(model, parts, code, own, str(folder))
    return model.eval()


def has_head(model: Model, file: State) -> bool:
    """Say whether a file holds some of the model's head."""
    return any(row.key in file or strip(row.key, model) in file for row in head_rows(model))


def make_empty(config: Config, kind: str) -> Model:
    """Return a model without memory; the causal language model as the class that training and export know."""
    spec = find_head(config, kind)
    return CausalLM(config, spec, seed=None) if kind == "CausalLM" else Model(config, kind, spec, seed=None)


def draw_head(model: Model, seed: int, dtype: torch.dtype) -> None:
    """Draw those parameters of the head that the file lacked."""
    missing = [name for name, parameter in model.head.named_parameters() if parameter.is_meta]
    for name in missing:
        module, _, leaf = name.rpartition(".")
        owner = model.head.get_submodule(module)
        setattr(owner, leaf, torch.nn.Parameter(torch.empty_like(getattr(owner, leaf), device="cpu", dtype=dtype)))
    fresh = torch.nn.ParameterDict({name.replace(".", "_"): model.head.get_parameter(name) for name in missing})
    initialise(fresh, model.config, seed)


def check_task(model: Model, folder: Path) -> None:
    """Raise InputError where config.json names another task's head: some share tensors, and a tied one needs none."""
    stated = read_kind(model.config)
    if stated != model.kind and stated in SHARED and model.kind != "Model":
        raise wrong_head(model, folder, stated)


def wrong_head(model: Model, where: str | Path, stated: str) -> InputError:
    """Return the error for a checkpoint that was made for another task."""
    c = model.config
    return InputError(
        f"this checkpoint has no head for {model.kind}",
        where=str(where),
        found=architecture(c.model_type, stated),
        expected=architecture(c.model_type, model.kind),
        fix=f"use it for its own task, or train a head for this one: lmworks finetune {where} DATA --task …",
    )


def save_model(model: Model, folder: str | Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, each atomically; a tied head is left out.

    Raises InputError for weights that are not finite. Settings that are in the folder's generation_config.json stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError("the weights hold NaN or infinity", found=", ".join(broken), fix="use an earlier checkpoint")
    layers, sizes = compact_layers(model), unsayable(model.config, model.kind)
    if model.parts and (layers or sizes):
        raise InputError("compact layers do not go with layers of a user's own", fix="leave one of them out")
    rows = make_rows(Model(model.config, model.kind, model.spec, seed=None) if model.parts or layers else model)
    rows = [row for row in rows if not any(is_own(model, name) or name not in state for name in row.names)]
    dtype = str(state[rows[0].names[0]].dtype).removeprefix("torch.")
    own = own_tensors(model)
    if layers:
        rows = [row for row in rows if not any(name.rpartition(".")[0] in layers for name in row.names)]
        own = own_state(state, [name for row in rows for name in row.names], model)
    write_bytes(folder / WEIGHTS, serialize({**to_hf(state, rows), **own}, metadata={"format": "pt"}))
    if model.config.causal:
        path = folder / "generation_config.json"
        ids = {name: value for name, value in token_ids(model.config).items() if value is not None}
        write_json(path, {"_from_model_config": True, **(read_json(path) if path.exists() else {}), **ids})
    config = write_config(sayable(model.config) if sizes else model.config, model.kind)
    if layers or sizes:
        config = mark_compact(config, model.config, describe_layers(layers), sizes)
    if model.parts:
        config = mark_custom(config, model.config, [part._asdict() for part in model.parts])
    write_json(folder / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})


def make_rows(model: Model) -> list[Row]:
    """Lay the tables of the family and the head over the model: one row a tensor of the file, in our order."""
    family = find_family(model.config.model_type)
    prefix = "" if model.kind == "Model" else family.PREFIX if model.spec.prefix is None else model.spec.prefix
    theirs_of: dict[str, tuple[str, tuple[str, ...]]] = {}  # our template -> theirs, and all of ours that it holds
    for theirs, ours in family.KEYS.items():
        targets = (ours,) if isinstance(ours, str) else ours
        theirs_of.update(dict.fromkeys(targets, (theirs, targets)))
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items() if name.startswith(BODY)}
    rows = []
    for name, shape in shapes.items():
        bare = name.removeprefix(BODY)
        if bare in theirs_of:  # a parameter of its own rather than a module's
            rows.append(Row(prefix + theirs_of[bare][0], (name,), (shape,), False))
            continue
        module, _, leaf = bare.rpartition(".")
        template, layer = to_template(module)
        if template not in theirs_of:
            raise InputError("no published file has such a layer", found=name, fix="merge or unload its adapter first")
        theirs, targets = theirs_of[template]
        if template == targets[0]:  # the other parts of a fused tensor are in the row of its first
            names = tuple(f"{BODY}{target.format(layer)}.{leaf}" for target in targets)
            key = f"{prefix}{theirs.format(layer)}.{leaf}"
            transposed = theirs in family.TRANSPOSED and len(shape) == 2
            rows.append(Row(key, names, tuple(shapes[name] for name in names), transposed))
    return rows + head_rows(model)


def head_rows(model: Model) -> list[Row]:
    """Return the rows of the head; a tied projection has none."""
    rows = []
    for name, parameter in model.head.state_dict().items():
        if not (model.is_tied and name == "project.weight"):
            key = published(model.spec, name)
            rows.append(
                Row(strip(key, model) if model.kind == "Model" else key, (HEAD + name,), (parameter.shape,), False)
            )
    return rows


def published(spec: HeadSpec, name: str) -> str:
    """Return the published name of a head's parameter: "project.weight" -> "classifier.weight"."""
    module, _, leaf = name.rpartition(".")
    named = {ours: theirs for theirs, ours in spec.keys.items()}
    return named[name] if name in named else f"{named[module]}.{leaf}"


def strip(key: str, model: Model) -> str:
    """Take the body's prefix off a published name."""
    bare = key.removeprefix(find_family(model.config.model_type).PREFIX)
    return bare if model.spec.prefix is None else bare.removeprefix(model.spec.prefix)


def from_hf(file: State, model: Model, *, where: str = "", new_head: bool = False, parts: Sequence[Part] = ()) -> State:
    """Return our parameters, as views of the file's tensors; with every complaint in one FormatError.

    Keys may come with or without the family's prefix, norms under their old names. What belongs to another head of the
    family is left out. A tied projection may be in the file if it equals the embedding.
    """
    given: dict[str, str] = {}  # their key without prefix and in today's words -> as it stands in the file
    problems = []
    for key in file:
        bare = modernize(strip(key, model))
        if bare in given:
            problems.append(f"twice: {given[bare]} and {key}")
        given[bare] = key
    state: State = {}
    rows, of_head = make_rows(model), {row.key for row in head_rows(model)}
    absent = []
    for row in rows:
        found = given.pop(strip(row.key, model), None)
        if found is None:
            absent.append(row.key)
            if not ((new_head and row.key in of_head) or is_replaced(row.names[0], parts)):
                problems.append(f"missing: {row.key} {row.shape}")
        elif new_head and row.key in of_head and tuple(file[found].shape) != row.shape:
            absent.append(row.key)  # a head for other labels
        elif tuple(file[found].shape) != row.shape:
            problems.append(f"wrong shape: {found} is {tuple(file[found].shape)}, not {row.shape}")
        elif not file[found].is_floating_point():
            problems.append(f"not a float: {found} is {file[found].dtype}")
        else:
            state.update(row.split(file[found]))
    for ours, original in (
        ("project.weight", f"{BODY}embeddings.tokens.weight"),
        ("project.bias", f"{HEAD}project.bias"),
    ):
        twin = alias(model, ours)
        if twin in given and original in state and not torch.equal(file[given[twin]], state[original]):
            problems.append(f"{given[twin]} differs from its twin although they are one tensor (tie_word_embeddings)")
    problems += [f"unused: {key}" for bare, key in given.items() if not is_known(bare, model)]
    if absent and of_head.issuperset(absent) and len(problems) == len(absent):  # a body alone; its pooler may be there
        stated = read_kind(model.config)
        if stated != model.kind:
            raise wrong_head(model, where, stated)
    if problems:
        raise FormatError(
            "the weights do not fit config.json",
            where=where,
            found="\n    ".join(["", *merge_layers(problems)]),
            fix="check that config.json and the weights belong together",
        )
    return state


def alias(model: Model, name: str) -> str:
    """Return the other name under which a file may hold a parameter of the projection once more, or ""."""
    named = [theirs for theirs, ours in model.spec.keys.items() if ours == "project"]
    own = name in model.spec.keys.values()  # a name beside the module's
    shared = (name == "project.weight" and model.is_tied) or (name == "project.bias" and own)
    return f"{named[0]}.{name.rpartition('.')[2]}" if named and shared else ""


def is_known(bare: str, model: Model) -> bool:
    """Say whether a tensor that no row took may be left out: a constant, or part of another head."""
    family, module = find_family(model.config.model_type), bare.rpartition(".")[0]
    if to_template(bare)[0] in family.IGNORED or module in family.IGNORED:
        return True
    names = {strip(key, model) for spec in family.heads(model.config).values() for key in spec.keys}
    return module in names or bare in names


def modernize(key: str) -> str:
    """Return a norm's parameter under today's name: "LayerNorm.gamma" -> "LayerNorm.weight"."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.{LEGACY[leaf]}" if leaf in LEGACY and "norm" in module.lower() else key


def to_hf(state: State, rows: list[Row]) -> State:
    """Return the file's tensors: the exact inverse of `from_hf`."""
    return {row.key: row.join(state) for row in rows}
