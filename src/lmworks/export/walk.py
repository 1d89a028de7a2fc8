"""One pass over a model while its graph is made: what the emitters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lmworks.base.errors import InputError
from lmworks.export.arithmetic import Arithmetic, Fp32
from lmworks.export.graph import Graph
from lmworks.models.compact import LowRankLinear, Quantized
from lmworks.models.config import Config
from lmworks.models.custom import AFTER, BODY, Activation
from lmworks.models.heads import Model
from lmworks.models.layers import ACTIVATIONS

if TYPE_CHECKING:
    from lmworks.export.traced import Own

Emitters = Mapping[type[nn.Module], Callable[..., Any]]

# activation -> operator, its attributes, the operator that takes a bias as well
NODES: dict[Callable[..., Any], tuple[str, dict[str, Any], str]] = {
    ACTIVATIONS["gelu"]: ("com.microsoft.Gelu", {}, "com.microsoft.BiasGelu"),
    ACTIVATIONS["gelu_new"]: ("com.microsoft.FastGelu", {}, "com.microsoft.FastGelu"),
    ACTIVATIONS["silu"]: ("com.microsoft.QuickGelu", {"alpha": 1.0}, ""),  # x sigmoid(alpha x)
    ACTIVATIONS["relu"]: ("Relu", {}, ""),
    ACTIVATIONS["tanh"]: ("Tanh", {}, ""),
}


@dataclass
class Stream:
    """The residual stream: a value, and what is still to be added to it."""

    value: str
    delta: str = ""
    bias: str = ""


class Walk:
    """The graph so far, the arithmetic, and the values that all layers share."""

    def __init__(self, model: Model, arithmetic: Arithmetic, emitters: Emitters, own: Own | None = None) -> None:
        self.model, self.graph, self.arithmetic, self.emitters = model, Graph(), arithmetic, emitters
        self.own = own  # layers that no emitter knows
        self.unplaced = set() if own is None else set(own.samples)  # of them those that the graph does not hold yet
        self.exact = Fp32()  # for the small matrices, which cost nothing and decide much
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.shared: dict[str, str] = {}  # what every attention reads: masks, lengths, cos, sin
        self.attends = False  # whether the graph also gives out where every layer looks
        self.sums_in_norms = False  # whether LayerNorm adds to the residual stream what it is still owed, in one node

    @property
    def config(self) -> Config:
        """The model's."""
        return self.model.config

    @property
    def writes(self) -> bool:
        """Whether the graph has a cache, to write text with."""
        return self.model.kind == "CausalLM" and self.config.causal

    @property
    def tied(self) -> bool:
        """Whether the head projects by the embedding's own matrix."""
        project, tokens = self.model.head.project, getattr(self.model.transformer.embeddings, "tokens", None)
        return self.model.kind != "Model" and project is not None and project.weight is getattr(tokens, "weight", None)

    def emit(self, module: nn.Module, path: str, *inputs: Any) -> Any:
        """Emit one module with the emitter of exactly its class, and what follows it; or trace it."""
        emitter = self.emitters.get(type(module))
        if emitter is None:
            if self.own is None or id(module) not in self.own.samples:
                raise self.unknown(module, path)
            return self.own.replace(self, module, path, inputs)
        found = emitter(self, module, path, *inputs)
        return found if self.own is None else self.own.follow(self, module, path, found, inputs)

    def unknown(self, module: nn.Module, path: str) -> InputError:
        """Return the error for a module that has no emitter."""
        if isinstance(module, Quantized):
            return InputError(
                "a graph rounds the weights itself: it is made of the model in floats", where=path,
                found="whole numbers, of lmworks quantize",
                fix="export the model that this one was made of, with --dtype int8 or q4",
            )  # fmt: skip
        return InputError(
            f"the ONNX exporter does not know the module {type(module).__name__}",
            where=path,
            expected="one of " + ", ".join(["Linear", *sorted(kind.__name__ for kind in self.emitters)]),
            fix="merge or remove the changed layer before exporting",
        )

    def read(self, parameter: torch.Tensor) -> NDArray[np.float32]:
        """Return a parameter's numbers and note that it was used."""
        self.parameters.pop(id(parameter), None)
        return parameter.detach().to("cpu", torch.float32).numpy()

    def skip(self, module: nn.Module) -> None:
        """Note that a module's parameters have no part in the answer."""
        for parameter in module.parameters():
            self.parameters.pop(id(parameter), None)

    def store(self, name: str, parameter: torch.Tensor | None) -> str:
        """Store a parameter as it is; None is an input left out."""
        return "" if parameter is None else self.graph.weight(name, self.read(parameter))

    def linear(self, module: nn.Module, path: str, x: str, *, out: str = "", exact: bool = False) -> str:
        """Multiply by a Linear's weight; its bias is the caller's. `exact` keeps the weight as it is in every dtype."""
        arithmetic = self.exact if exact else self.arithmetic
        if type(module) is LowRankLinear:  # two thin products in place of one
            x = arithmetic.linear(self.graph, x, self.read(module.right).T, name=f"{path}.right")
            return arithmetic.linear(self.graph, x, self.read(module.left).T, name=f"{path}.left", out=out)
        return arithmetic.linear(self.graph, x, self.matrix(module, path).T, name=path, out=out)

    def affine(self, module: nn.Linear, path: str, x: str, *, exact: bool = False) -> str:
        """Multiply by a Linear's weight and add its bias."""
        return self.plus(self.linear(module, path, x, exact=exact), path, module.bias)

    def plus(self, x: str, path: str, bias: torch.Tensor | None) -> str:
        """Add a bias where there is one."""
        return x if bias is None else self.graph.add("Add", [x, self.store(f"{path}.bias", bias)], name=f"{path}.add")

    def matrix(self, module: nn.Module, path: str) -> NDArray[np.float32]:
        """Return the weight of a plain Linear (O, I) or Embedding (V, D); one that is wrapped is an error."""
        if not (type(module) is nn.Linear or type(module) is nn.Embedding) or hasattr(module, AFTER):
            raise self.unknown(module, path)
        return self.read(module.weight)

    def settle(self, stream: Stream, path: str) -> str:
        """Add what the stream still owes, and return its value."""
        for part in ("delta", "bias"):
            owed = getattr(stream, part)
            if owed:
                stream.value = self.graph.add("Add", [stream.value, owed], name=f"{path}.{part}")
        stream.delta = stream.bias = ""
        return stream.value

    def activate(self, function: Callable[..., Any], path: str, x: str, bias: str) -> str:
        """Return function(x + bias) as one node, or as two where no node takes a bias, or the product does."""
        if isinstance(function, Activation):
            self.unplaced.discard(id(function))
            function = ACTIVATIONS[function.name]
        if isinstance(function, nn.Module) and self.own is not None:
            x = self.graph.add("Add", [x, bias], name=f"{path}.bias") if bias else x
            return self.own.trace(self, function, f"{path}.act", x)
        if function not in NODES:
            name = getattr(function, "__name__", type(function).__name__)
            raise InputError(f"the ONNX exporter does not know the activation {name}", where=path)
        operator, attributes, biased = NODES[function]
        if bias and not (biased and self.arithmetic.fused):
            x, bias = self.graph.add("Add", [x, bias], name=f"{path}.bias"), ""
        inputs = [x, bias] if bias else [x]
        return self.graph.add(biased if bias else operator, inputs, name=f"{path}.act", **attributes)

    def done(self) -> Graph:
        """Return the graph; a parameter that nothing has read is an error, and so is a user's layer that it lacks."""
        for name, module in self.model.named_modules():
            if id(module) in self.unplaced:
                raise self.unknown(module, name.removeprefix(BODY))
        if self.parameters:
            raise InputError(
                "the ONNX exporter does not know these weights", found=", ".join(sorted(self.parameters.values()))
            )
        return self.graph
