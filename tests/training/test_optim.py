"""Every optimizer against the published equations and torch's own classes, its groups, its state, clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small import make_model
from torch import nn

from lmworks.base.errors import FormatError, InputError
from lmworks.models.families import gpt2
from lmworks.models.heads import CausalLM
from lmworks.training.optim import (
    clip_gradient,
    learning_scales,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from lmworks.training.train_config import TrainConfig


def test_matrices_decay_vectors_do_not_and_a_tied_embedding_counts_once() -> None:
    config = gpt2.new(
        vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=4
    )
    for model in (make_model(), CausalLM(config, seed=0)):
        optimizer = make_optimizer(model, TrainConfig(steps=1, lr=1.0, weight_decay=0.3))
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
    optimizer = make_optimizer(model, TrainConfig(steps=1, lr=1.0, weight_decay=0.1))
    frozen = model.transformer.embeddings.tokens.weight
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])


def test_the_trajectory_is_that_of_the_published_equations() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, over 30 steps with a changing rate."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = make_optimizer(layer, TrainConfig(steps=1, lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.95))
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


KINDS: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "adam"},
    {"optimizer": "sgd", "momentum": 0.7},
    {"optimizer": "sgd", "momentum": 0.0},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_optimizer_is_torchs_and_that_of_its_equations(kind: dict[str, Any]) -> None:
    """Thirty steps with a changing rate, against torch.optim without fusion and NumPy in float64."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = TrainConfig(steps=30, lr=0.1, weight_decay=0.2, beta1=0.8, beta2=0.95, **kind)
    optimizer = make_optimizer(ours, config)
    groups = [{"params": [theirs.weight], "weight_decay": 0.2}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference: torch.optim.Optimizer
    if kind["optimizer"] == "sgd":
        reference = torch.optim.SGD(groups, lr=0.1, momentum=kind["momentum"], foreach=False)
    else:
        make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind["optimizer"]]
        reference = make(groups, lr=0.1, betas=(0.8, 0.95), foreach=False)
    plain = {name: p.detach().double().numpy().copy() for name, p in ours.named_parameters()}
    m = {name: np.zeros_like(w) for name, w in plain.items()}
    v = {name: np.zeros_like(w) for name, w in plain.items()}
    for t in range(1, 31):
        lr = 0.02 * t / 30
        set_learning_rate(optimizer, lr)
        for group in reference.param_groups:
            group["lr"] = lr
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            g, w = p.grad.double().numpy().copy(), plain[name]
            decay = 0.2 if w.ndim == 2 else 0.0
            if kind["optimizer"] == "adamw":
                w = w - lr * decay * w
            else:
                g = g + decay * w
            if kind["optimizer"] == "sgd":
                m[name] = kind["momentum"] * m[name] + g
                plain[name] = w - lr * m[name]
            else:
                m[name] = 0.8 * m[name] + 0.2 * g
                v[name] = 0.95 * v[name] + 0.05 * g * g
                plain[name] = w - lr * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
        assert np.allclose(p.detach().numpy(), plain[name], atol=1e-6), name


def test_layers_further_down_learn_more_slowly() -> None:
    model = CausalLM(replace(make_model().config, tie_word_embeddings=False), seed=0)
    scales = learning_scales(model, TrainConfig(steps=1, lr=0.1, layer_decay=0.5, head_lr=0.3))
    assert scales["transformer.embeddings.tokens.weight"] == 0.125  # two blocks: 0.5 ** 3
    assert {v for name, v in scales.items() if ".layers.0." in name} == {0.25}
    assert {v for name, v in scales.items() if ".layers.1." in name} == {0.5}
    assert scales["transformer.final_norm.weight"] == 1.0
    assert {v for name, v in scales.items() if name.startswith("head.")} == {0.3 / 0.1}
    optimizer = make_optimizer(model, TrainConfig(steps=1, lr=0.1, layer_decay=0.5, head_lr=0.3, weight_decay=0.2))
    set_learning_rate(optimizer, 0.01)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rate[id(p)] == pytest.approx(0.01 * scales[name])
        assert decay[id(p)] == (0.2 if p.ndim == 2 else 0.0)
    assert set(learning_scales(model, TrainConfig(steps=1, lr=0.1)).values()) == {1.0}


def test_a_head_that_is_the_embedding_has_no_rate_of_its_own() -> None:
    config = gpt2.new(
        vocab_size=11, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=4
    )
    with pytest.raises(InputError, match="--head-lr has nothing to act on"):
        make_optimizer(CausalLM(config, seed=0), TrainConfig(steps=1, lr=0.1, head_lr=0.3))


def test_clipping_by_norm_by_value_or_not() -> None:
    gradients = {"norm": [1.5, -2.0], "value": [1.0, -1.0], "off": [3.0, -4.0]}
    bounds = {"norm": {"max_norm": 2.5}, "value": {"max_norm": 2.5, "value": 1.0}, "off": {"max_norm": 0.0}}
    for name, expected in gradients.items():
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, -4.0])
        assert clip_gradient([p, nn.Parameter(torch.zeros(1))], **bounds[name]) == pytest.approx(5.0)
        assert p.grad.tolist() == pytest.approx(expected), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_a_reloaded_optimizer_continues_to_the_same_bits(kind: dict[str, Any]) -> None:
    def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    one = make_model()
    optimizer = make_optimizer(one, TrainConfig(steps=1, lr=1e-2, weight_decay=0.1, **kind))
    for seed in range(3):
        update(one, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(one, optimizer).items()}
    two = make_model(seed=9)
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    other = make_optimizer(two, TrainConfig(steps=1, lr=1e-2, weight_decay=0.1, **kind))
    load_optimizer(two, other, saved, step=3)
    update(one, optimizer, 7)
    update(two, other, 7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

    if kind == {"optimizer": "sgd", "momentum": 0.0}:
        assert saved == {}  # nothing to remember
        return
    name = next(iter(saved))
    del saved[name]
    with pytest.raises(FormatError, match="optimizer's state does not fit"):
        load_optimizer(two, other, saved, step=3)
