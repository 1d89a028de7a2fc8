"""The chunked loss against torch's, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import VOCAB, make_model
from torch import nn

from lmworks.training import objectives
from lmworks.training.objectives import CausalLoss, chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, None])
def test_values_and_gradients_equal_torch(chunk: int | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 12), torch.randn(50, 12)
    labels = torch.randint(50, (37,))
    results = []
    for function in ("ours", "torch"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if function == "ours":
            loss = chunked_cross_entropy(h, w, labels, chunk=chunk)
        else:
            loss = F.cross_entropy(h @ w.t(), labels, reduction="sum")
        (loss / 37).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(chunked_cross_entropy(hidden, weight, labels, chunk=chunk), results[1][0], rtol=1e-5)


def test_a_hopeless_token_costs_its_true_price() -> None:
    """A probability too small for a float is no reason to see an infinite loss and stop."""
    hidden, weight = torch.eye(3, requires_grad=True), torch.eye(3) * 300
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(300.0)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad, torch.tensor([[0.0, 0, 0], [-300, 300, 0], [0, 0, 0]]))


def test_the_logits_are_never_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a step is as large as the logits of all tokens."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 8 * 64)
    largest = 0
    softmax = torch.Tensor.softmax

    def spy(x: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    hidden = torch.randn(100, 6, requires_grad=True)
    chunked_cross_entropy(hidden, torch.randn(64, 6), torch.randint(64, (100,))).backward()
    assert largest == 8 * 64


def test_a_frozen_side_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    chunked_cross_entropy(hidden, weight, torch.randint(9, (5,))).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.randint(9, (5,))).backward()
    assert weight.grad is not None


def test_bf16_is_near_fp32() -> None:
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(200, 32), torch.randn(80, 32) * 0.2, torch.randint(80, (200,))
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = chunked_cross_entropy(h, w, labels, chunk=33)
        assert loss.dtype == torch.float32
        loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        assert w.grad.dtype == torch.float32
        grads.append((loss.detach(), h.grad, w.grad))
    for exact, rough in zip(*grads, strict=True):
        assert 0 < (exact - rough).norm() / exact.norm() < 0.02


def test_the_causal_loss_is_the_models_own_loss_and_ignores_minus_100() -> None:
    model = make_model()
    torch.manual_seed(2)
    batch = {"input_ids": torch.randint(VOCAB, (3, 10)), "labels": torch.randint(VOCAB, (3, 10))}
    batch["labels"][:, :4] = -100
    loss = CausalLoss()(model, batch)
    loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(batch["input_ids"])
    theirs = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(ours, (p.grad for p in model.parameters()), strict=True):
        assert b is not None
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert CausalLoss().count({"labels": batch["labels"].numpy()}) == 18


def test_a_head_that_is_not_a_plain_linear_is_not_bypassed() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make_model()
    doubled = Doubled(16, VOCAB, bias=False)
    doubled.weight = model.head.project.weight
    model.head.project = doubled
    batch = {"input_ids": torch.randint(VOCAB, (2, 5)), "labels": torch.randint(VOCAB, (2, 5))}
    expected = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    assert CausalLoss()(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)
