"""Frozen matrices in eight bits: a base that takes a quarter of the memory while small adapters on it are trained.

    q = round(W / s), s = max |W| / 127 of each output's row          W is about s q

The matrix is multiplied out when it is used and thrown away again, in the backward pass too: one at a time is ever held
in full. A layer takes O I bytes + 4 O for the scales, where float32 takes 4 O I.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.models.heads import Model

LARGEST = 127


class Product(torch.autograd.Function):
    """x W^T with W in eight bits: what is kept for the backward pass is q, not the matrix that it stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        """Multiply: x (…, I), q (O, I), scale (O,) -> (…, O)."""
        ctx.save_for_backward(q, scale)
        return F.linear(x, dequantize(q, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x; the matrix is frozen."""
        q, scale = ctx.saved_tensors
        return gradients[0] @ dequantize(q, scale, gradients[0].dtype), None, None


class Int8Linear(nn.Module):
    """A frozen Linear whose rows are whole numbers from -127 to 127, each row with a scale."""

    q: Tensor
    scale: Tensor

    def __init__(self, given: nn.Linear) -> None:
        super().__init__()
        weight = given.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST  # (O,)
        self.register_buffer("q", torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = given.bias

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I) that the numbers stand for, made afresh."""
        return dequantize(self.q, self.scale, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (…, I) -> (…, O)."""
        y: Tensor = Product.apply(x, self.q, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return s q in a dtype: (O, I)."""
    return (q * scale[:, None]).to(dtype)


def quantize_base(model: Model) -> Model:
    """Put an Int8Linear in place of every Linear of the blocks, in place; do it before adapters are added."""
    for parent in list(model.transformer.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child).train(child.training))
    return model
