"""Layers that hold their matrix in another form: whole numbers of 8 or 4 bits, or two thin factors.

    QuantizedLinear       W = (q - z) s           a scale s (and zero z) for the matrix, each output, or each group
    QuantizedEmbedding    rows of such a matrix
    TiedLinear            a projection by those rows
    LowRankLinear         W = L R                 L (O, R), R (R, I)

They wrap a Linear or an Embedding by name, so a network knows nothing of them. How the numbers are chosen is
compress/'s business; how they are stored is compact_files.py's.

Shapes: I inputs, O outputs, G groups of a row, V rows of an embedding, R rank.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.base.errors import InputError

Activations = Literal["none", "dynamic", "static"]
TENSOR, CHANNEL = "tensor", "channel"  # one scale for the matrix; one for each output
HIGHEST, HIGHEST_INPUT = 127, 255  # of inputs: either side of MIDDLE with a step for each token, or one step for all
MIDDLE = 128  # what stands for 0: without AMX, oneDNN multiplies signed inputs by a loop of thousands of times the time
TINY = torch.finfo(torch.float32).tiny
OFFSET = 8  # makes a number of four bits positive in its half of a byte


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The whole numbers that a matrix is rounded to: how many bits, and what shares a scale."""

    bits: int = 8
    per: str | int = CHANNEL  # "tensor", "channel", or how many numbers of a row share a scale
    symmetric: bool = True  # zero is 0; else each scale has a zero of its own
    activations: Activations = "none"  # what the layer reads: floats; or 8 bits, scaled afresh or by calibration

    def __post_init__(self) -> None:
        """Raise InputError for a grid that no layer can have."""
        grouped = isinstance(self.per, int) and not isinstance(self.per, bool)
        if self.bits not in (4, 8):
            raise InputError("no such number of bits", found=str(self.bits), expected="8 or 4")
        if not grouped and self.per not in (TENSOR, CHANNEL):
            raise InputError("no such scale", found=repr(self.per), expected="tensor, channel, or a group's size")
        if grouped and int(self.per) < 2:
            raise InputError("a group is too small", found=str(self.per), expected="2 or more, usually 32, 64 or 128")
        if self.activations != "none" and (grouped or not self.symmetric):
            raise InputError(
                "products of whole numbers need one symmetric scale an output",
                found="groups" if grouped else "an asymmetric scale",
                fix="leave the group and asymmetric out, or choose --activations none",
            )

    @property
    def lowest(self) -> int:
        """The least whole number: -127 or -7 where zero is 0, else -128 or -8."""
        return -(1 << self.bits - 1) + int(self.symmetric)

    @property
    def highest(self) -> int:
        """The greatest whole number: 127 or 7."""
        return (1 << self.bits - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        """Return what a config.json says of it."""
        return asdict(self)


def by_group(matrix: Tensor, per: str | int) -> Tensor:
    """Lay out what shares a scale: (O, I) -> (O, G, I / G), filled up with zeros; ("tensor": (1, 1, O * I))."""
    if per == TENSOR:
        return matrix.reshape(1, 1, -1)
    if per == CHANNEL:
        return matrix[:, None]
    size = int(per)
    return torch.unflatten(F.pad(matrix, (0, -matrix.shape[1] % size)), 1, (-1, size))


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None = None, *, per: str | int = CHANNEL) -> Tensor:
    """Return (q - z) s: q (O, I), scale and zero (O, G) or (1, 1) -> (O, I) in the dtype of the scale."""
    grouped = by_group(q, per).to(scale.dtype)
    real = (grouped if zero is None else grouped - zero[..., None]) * scale[..., None]
    return real.reshape(q.shape) if per == TENSOR else real.flatten(1)[:, : q.shape[1]]


def pack4(q: Tensor) -> Tensor:
    """Put two numbers from -8 to 7 in a byte: (O, I) -> (O, I / 2) uint8, the even column in the lower half."""
    positive = (F.pad(q, (0, q.shape[1] % 2)) + OFFSET).to(torch.uint8)
    return positive[:, ::2] | (positive[:, 1::2] << 4)


