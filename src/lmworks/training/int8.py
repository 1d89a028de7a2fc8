"""Frozen matrices in eight bits: a base that takes a quarter of the memory while small adapters on it are trained.

    q = round(W / s), s = max |W| / 127 of each output's row          W is about s q

The matrix is multiplied out when it is used and thrown away again, in the backward pass too: one at a time is ever held
in full. A layer takes O I bytes + 4 O for the scales, where float32 takes 4 O I. The numbers are those of
compress/quantize.py.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.compress.quantize import quantize_matrix
from lmworks.models.compact import Grid, QuantizedLinear, dequantize
from lmworks.models.heads import Model

ROWS = Grid(bits=8)


class Product(torch.autograd.Function):
    """x W^T with W in eight bits: what is kept for the backward pass is q, not the matrix that it stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        """Multiply: x (…, I), q (O, I), scale (O, 1) -> (…, O)."""
        ctx.save_for_backward(q, scale)
        return F.linear(x, dequantize(q, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x; the matrix is frozen."""
        q, scale = ctx.saved_tensors
        return gradients[0] @ dequantize(q, scale).to(gradients[0].dtype), None, None


class Int8Linear(QuantizedLinear):
    """A frozen Linear whose rows are whole numbers from -127 to 127, each row with a scale."""

    keeps = False

    def __init__(self, given: nn.Linear) -> None:
        super().__init__(*quantize_matrix(given.weight.detach().float(), ROWS), ROWS)
        self.bias = given.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (…, I) -> (…, O)."""
        y: Tensor = Product.apply(x, self.q, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def quantize_base(model: Model) -> Model:
    """Put an Int8Linear in place of every Linear of the blocks, in place; do it before adapters are added."""
    for parent in list(model.transformer.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child).train(child.training))
    return model
