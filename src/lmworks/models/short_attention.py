"""Attention of short rows while training in bf16 on a processor: forward in bf16, backward in float32.

torch's backward kernel is several times slower in bf16 than in float32 where rows are short; docs/log.md has figures.
Gradients are rounded to bf16 once, at the end.

Shapes: B batch, T queries, S keys, H heads, E head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 256  # keys; with 512 both kernels take as long, with 1,024 bf16 is the faster
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def suits(q: Tensor, k: Tensor, *, dropout: float) -> bool:
    """Tell whether this way is the faster one: bf16 on a processor, short rows, gradients wanted, no dropout."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return wanted and q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] <= LONGEST and not dropout


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
    """Take the weighted mean of the values, softmax(q k^T / sqrt(E)) v: q (B, H, T, E), k, v (B, K, S, E) -> as q.

    `mask` (B or 1, 1, T or 1, S) is True where a query may look; K divides H.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # (B, H, S, E)
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    y: Tensor = forward(q, k, v, bias, causal)[0]
    return y


@torch.library.custom_op("lmworks::attend", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the mean (B, H, T, E), and the logarithm of each softmax's denominator (B, H, T)."""
    y, log_sums = FLASH(q, k, v, 0.0, causal, attn_mask=bias)
    return y, log_sums


@torch.library.custom_op("lmworks::attend_backward", mutates_args=())
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    wide = None if bias is None else bias.float()
    tensors = (x.float() for x in (grad, q, k, v, y))
    dq, dk, dv = FLASH_BACKWARD(*tensors, log_sums, 0.0, causal, attn_mask=wide)
    return dq.type_as(q), dk.type_as(k), dv.type_as(v)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    y, log_sums = FLASH(q, k, v, 0.0, causal, attn_mask=bias)
    return y, log_sums


@backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(FLASH_BACKWARD(grad, q, k, v, y, log_sums, 0.0, causal, attn_mask=bias))


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    q, k, v, bias, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, bias)


def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `forward`."""
    q, k, v, y, log_sums, bias = ctx.saved_tensors
    return *backward(grad, q, k, v, y, log_sums, bias, ctx.causal), None, None


forward.register_autograd(differentiate, setup_context=remember)
