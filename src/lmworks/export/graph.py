"""An ONNX graph written by hand: nodes, weights and constants, and the same bytes for the same model every time.

Values are known by their names, a node's output by the node's. What nobody reads is dropped at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.optional import require

OPSETS = {"": 18, "com.microsoft": 1}
IR_VERSION = 10  # what ONNX Runtime 1.22 and the browser's runtime both read
MAX_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GB; leave room for the nodes

Shape = Sequence[int | str]


class Graph:
    """Nodes in the order of execution, initializers by name, inputs and outputs."""

    def __init__(self) -> None:
        self.onnx = require("onnx", extra="export")
        self.nodes: list[Any] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def input(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare an input; a string in `shape` is a free dimension."""
        self.inputs.append(self._declare(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Shape) -> str:
        """Declare an output: a value of this name must be made by a node."""
        self.outputs.append(self._declare(name, dtype, shape))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Store an array under `name`, which must be new."""
        assert name not in self.weights, name
        self.weights[name] = np.ascontiguousarray(array)
        return name

    def constant(self, value: float | list[int], dtype: type[np.generic] = np.int64) -> str:
        """Store a small constant; equal constants are stored once."""
        array = np.array(value, dtype)
        name = f"constant.{array.dtype}.{'_'.join(map(str, array.ravel()))}.{array.ndim}"
        self.weights.setdefault(name, array)
        return name

    def add(
        self, operator: str, inputs: Sequence[str], *, name: str, outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Append a node, e.g. `add("MatMul", [x, w], name="qkv")`, and return its first output.

        An empty input is one that is left out. `outputs` names them where there are several. A dot in the operator sets
        the domain off: "com.microsoft.FastGelu".
        """
        domain, _, kind = operator.rpartition(".")
        made = list(outputs) or [f"{name}.out"]
        node = self.onnx.helper.make_node(kind, list(inputs), made, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return made[0]

    def to_bytes(self) -> bytes:
        """Return the serialized model, checked: no duplicate names, every input made before it is read."""
        self._drop_unread()
        size = sum(array.nbytes for array in self.weights.values())
        if size > MAX_BYTES:
            raise InputError(
                "the model is too large for a single ONNX file",
                found=f"{size / 1e9:.1f} GB of weights",
                expected="less than 2 GB",
                fix="export a smaller dtype (int8), or a smaller model",
            )
        helper = self.onnx.helper
        weights = [self.onnx.numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "lmworks", self.inputs, self.outputs, weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lmworks")
        self.onnx.checker.check_model(model)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _declare(self, name: str, dtype: type[np.generic], shape: Shape) -> Any:
        helper = self.onnx.helper
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))

    def _drop_unread(self) -> None:
        """Remove nodes, outputs of fused nodes and weights that nothing reads."""
        read = {item.name for item in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if not read.intersection(node.output):
                continue
            if node.domain:  # fused operators have outputs that may be left out
                names = [name if name in read else "" for name in node.output]
                while not names[-1]:
                    names.pop()
                del node.output[:]
                node.output.extend(names)
            read.update(node.input)
            kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: array for name, array in self.weights.items() if name in read}