def unpack4(packed: Tensor, columns: int) -> Tensor:
    """Return the inverse of `pack4`: (O, ceil(I / 2)) uint8 -> (O, I) int8."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return (both.to(torch.int8) - OFFSET)[:, :columns]


class Quantized(nn.Module):
    """A matrix of whole numbers: `q` (O, I) int8, or two in a byte where they have four bits; `scale`, `zero` (O, G).

    Training and autograd multiply it out each time. In inference mode it is put once into the form that this processor
    multiplies fastest.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    keeps = True  # what inference mode prepared

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> None:
        super().__init__()
        self.grid, self.shape = grid, tuple(q.shape)
        self.register_buffer("q", pack4(q) if grid.bits == 4 else q)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.ready: Any = None

    @property
    def numbers(self) -> Tensor:
        """The whole numbers (O, I) int8."""
        return unpack4(self.q, self.shape[1]) if self.grid.bits == 4 else self.q

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I) that the numbers stand for, made afresh."""
        return dequantize(self.numbers, self.scale, self.zero, per=self.grid.per)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move to another device; what was prepared is made again there."""
        self.ready = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was prepared out of a copy: packed matrices cannot be copied."""
        return {**self.__dict__, "ready": None}


class QuantizedLinear(Quantized):
    """A Linear over such a matrix; its input too is rounded to 8 bits where the grid says so.

        dynamic   a = round(x / s) + 128, s = max |x| / 127 of each token        y = s_x s_w sum (a - 128) q + b
        static    a = round(x / s) + z, s and z from calibration                 y = s_x s_w sum (a - z) q + b

    `span` (2,) is the least and the greatest input of calibration. A token's own scale makes its answer the same in
    every batch.
    """

    span: Tensor | None

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, *, bias: Tensor | None = None,
        span: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(q, scale, zero, grid)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("span", span)
        self.out_features, self.in_features = q.shape

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (…, I) -> (…, O)."""
        if not (torch.is_inference_mode_enabled() and self.keeps):
            return self.reference(x)
        if self.ready is None:
            self.ready = self.prepare()
        if isinstance(self.ready, QuantizedLinear):  # no such products here
            return self.reference(x)
        if self.grid.activations == "none":
            return self.multiply(x, self.ready)
        a, step, zero = self.round(x)
        packed, scale, zeros = self.ready
        whole = self.span is not None  # one step for all: the product applies it, and the bias
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            a, float(step) if whole else 1.0, zero, packed, scale, zeros, self.bias if whole else None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if not whole:
            y.mul_(step)  # in place: fresh memory for a large result costs more than the product
            if self.bias is not None:
                y.add_(self.bias)
        return y.to(x.dtype)

    def multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Multiply floats by the matrix (O, I) and add the bias."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = F.linear(x, matrix.to(x.dtype), bias)
        return y

    def round(self, x: Tensor) -> tuple[Tensor, Tensor | float, int]:
        """Return the input in whole numbers (…, I), its step, (…, 1) or one for all, and its zero."""
        x = x.float()
        if self.span is None:
            step = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / HIGHEST  # (…, 1)
            return torch.div(x, step).round_().add_(MIDDLE).to(torch.uint8), step, MIDDLE
        width, zero = input_scale(*self.span.tolist())
        return torch.div(x, width).round_().add_(zero).clamp_(0, HIGHEST_INPUT).to(torch.uint8), width, zero

    def reference(self, x: Tensor) -> Tensor:
        """Do the same in plain arithmetic, which shows what the fast product computes."""
        if self.grid.activations == "none":
            return self.multiply(x, self.weight)
        a, step, zero = self.round(x)
        y: Tensor = F.linear((a.float() - zero) * step, self.weight, self.bias)
        return y.to(x.dtype)

    def prepare(self) -> Any:
        """Return the matrix as inference wants it: multiplied out, or packed for products of whole numbers.

        Where there are no such products it is the layer itself: the reference is run.
        """
        if self.grid.activations == "none":
            return self.weight
        if self.q.device.type != "cpu" or not multiplies_whole_numbers():
            return self
        rows = self.scale.expand(self.shape[0], 1).flatten().contiguous()  # (O,)
        packed = torch.ops.onednn.qlinear_prepack(self.numbers.contiguous(), None)
        return packed, rows, torch.zeros(len(rows), dtype=torch.int32)


@cache
def multiplies_whole_numbers() -> bool:
    """Return whether this torch and this processor multiply 8-bit numbers exactly: older ones let sums overflow."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    a, q = torch.full((1, 64), HIGHEST_INPUT, dtype=torch.uint8), torch.full((64, 64), HIGHEST, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    y = torch.ops.onednn.qlinear_pointwise(
        a, 1.0, MIDDLE, packed, torch.ones(64), torch.zeros(64, dtype=torch.int32), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return torch.equal(y, F.linear(a.float() - MIDDLE, q.float()))


def input_scale(low: float, high: float) -> tuple[float, int]:
    """Return the step and the zero that 8 bits need for inputs from `low` to `high`: (0, 2.55) -> (0.01, 0)."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / HIGHEST_INPUT or 1.0
    return step, min(max(round(-low / step), 0), HIGHEST_INPUT)


class QuantizedEmbedding(Quantized):
    """An Embedding over such a matrix (V, D): only the rows that are looked up are multiplied out."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: (…) -> (…, D)."""
        flat = ids.flatten()
        q = unpack4(self.q[flat], self.shape[1]) if self.grid.bits == 4 else self.q[flat]  # (n, D)
        scale = self.scale if self.grid.per == TENSOR else self.scale[flat]
        zero = self.zero if self.zero is None or self.grid.per == TENSOR else self.zero[flat]
        return torch.unflatten(dequantize(q, scale, zero, per=self.grid.per), 0, ids.shape)


class TiedLinear(QuantizedLinear):
    """A projection by the rows of such an embedding: the same numbers, stored once."""

    def __init__(self, table: QuantizedEmbedding, *, bias: Tensor | None = None) -> None:
        """Share the embedding's numbers; where they have one scale a row, inputs are rounded to 8 bits too."""
        whole = table.grid.per == CHANNEL and table.grid.symmetric
        grid = replace(table.grid, activations="dynamic" if whole else "none")
        super().__init__(table.numbers, table.scale, table.zero, grid, bias=bias)
        self.q = table.q


class LowRankLinear(nn.Module):
    """A Linear whose matrix is a product of two thin ones: y = L (R x) + b."""

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)  # (O, R), (R, I)
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.out_features, self.in_features = len(left), right.shape[1]

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I) that the factors stand for."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """Multiply twice and add the bias: (…, I) -> (…, O)."""
        return F.linear(F.linear(x, self.right), self.left, self.bias)


COMPACT = (Quantized, LowRankLinear)


def is_compact(model: nn.Module) -> bool:
    """Say whether some layer holds its matrix in another form."""
    return any(isinstance(module, COMPACT) for module in model.modules())
