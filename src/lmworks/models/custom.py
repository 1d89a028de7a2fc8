"""Layers of a user's own in a loaded model: put in by name, trained, saved beside a reference to their code.

    change(model, "layers.5", DenseReLU)                              its answer follows that block's
    change(model, "layers.*.attention", WindowAttention, how="replace")
    change(model, "layers.*.mlp.act", "relu", how="replace")          an activation by its name

A part is made as `DenseReLU(base, config, **settings)`: `base` is the module, or the function, that it follows or
replaces, and may be kept inside it. One that follows is called with what `base` returned; one that replaces is called
as `base` was. A folder holds the parts' weights and where they sit, but never their code: whoever reads it hands the
code over, and nothing that a folder names is imported.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lmworks.base.errors import FormatError, InputError, did_you_mean
from lmworks.base.files import sha256
from lmworks.models.blocks import Block
from lmworks.models.config import Config
from lmworks.models.families import PARTS
from lmworks.models.heads import Model
from lmworks.models.layers import ACTIVATIONS

How = Literal["after", "replace"]
Code = Callable[..., Any]
BODY, AFTER = "transformer.", "after"
OWN = "lmworks."  # begins the names of tensors that no published file has


class Part(NamedTuple):
    """One layer of a user's own, as a folder names it."""

    at: str  # "layers.5"
    how: str
    code: str  # "my_layers:DenseReLU", or an activation's name
    settings: dict[str, Any]
    sha256: str = ""  # of the code's file when it was put in; empty where there is none


class Then:
    """The hook that lets a module's answer go through the part that follows it; it survives a copy of the model."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Return what the part makes of the module's output."""
        return module.get_submodule(AFTER)(output)


class Activation(nn.Module):
    """An activation by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to each number: (…) -> (…)."""
        return ACTIVATIONS[self.name](x)


def change(model: Model, at: str, code: Code | str, *, how: How = "after", **settings: Any) -> Model:
    """Put a part at every place that `at` names, in place: a name such as "layers.5.mlp", or a pattern with `*`.

    `code` is a class or function that makes the part, or the name of an activation. Parts with random weights draw them
    from torch's generator: seed it first. Raises InputError for a place that the model lacks.
    """
    if how not in get_args(How):
        raise InputError(f"a part cannot be put in by {how!r}", expected=" or ".join(get_args(How)))
    made = model.parts
    for place in find_places(model, at):
        part = Part(place, how, refer(code), dict(settings), sha256_of(code))
        put(model, part, code)
        made = (*made, part)
    model.parts = made
    return model


def put(model: Model, part: Part, code: Code | str) -> None:
    """Make one part and put it where it belongs."""
    parent_name, _, leaf = part.at.rpartition(".")
    parent = model.transformer.get_submodule(parent_name)
    base = getattr(parent, leaf)
    if part.how == "after" and (not isinstance(base, nn.Module) or hasattr(base, AFTER)):
        raise InputError("nothing can follow this", where=part.at, found=type(base).__name__,
                         expected="a module that nothing of your own follows yet", fix='use how="replace"')  # fmt: skip
    try:
        new = Activation(code) if isinstance(code, str) else code(base, model.config, **part.settings)
    except Exception as error:  # it is the user's own code
        raise InputError("this layer could not be made", where=f"{part.code} at {part.at}",
                         found=f"{type(error).__name__}: {error}") from error  # fmt: skip
    if not isinstance(new, nn.Module):
        raise InputError("this makes no torch module", where=part.code, found=type(new).__name__)
    if part.how == "replace" and isinstance(base, Block) and not isinstance(new, Block):
        raise InputError("a whole block can only be replaced by a block", where=part.at, found=type(new).__name__,
                         expected="a subclass of lmworks.models.blocks.Block")  # fmt: skip
    like = next(model.parameters())
    new = new.to(like.device, like.dtype).train(model.training)
    if part.how == "replace":
        setattr(parent, leaf, new)
    else:
        base.add_module(AFTER, new)
        base.register_forward_hook(Then())


def find_places(model: Model, at: str) -> list[str]:
    """Return the modules and activations of the body that a name or pattern means."""
    names = [name for name, _ in model.transformer.named_modules() if name]
    names += [f"{name}.act" for name, module in model.transformer.named_modules() if callable(vars(module).get("act"))]
    bare = at.removeprefix(BODY)
    found = [name for name in names if name == bare or (fnmatchcase(name, bare) and name.count(".") == bare.count("."))]
    if not found:
        raise InputError(f"the model has no layer {at!r}", expected="one of its layers, such as layers.0.mlp",
                         fix=did_you_mean(bare, names).strip())  # fmt: skip
    return found


