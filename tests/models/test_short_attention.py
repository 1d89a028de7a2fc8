"""Attention of short rows in bf16 while training: as torch's, with gradients nearer to the exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.models import short_attention
from lmworks.models.attention import Attention, Context
from lmworks.models.families import llama


def draw(B: int, heads: tuple[int, int], T: int, S: int, E: int) -> list[Tensor]:
    """Return q, k, v and a gradient, in the layout that a projection leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, heads[0], E), (B, S, heads[1], E), (B, S, heads[1], E), (B, T, heads[0], E)]
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


def learn(function: Any, tensors: list[Tensor], **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the result and the gradients of q, k and v."""
    *given, slope = tensors
    leaves = [one.detach().clone().requires_grad_() for one in given]
    y = function(*leaves, **settings)
    y.backward(slope)
    return y.detach(), [one.grad for one in leaves if one.grad is not None]


LENGTHS = torch.tensor([30, 17, 64])
SEEN = (torch.arange(64) < LENGTHS[:, None])[:, None, None, :]  # (B, 1, 1, S)
PAIRS = torch.rand(1, 1, 9, 12, generator=torch.Generator().manual_seed(1)) < 0.6  # (1, 1, T, S)


@pytest.mark.parametrize(
    ("shape", "mask", "causal"),
    [
        ((3, (12, 12), 64, 64, 32), SEEN, False),
        ((2, (8, 2), 100, 100, 64), None, True),
        ((2, (4, 4), 9, 12, 16), PAIRS | (torch.arange(12) == 3), False),
        ((1, (2, 1), 1, 1, 8), None, True),
    ],
)
def test_it_is_torchs_attention_with_nearer_gradients(shape: Any, mask: Tensor | None, causal: bool) -> None:
    tensors = draw(*shape)
    grouped = {"attn_mask": mask, "is_causal": causal, "enable_gqa": True}
    exact = learn(F.scaled_dot_product_attention, [one.double() for one in tensors], **grouped)
    theirs = learn(F.scaled_dot_product_attention, tensors, **grouped)
    ours = learn(short_attention.attend, tensors, mask=mask, causal=causal)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    for mine, other, right in zip(ours[1], theirs[1], exact[1], strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == right.shape
        off, off_there = ((one.double() - right).norm() for one in (mine, other))
        assert off <= 0.004 * right.norm() + 1e-9 and off <= off_there * 1.05 + 1e-9


def test_it_keeps_the_rules_of_torchs_operators() -> None:
    """What it says of shapes, layouts and gradients holds: compiled blocks rely on it."""
    q, k, v, slope = (one.clone() for one in draw(2, (4, 4), 8, 8, 16))
    torch.library.opcheck(short_attention.forward, (q, k, v, None, True))
    y, log_sums = short_attention.forward(q, k, v, None, True)
    torch.library.opcheck(short_attention.backward, (slope, q, k, v, y, log_sums, None, True))


def test_it_is_for_training_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for float32, for inference, with dropout, or for long rows."""
    used: list[int] = []

    def watch(q: Tensor, k: Tensor, v: Tensor, **look: Any) -> Tensor:
        used.append(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(short_attention, "attend", watch)
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    layer = Attention(llama.new(**sizes, max_position_embeddings=512), 0)
    x, context = torch.randn(1, 8, 16), Context(causal=True)
    layer(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, context)
        layer(torch.randn(1, short_attention.LONGEST + 1, 16), context)
        with torch.inference_mode():
            layer(x, context)
        layer.dropout = 0.1
        layer(x, context)
        assert used == [8]
        layer.eval()
        layer(x, context).sum().backward()
    assert used == [8, 8]
