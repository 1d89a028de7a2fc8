"""How a graph multiplies by its weights: one class per dtype, and nothing else in the exporter knows about dtypes.

Shapes: B batch, T tokens, I features in, O features out, D hidden, V vocabulary, N blocks of a row.

    fp32    y = x W                               MatMul
    int8    y = (x8 - z) W8 * (s_x s_w)           DynamicQuantizeLinear, MatMulInteger; W8 symmetric, signed
    uint8   y = (x8 - z) (W8 - 128) * (s_x s_w)   the same with unsigned weights
    q4      y = x ((W4 - z_b) s_b)                MatMulNBits: 32 inputs of an output share a scale and a zero point
    bnb4    y = x (table[W4] a_b)                 MatMulBnb4: 64 weights in a row share their largest, a_b

In int8 and uint8 each activation gets its scale s_x and zero point z at run time, each output feature has its s_w: the
arithmetic that runs fast both natively and in WebAssembly. fp16 and q4f16 are fp32 and q4 computed in float16.
A `Precision`, found on real texts, says which matrices keep 8 bits and multiply floats, and rounds the blocks of q4 for
what they multiply (compress/rounding.py, compress/precision.py).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmworks.compress.rounding import (
    BLOCK,
    BNB_BLOCK,
    Floats,
    Precision,
    quantize_blocks,
    quantize_bytes,
    quantize_nf4,
)
from lmworks.export.graph import Graph, once

# 7 of the 8 bits. A processor without VNNI adds two products of an unsigned and a signed byte in 16 bits, which 8 bits
# would overflow: 255 * 127 * 2 > 32767 > 255 * 64 * 2. So the same file gives the same answer everywhere. Two unsigned
# bytes are multiplied in wider registers: uint8 uses all its bits.
LARGEST = 63
MIDDLE = 128  # the zero of uint8
ACCURACY = 4  # MatMulNBits quantizes the activations to 8 bits as well; without it 8-bit and 4-bit crawl


class Arithmetic(Protocol):
    """The three places where a model meets a matrix."""

    precision: Precision
    fused: bool  # whether an encoder's attention, and a bias with its activation, are one node

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        """Return x (…, I) times `weight` (I, O), a value called `out`."""
        ...

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str, tied: bool) -> str:
        """Return the rows `ids` (B, T) of `weight` (V, D); where it is `tied`, keep it for `tied`."""
        ...

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        """Make `out`, x (…, D) times the transposed embedding, without storing it again."""
        ...


class Fp32:
    """Weights as they are."""

    precision = Precision()
    fused = True

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        stored = graph.weight(f"{name}.weight", weight)
        return graph.add("MatMul", [x, stored], name=name, outputs=[out or f"{name}.out"])

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str, tied: bool) -> str:
        self.embedding = graph.weight(f"{name}.weight", weight)
        return graph.add("Gather", [self.embedding, ids], name=name)

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        turned = graph.add("Transpose", [self.embedding], name=f"{name}.transpose", perm=[1, 0])
        graph.add("MatMul", [x, turned], name=name, outputs=[out])


class Int8:
    """Weights in 8 bits, activations quantized as they come, each once for all its readers."""

    zero = ""  # of the weights; the name of a constant

    precision = Precision()
    fused = False  # only processors multiply so: parts are faster there, and a bias becomes a part of the product

    def __init__(self) -> None:
        self.quantized: dict[str, list[str]] = {}

    def whole(self, graph: Graph, weight: Floats, *, axis: int) -> tuple[NDArray[Any], Floats]:
        """Return the stored bytes and their scales along `axis`."""
        return quantize(weight, axis=axis)

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        if once(name) in self.precision.kept:
            return multiply_exactly(graph, x, weight, name=name, out=out or f"{name}.out")
        whole, scale = self.whole(graph, weight, axis=0)  # (I, O), (1, O)
        stored, scales = graph.weight(f"{name}.weight", whole), graph.weight(f"{name}.scale", scale[0])
        return self._multiply(graph, x, stored, scales, name=name, out=out or f"{name}.out")

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str, tied: bool) -> str:
        whole, scale = self.whole(graph, weight, axis=1)  # (V, D), (V, 1)
        self.embedding = graph.weight(f"{name}.weight", whole)
        self.scale = graph.weight(f"{name}.scale", scale)
        rows = graph.add("Gather", [self.embedding, ids], name=f"{name}.rows")  # (B, T, D)
        floats = graph.cast(rows, np.float32, name=f"{name}.cast")
        if self.zero:
            floats = graph.add("Sub", [floats, graph.number(MIDDLE)], name=f"{name}.signed")
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
        zeros = [x_zero, self.zero] if self.zero else [x_zero]
        whole = graph.add("MatMulInteger", [x_int8, weight, *zeros], name=f"{name}.product")
        floats = graph.cast(whole, np.float32, name=f"{name}.cast")
        scales = graph.add("Mul", [x_scale, scale], name=f"{name}.scales")
        return graph.add("Mul", [floats, scales], name=name, outputs=[out])


class Uint8(Int8):
    """The same with unsigned bytes around 128, and all eight bits."""

    def whole(self, graph: Graph, weight: Floats, *, axis: int) -> tuple[NDArray[Any], Floats]:
        """Return the stored bytes and their scales along `axis`."""
        self.zero = graph.constant(MIDDLE, np.uint8)
        whole, scale = quantize(weight, axis=axis, largest=MIDDLE - 1)
        return (whole.astype(np.int16) + MIDDLE).astype(np.uint8), scale


class Q4(Int8):
    """Weights in 4 bits, 32 to a scale and a zero point; an embedding that stands alone in 8 bits."""

    fused = True

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        if once(name) in self.precision.kept:
            return multiply_exactly(graph, x, weight, name=name, out=out or f"{name}.out")
        stored = self._store(graph, weight.T, name=name)
        return self._blocks(graph, x, stored, weight.T.shape, name=name, out=out or f"{name}.out")

    def embed(self, graph: Graph, ids: str, weight: Floats, *, name: str, tied: bool) -> str:
        if not tied:
            return super().embed(graph, ids, weight, name=name, tied=False)
        self.stored, self.shape = self._store(graph, weight, name=name), weight.shape
        blocks, width = -(-self.shape[1] // BLOCK), self.shape[1]
        bits, scales, zeros = (
            graph.add("Gather", [part, ids], name=f"{name}.{kind}")
            for part, kind in zip(self.stored, ("rows", "scales", "zeros"), strict=True)
        )  # (B, T, N, 16), (B, T, N), (B, T, N / 2)
        whole = self._unpack(graph, bits, [0, 0, blocks, BLOCK], name=f"{name}.rows")
        zero = self._unpack(graph, zeros, [0, 0, -1], name=f"{name}.zeros")
        if blocks % 2:
            zero = self._cut(graph, zero, blocks, name=f"{name}.zeros.cut")
        last = graph.constant([-1])
        zero, scales = (
            graph.add("Unsqueeze", [part, last], name=f"{name}.{kind}.each")
            for part, kind in ((zero, "zeros"), (scales, "scales"))
        )
        whole = graph.add("Sub", [whole, zero], name=f"{name}.signed")
        rows = graph.add("Mul", [whole, scales], name=f"{name}.floats")  # (B, T, N, 32)
        rows = graph.add("Reshape", [rows, graph.constant([0, 0, -1])], name=name)
        return rows if width % BLOCK == 0 else self._cut(graph, rows, width, name=f"{name}.cut")

    def tied(self, graph: Graph, x: str, *, name: str, out: str) -> None:
        self._blocks(graph, x, self.stored, self.shape, name=name, out=out)

    def _store(self, graph: Graph, weight: Floats, *, name: str) -> list[str]:
        parts: tuple[NDArray[Any], ...] = quantize_blocks(weight, self.precision.moments.get(once(name)))
        names = ("weight", "scale", "zero_point")
        return [graph.weight(f"{name}.{kind}", part) for kind, part in zip(names, parts, strict=True)]

    def _blocks(self, graph: Graph, x: str, stored: list[str], shape: Any, *, name: str, out: str) -> str:
        return graph.add(
            "com.microsoft.MatMulNBits", [x, *stored], name=name, outputs=[out], N=shape[0], K=shape[1], bits=4,
            block_size=BLOCK, accuracy_level=ACCURACY,
        )  # fmt: skip

    def _unpack(self, graph: Graph, packed: str, shape: list[int], *, name: str) -> str:
        """Return the two numbers of each byte side by side, as floats of this shape."""
        low = graph.add("BitwiseAnd", [packed, graph.constant(15, np.uint8)], name=f"{name}.low")
        high = graph.add("BitShift", [packed, graph.constant(4, np.uint8)], name=f"{name}.high", direction="RIGHT")
        last = graph.constant([-1])
        pair = [graph.add("Unsqueeze", [half, last], name=f"{half}.pair") for half in (low, high)]
        both = graph.add("Concat", pair, name=f"{name}.both", axis=-1)
        flat = graph.add("Reshape", [both, graph.constant(shape)], name=f"{name}.flat")
        return graph.cast(flat, np.float32, name=f"{name}.cast")

    def _cut(self, graph: Graph, x: str, end: int, *, name: str) -> str:
        inputs = [x, graph.constant([0]), graph.constant([end]), graph.constant([-1])]
        return graph.add("Slice", inputs, name=name)


class Bnb4(Int8):
    """Linears in NF4; the embedding in 8 bits."""

    fused = True

    def linear(self, graph: Graph, x: str, weight: Floats, *, name: str, out: str = "") -> str:
        packed, largest = quantize_nf4(weight.T)
        stored, scales = graph.weight(f"{name}.weight", packed), graph.weight(f"{name}.absmax", largest)
        return graph.add(
            "com.microsoft.MatMulBnb4", [x, stored, scales], name=name, outputs=[out or f"{name}.out"],
            K=weight.shape[0], N=weight.shape[1], block_size=BNB_BLOCK, quant_type=1,
        )  # fmt: skip


def multiply_exactly(graph: Graph, x: str, weight: Floats, *, name: str, out: str) -> str:
    """Return x (…, I) times `weight` (I, O) in 8 bits on disk; a runtime makes floats of it once, when it is opened."""
    whole, scale = quantize(weight, axis=0, largest=MIDDLE - 1)  # (I, O), (1, O)
    stored, scales = graph.weight(f"{name}.weight", whole), graph.weight(f"{name}.scale", scale[0])
    floats = graph.cast(stored, np.float32, name=f"{name}.cast")
    floats = graph.add("Mul", [floats, scales], name=f"{name}.floats")
    return graph.add("MatMul", [x, floats], name=name, outputs=[out])


def quantize(weight: Floats, *, axis: int, largest: int = LARGEST) -> tuple[NDArray[np.int8], Floats]:
    """Return whole numbers and the scales along `axis`, so that weight is about whole * scale; zero stays zero."""
    return quantize_bytes(weight, axis=axis, largest=largest)


# dtype -> how it multiplies, and whether everything else is float16
ARITHMETIC: dict[str, tuple[type[Fp32] | type[Int8], bool]] = {
    "fp32": (Fp32, False),
    "fp16": (Fp32, True),
    "int8": (Int8, False),
    "uint8": (Uint8, False),
    "q4": (Q4, False),
    "q4f16": (Q4, True),
    "bnb4": (Bnb4, False),
}
