"""How a graph multiplies by its weights: one class per dtype, and nothing else in the exporter knows about dtypes.

Shapes: B batch, T tokens, I features in, O features out, D hidden, V vocabulary.

    fp32    y = x W                                                    MatMul
    int8    y = (x8 - z) W8 * (s_x s_w)                                DynamicQuantizeLinear, MatMulInteger

int8 is dynamic: each activation gets its scale s_x and zero point z at run time, W8 is symmetric with a scale s_w per
output feature. This is the arithmetic that runs fast both natively and in WebAssembly.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.export.graph import Graph

Floats = NDArray[np.float32]

# 7 of the 8 bits. A processor without VNNI adds two products of an unsigned and a signed byte in 16 bits, which 8 bits
# would overflow: 255 * 127 * 2 > 32767 > 255 * 64 * 2. So the same file gives the same answer everywhere.
LARGEST = 63


class Arithmetic(Protocol):
    """The three places where a decoder meets a matrix."""

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        """Return x (B, T, I) times `weight` (I, O), a value called `out`."""
        ...

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str) -> str:
        """Return the rows `ids` (B, T) of `weight` (V, D); keep it for `tied`."""
        ...

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        """Make `out`, x (B, T, D) times the transposed embedding, without storing it again."""
        ...


class Fp32:
    """Weights as they are."""

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        stored = graph.weight(f"{name}.weight", weight)
        return graph.add("MatMul", [x, stored], name=name, outputs=[out or f"{name}.out"])

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str) -> str:
        self.embedding = graph.weight(f"{name}.weight", weight)
        return graph.add("Gather", [self.embedding, ids], name=name)

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        turned = graph.add("Transpose", [self.embedding], name=f"{name}.transpose", perm=[1, 0])
        graph.add("MatMul", [x, turned], name=name, outputs=[out])


class Int8:
    """Weights in 8 bits, activations quantized as they come, each once for all its readers."""

    def __init__(self) -> None:
        self.quantized: dict[str, list[str]] = {}

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        whole, scale = quantize(weight, axis=0)  # (I, O), (1, O)
        stored, scales = graph.weight(f"{name}.weight", whole), graph.weight(f"{name}.scale", scale[0])
        return self._multiply(graph, x, stored, scales, name=name, out=out or f"{name}.out")

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str) -> str:
        whole, scale = quantize(weight, axis=1)  # (V, D), (V, 1)
        self.embedding = graph.weight(f"{name}.weight", whole)
        self.scale = graph.weight(f"{name}.scale", scale)
        rows = graph.add("Gather", [self.embedding, ids], name=f"{name}.rows")  # (B, T, D)
        floats = graph.add("Cast", [rows], name=f"{name}.cast", to=graph.onnx.TensorProto.FLOAT)
        scales = graph.add("Gather", [self.scale, ids], name=f"{name}.scales")  # (B, T, 1)
        return graph.add("Mul", [floats, scales], name=name)

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        turned = graph.add("Transpose", [self.embedding], name=f"{name}.transpose", perm=[1, 0])  # (D, V)
        scale = graph.add("Reshape", [self.scale, graph.constant([-1])], name=f"{name}.scale")  # (V,)
        self._multiply(graph, x, turned, scale, name=name, out=out)

    def _multiply(self, graph: Graph, x: str, weight: str, scale: str, *, name: str, out: str) -> str:
        if x not in self.quantized:
            self.quantized[x] = [f"{x}.{part}" for part in ("int8", "scale", "zero")]
            graph.add("DynamicQuantizeLinear", [x], name=f"{x}.quantize", outputs=self.quantized[x])
        x_int8, x_scale, x_zero = self.quantized[x]
        whole = graph.add("MatMulInteger", [x_int8, weight, x_zero], name=f"{name}.product")
        floats = graph.add("Cast", [whole], name=f"{name}.cast", to=graph.onnx.TensorProto.FLOAT)
        scales = graph.add("Mul", [x_scale, scale], name=f"{name}.scales")
        return graph.add("Mul", [floats, scales], name=name, outputs=[out])


def quantize(weight: Floats, *, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """Return whole numbers and the scales along `axis`, so that weight is about whole * scale; zero stays zero."""
    scale = np.abs(weight).max(axis, keepdims=True) / LARGEST
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


ARITHMETIC: dict[str, type[Fp32] | type[Int8]] = {"fp32": Fp32, "int8": Int8}
