"""A layer of a user's own in a graph: torch.export reads what it computes, torch writes that as nodes.

The rest of the model keeps its own nodes, so that a decoder keeps its cache and an encoder its fused attention. Weights
of such a layer stay in float32, in float16 graphs in float16; rounding to 8 or 4 bits leaves them alone.

Shapes: B batch, T tokens, D hidden_size.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.export.graph import OPSETS, Graph
from lmworks.export.walk import Stream, Walk
from lmworks.models.attention import Attention, Context
from lmworks.models.custom import AFTER, BODY
from lmworks.models.heads import Model

ROWS, TOKENS = 2, 6  # of the sample that a layer is traced with; both stay free in the graph


class Looking(nn.Module):
    """Attention of a user's own as a function of the tokens and of which of them are real."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *seen: Tensor) -> Tensor:
        """Mix the tokens (B, T, D) that `seen` (B, T), where it is given, does not hide: (B, T, D)."""
        y: Tensor = self.attention(x, Context(mask=seen[0][:, None, None, :] != 0 if seen else None))
        return y


class Own:
    """The layers of a user's own in a model, each with what it reads when the model answers once."""

    def __init__(self, model: Model) -> None:
        self.samples: dict[int, Tensor] = {}
        self.traced: dict[int, Any] = {}
        hooks = []
        for part in model.parts:
            module = model.get_submodule(f"{BODY}{part.at}{f'.{AFTER}' if part.how == 'after' else ''}")
            hooks.append(module.register_forward_pre_hook(self._keep))
        vision = model.config.vision
        shape = (ROWS, TOKENS) if vision is None else (ROWS, vision.num_channels, vision.image_size, vision.image_size)
        try:
            with torch.no_grad():
                model(torch.zeros(shape, dtype=torch.int64 if vision is None else torch.float32))
        except Exception as error:  # it is the user's own code
            found = ", ".join(sorted({part.code for part in model.parts}))
            raise InputError("the model does not run with layers of a user's own", where=found,
                             found=in_short(error)) from error  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.samples[id(module)] = inputs[0].detach().clone()

    def follow(self, walk: Walk, module: nn.Module, path: str, found: Any, inputs: Sequence[Any]) -> Any:
        """Let what a module's emitter returned go through the part that follows the module, if one does."""
        part = getattr(module, AFTER, None)
        if part is None:
            return found
        path = f"{path}.{AFTER}"
        if isinstance(found, Stream):
            return Stream(self.trace(walk, part, path, walk.settle(found, path)))
        if found is None:  # a block: its answer is the stream that it was given
            stream = inputs[0]
            stream.value = self.trace(walk, part, path, walk.settle(stream, path))
            return None
        if isinstance(found, tuple):
            value, bias = found
            value = walk.graph.add("Add", [value, bias], name=f"{path}.bias") if bias else value
            return self.trace(walk, part, path, value), ""
        return self.trace(walk, part, path, found)

    def replace(self, walk: Walk, module: nn.Module, path: str, inputs: Sequence[Any]) -> Any:
        """Emit a part that took the place of a norm, an MLP, or an encoder's attention."""
        role = path.rpartition(".")[2]
        if role.endswith("norm"):
            return self.trace(walk, module, path, walk.settle(inputs[0], path))
        if role == "mlp":
            return self.trace(walk, module, path, inputs[0]), ""
        if walk.attends:
            raise refuse(path, "--attentions: where it looks is not known")
        rotary = walk.config.causal or walk.config.positions == "rope"
        if role != "attention" or rotary or not isinstance(module, Attention):
            raise refuse(path, type(module).__name__)
        seen = [walk.shared["mask"]] if "mask" in walk.shared else []
        return self.trace(walk, module, path, inputs[0], *seen), ""

    def trace(self, walk: Walk, module: nn.Module, path: str, x: str, *seen: str) -> str:
        """Add the nodes of a module that reads these values; return its answer."""
        if id(module) not in self.traced:
            self.traced[id(module)] = export(module, self.samples[id(module)], path, masked=bool(seen))
        walk.skip(module)
        walk.unplaced.discard(id(module))
        return inline(walk.graph, self.traced[id(module)], path, [x, *seen])


def export(module: nn.Module, sample: Tensor, path: str, *, masked: bool) -> Any:
    """Return the ONNX graph of a module that reads such a tensor, and with `masked` which tokens are real."""
    require("onnxscript", extra="export")
    given: tuple[Tensor, ...] = (sample, torch.ones(sample.shape[:2], dtype=torch.int64)) if masked else (sample,)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    traced = Looking(module) if isinstance(module, Attention) else module
    try:
        with silence():
            program = torch.onnx.export(
                traced.eval(), given, dynamo=True, opset_version=OPSETS[""], verbose=False, optimize=True,
                dynamic_shapes=(free, (free,)) if masked else (free,),
            )  # fmt: skip
            return program.model_proto.graph  # type: ignore[union-attr]
    except Exception as error:  # whatever torch says of a user's own code
        raise refuse(path, in_short(error)) from error


def inline(graph: Graph, made: Any, path: str, inputs: Sequence[str]) -> str:
    """Copy the nodes and weights of one graph into that of the model, under names of its own; return the answer."""
    numpy_of = graph.onnx.numpy_helper.to_array
    names = {"": ""} | {item.name: value for item, value in zip(made.input, inputs, strict=True)}
    for weight in made.initializer:
        names[weight.name] = graph.weight(f"{path}.own.{weight.name}", numpy_of(weight))
    for number, node in enumerate(made.node):
        if node.domain not in OPSETS or any(a.HasField("g") or len(a.graphs) for a in node.attribute):
            raise refuse(path, f"the operator {node.op_type}")
        names |= {name: f"{path}.own.{name}" for name in node.output if name}
        copied = type(node)()
        copied.CopyFrom(node)
        copied.name = f"{path}.own.{number}"
        copied.input[:] = [names[name] for name in node.input]
        copied.output[:] = [names[name] for name in node.output]
        graph.nodes.append(copied)
    answer: str = names[made.output[0].name]
    return answer


def in_short(error: Exception) -> str:
    """Return the kind and the first line of what went wrong first."""
    first = error.__cause__ or error
    return f"{type(first).__name__}: {(str(first).strip().splitlines() or [''])[0][:300]}"


def refuse(path: str, found: str) -> InputError:
    """Return the error for a layer that cannot become nodes."""
    return InputError(
        "this layer of a user's own cannot become part of a graph", where=path, found=found,
        expected="tensor operations that do not depend on values, in what follows a layer or replaces an activation, a "
        "norm, an MLP, or the attention of an encoder without rotary positions", fix="run the model in torch",
    )  # fmt: skip


@contextmanager
def silence() -> Iterator[None]:
    """Keep the exporter's progress and advice off the terminal."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
