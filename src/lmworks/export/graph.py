"""An ONNX graph written by hand: nodes, weights and constants, and the same bytes for the same model every time.

Values are known by their names, a node's output by the node's. What nobody reads is dropped at the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.optional import require

OPSETS = {"": 18, "com.microsoft": 1}
IR_VERSION = 10  # what ONNX Runtime 1.22 and the browser's runtime both read
MAX_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GB; leave room for the nodes
SMALL = 1024  # bytes: constants of up to so many stay in the graph, where shapes are inferred from them
ALIGN = 4096  # of what lies in a file of its own, so that it can be mapped
HALF_RANGE = 3e4  # two masks may add up without leaving float16
CACHES = ("past_key_values.", "present.")  # inputs and outputs that are float16 in a float16 graph

AGAIN = re.compile(r"\.again\d+")  # in the names of a layer that runs once more

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
        """Store an array under `name`, which must be new, unless it is that of a layer that runs again."""
        own = once(name)
        assert own not in self.weights or own != name, name
        if own not in self.weights:
            self.weights[own] = np.ascontiguousarray(array)
        return own

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

    def number(self, value: float) -> str:
        """Store a float of no dimensions."""
        return self.constant(value, np.float32)

    def cast(self, x: str, dtype: type[np.generic], *, name: str) -> str:
        """Append a Cast."""
        return self.add("Cast", [x], name=name, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def halve(self) -> None:
        """Compute in float16: weights, constants and caches; every other input and output stays float32.

        Raises InputError for a weight that float16 cannot hold.
        """
        types = self.onnx.TensorProto
        for name, array in self.weights.items():
            if array.dtype == np.float32:
                self.weights[name] = to_half(array, name)
        for node in self.nodes:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == types.FLOAT:
                    attribute.i = types.FLOAT16
        for item in self.inputs:
            self._halve_end(item, is_input=True)
        for item in self.outputs:
            self._halve_end(item, is_input=False)

    def to_bytes(self) -> bytes:
        """Return the serialized model, checked: no duplicate names, every input made before it is read."""
        return next(iter(self.to_files("model.onnx", external=False).values()))

    def to_files(self, name: str, *, external: bool | None = None, most: int | None = None) -> dict[str, bytes]:
        """Return the files of the model by their names: `name`, and its weights in `name`_data, `name`_data_1 … .

        `external` puts the weights there; None: where they are more than `most` bytes, by default as many
        as one file can hold.
        """
        self._drop_unread()
        size = sum(array.nbytes for array in self.weights.values())
        if external is False and size > MAX_BYTES:
            raise InputError(
                "the model is too large for a single ONNX file", found=f"{size / 1e9:.1f} GB of weights",
                expected="less than 2 GB", fix="put its weights beside it, or export a smaller dtype",
            )  # fmt: skip
        apart = external if external is not None else size > (MAX_BYTES if most is None else most)
        data, weights = Data(name), []
        for key, array in self.weights.items():
            if apart and array.nbytes > SMALL:
                weights.append(self._refer(key, array, data.put(array)))
            else:
                weights.append(self.onnx.numpy_helper.from_array(array, key))
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "lmworks", self.inputs, self.outputs, weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lmworks")
        if not apart:
            self.onnx.checker.check_model(model)  # it would look for the other files
        return {name: model.SerializeToString(deterministic=True), **data.files()}

    def _refer(self, key: str, array: NDArray[Any], place: dict[str, str]) -> Any:
        """Return a tensor that says where its numbers are."""
        tensor = self.onnx.TensorProto(name=key, dims=array.shape, data_location=self.onnx.TensorProto.EXTERNAL)
        tensor.data_type = self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        for what, value in place.items():
            tensor.external_data.add(key=what, value=value)
        return tensor

    def _halve_end(self, item: Any, *, is_input: bool) -> None:
        """Let a float input or output be float16 inside: a cache to the outside as well, others through a Cast."""
        types, kind = self.onnx.TensorProto, item.type.tensor_type
        if kind.elem_type != types.FLOAT:
            return
        if item.name.startswith(CACHES):
            kind.elem_type = types.FLOAT16
            return
        inner = f"{item.name}.half"
        for node in self.nodes:
            ends = node.input if is_input else node.output
            for i, found in enumerate(ends):
                if found == item.name:
                    ends[i] = inner
        source, target = (item.name, inner) if is_input else (inner, item.name)
        cast = self.onnx.helper.make_node(
            "Cast", [source], [target], name=f"{item.name}.cast", to=types.FLOAT16 if is_input else types.FLOAT
        )
        self.nodes.insert(0 if is_input else len(self.nodes), cast)

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
                while not names[-1] and node.op_type != "GroupQueryAttention":  # which wants room for its cache
                    names.pop()
                del node.output[:]
                node.output.extend(names)
            read.update(node.input)
            kept.append(node)
        self.nodes = kept[::-1]
        self.weights = {name: array for name, array in self.weights.items() if name in read}


class Data:
    """The weights beside a graph, in one file or several: none reaches 2 GB, which not every browser can hold."""

    def __init__(self, name: str) -> None:
        self.name, self.parts, self.sizes = name, [[]], [0]  # type: str, list[list[bytes]], list[int]

    def put(self, array: NDArray[Any]) -> dict[str, str]:
        """Keep an array; return where it will be."""
        if self.sizes[-1] and self.sizes[-1] + array.nbytes > MAX_BYTES:
            self.parts.append([])
            self.sizes.append(0)
        offset, room = self.sizes[-1], -array.nbytes % ALIGN
        self.parts[-1] += [array.tobytes(), bytes(room)]
        self.sizes[-1] += array.nbytes + room
        return {"location": self._name(len(self.parts) - 1), "offset": str(offset), "length": str(array.nbytes)}

    def files(self) -> dict[str, bytes]:
        """Return the files by their names; none where nothing was kept."""
        return {self._name(i): b"".join(part) for i, part in enumerate(self.parts) if part}

    def _name(self, i: int) -> str:
        return f"{self.name}_data" + (f"_{i}" if i else "")


def once(name: str) -> str:
    """Return the name of a layer's first run: "layers.0.again3.mlp" -> "layers.0.mlp"."""
    return AGAIN.sub("", name)


def to_half(array: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Return float16 numbers; a constant such as -1e9 becomes the least that is safe, a weight must fit."""
    if array.size == 1:
        array = array.clip(-HALF_RANGE, HALF_RANGE)
    if array.size and np.abs(array).max() > np.finfo(np.float16).max:
        raise InputError("a weight does not fit float16", where=name, found=f"{np.abs(array).max():.3g}",
                         expected="at most 65504", fix="export fp32 or int8 instead")  # fmt: skip
    return array.astype(np.float16)
