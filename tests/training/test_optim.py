"""AdamW against the published equations, and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from small import make_model
from torch import nn

from lmworks.base.errors import FormatError
from lmworks.models.families import gpt2
from lmworks.models.heads import CausalLM
from lmworks.training.optim import load_optimizer, make_adamw, optimizer_tensors, set_learning_rate


def test_matrices_decay_vectors_do_not_and_a_tied_embedding_counts_once() -> None:
    config = gpt2.new(
        vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=4
    )
    for model in (make_model(), CausalLM(config, seed=0)):
        optimizer = make_adamw(model, lr=1.0, weight_decay=0.3)
        name_of = {id(p): name for name, p in model.named_parameters()}
        decayed = {name_of[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        free = {
            name_of[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]
        }
        assert decayed == {name for name, p in model.named_parameters() if p.ndim == 2}
        assert free == {name for name, p in model.named_parameters() if p.ndim == 1}
        assert any("norm" in name for name in free)
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
            p.numel() for p in model.parameters()
        )
        every = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(every) == len(set(every))


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model.transformer.embeddings.tokens.weight.requires_grad_(False)
    optimizer = make_adamw(model, lr=1.0, weight_decay=0.1)
    frozen = model.transformer.embeddings.tokens.weight
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])


def test_the_trajectory_is_that_of_the_published_equations() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, over 30 steps with a changing rate."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = make_adamw(layer, lr=0.0, weight_decay=0.2, beta1=0.8, beta2=0.95, eps=1e-8)
    plain = {name: p.detach().double().clone() for name, p in layer.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in plain.items()}
    v = {name: torch.zeros_like(p) for name, p in plain.items()}
    for step in range(1, 31):
        lr = 0.01 * step / 30
        set_learning_rate(optimizer, lr)
        for name, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            decay = 0.2 if p.ndim == 2 else 0.0
            plain[name] -= lr * decay * plain[name]
            plain[name] -= lr * (m[name] / (1 - 0.8**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in layer.named_parameters():
        assert torch.allclose(p.double(), plain[name], atol=1e-6), name


def test_a_reloaded_optimizer_continues_to_the_same_bits() -> None:
    def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    one = make_model()
    optimizer = make_adamw(one, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        update(one, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(one, optimizer).items()}
    two = make_model(seed=9)
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    other = make_adamw(two, lr=1e-2, weight_decay=0.1)
    load_optimizer(two, other, saved, step=3)
    update(one, optimizer, 7)
    update(two, other, 7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

    name = next(iter(saved))
    del saved[name]
    with pytest.raises(FormatError, match="optimizer's state does not fit"):
        load_optimizer(two, other, saved, step=3)