def refer(code: Code | str) -> str:
    """Return the name under which code is asked for again: "my_layers:DenseReLU"."""
    return code if isinstance(code, str) else f"{code.__module__}:{code.__qualname__}"


def sha256_of(code: Code | str) -> str:
    """Return the hash of the file that some code stands in, "" where there is none."""
    functions = [code, *(vars(code).values() if isinstance(code, type) else ())]
    names = [function.__code__.co_filename for function in functions if hasattr(function, "__code__")]
    return sha256(Path(names[0])) if names and Path(names[0]).is_file() else ""


def find_code(part: Part, given: Mapping[str, Code], where: str) -> Code | str:
    """Return the code of a part from what the reader handed over; raise InputError where it is not there."""
    if part.code in ACTIVATIONS:
        return part.code
    module, _, name = part.code.partition(":")
    same = [code for key, code in given.items() if key.partition(":")[2] == name]  # moved to another file since
    if part.code not in given and len(same) != 1:
        raise InputError(
            "this model has a layer of its maker's own, and its code was not given", where=where, found=part.code,
            expected=", ".join(given) or "the code of each such layer",
            fix=f"if you trust it: --code {module}.py:{name}, or code=[{name}] in Python",
        )  # fmt: skip
    return given.get(part.code) or same[0]


def read_code(named: Sequence[str | Code]) -> dict[str, Code]:
    """Return classes by the names that folders use: each one itself, or "path/my_layers.py:DenseReLU", which is run.

    Only what the caller names is imported. Raises InputError for a file or a name that is not there.
    """
    found: dict[str, Code] = {}
    for one in named:
        code = load_code(one) if isinstance(one, str) else one
        found[refer(code)] = code
    return found


def load_code(name: str) -> Code:
    """Run a Python file that the user names and return one thing of it: "path/my_layers.py:DenseReLU"."""
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not file or path.suffix != ".py" or not path.is_file():
        raise InputError("there is no such code", found=name, expected="FILE.py:Name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError("this code does not run", where=str(path), found=f"{type(error).__name__}: {error}") from error
    finally:
        del sys.modules[path.stem]
        if before is not None:
            sys.modules[path.stem] = before
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{path.name} has no {attribute}", where=str(path), expected=", ".join(names),
                         fix=did_you_mean(attribute, names).strip())  # fmt: skip
    return found  # type: ignore[no-any-return]


def own_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of the parts, under names that no published file has."""
    return {f"{OWN}{name}": tensor for name, tensor in model.state_dict().items() if is_own(model, name)}


def read_parts(c: Config) -> list[Part]:
    """Return the parts that a folder's config names; none for a published model."""
    try:
        return [Part(**part) for part in c.source.get(PARTS, {}).get("parts", [])]
    except (TypeError, AttributeError):
        raise FormatError("config.json names its maker's own layers as no version does that we know") from None


def is_replaced(name: str, parts: Sequence[Part]) -> bool:
    """Tell whether a parameter of the published network is not in the file because a part took its place."""
    return any(part.how == "replace" and name.startswith(f"{BODY}{part.at}.") for part in parts)


def restore(
    model: Model, parts: Sequence[Part], code: Sequence[str | Code], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Put the parts of a folder back, with their weights; `model` has the published ones already.

    A parameter that a part replaced, and which the file lacks, is zero until the part is made.
    """
    given = read_code(code)
    if not parts:
        raise InputError("this model has no layers of its maker's own", where=where, found=", ".join(given),
                         fix="leave --code out")  # fmt: skip
    like = next(parameter.dtype for parameter in model.parameters() if not parameter.is_meta)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(torch.zeros(parameter.shape, dtype=like)))
    with torch.random.fork_rng(devices=[]):
        for part in parts:
            found = find_code(part, given, where)
            if part.sha256 and sha256_of(found) != part.sha256:
                warnings.warn(f"{where}: the code of {part.code} has changed since it was trained", stacklevel=2)
            put(model, part, found)
    model.parts = tuple(parts)
    state = model.state_dict()
    wanted = {name.removeprefix(OWN): tensor for name, tensor in tensors.items()}
    wrong = [name for name, tensor in wanted.items() if name not in state or state[name].shape != tensor.shape]
    own = [name for name in state if is_own(model, name) and name not in wanted]
    if wrong or own:
        raise FormatError("the saved layers do not fit their code", where=where, found=", ".join([*wrong, *own][:8]),
                          fix="use the version of the code that they were trained with")  # fmt: skip
    with torch.no_grad():
        for name, tensor in wanted.items():
            state[name].copy_(tensor)


def is_own(model: Model, name: str) -> bool:
    """Tell whether a parameter or buffer belongs to a part."""
    bare = name.removeprefix(BODY)
    return any(bare.startswith(f"{part.at}.{AFTER}." if part.how == "after" else f"{part.at}.") for part in model.parts)
