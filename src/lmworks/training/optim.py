"""The optimizers, which parameters decay and how fast each one learns, and their state as named tensors.

For a parameter w with gradient g, rate η and decay λ, in step t = 1, 2, …:

    sgd     g ← g + λw;  b ← μb + g (b = g at first);             w ← w - ηb         (Polyak 1964, as torch writes it)
    adam    g ← g + λw;  m ← β₁m + (1 - β₁)g;  v ← β₂v + (1 - β₂)g²;
            w ← w - η · m/(1 - β₁ᵗ) / (√(v/(1 - β₂ᵗ)) + ε)                           (Kingma and Ba 2015)
    adamw   w ← w - ηλw instead of the term in g, the rest as adam                   (Loshchilov and Hutter 2019)

Matrices and embeddings decay; norms, biases and other vectors do not. A tied parameter appears once.

The rate of a parameter is η · scale. With `layer_decay` d in a stack of L blocks, scale = d^(L + 1 - place): the
embeddings have place 0, block i has i + 1, what follows the stack L + 1 (Howard and Ruder 2018; Clark et al. 2020).
`head_lr` takes the place of η in the head, and follows the same schedule.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import FormatError, InputError
from lmworks.training.train_config import TrainConfig

EPSILON = 1e-8


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, its update fused into one pass over memory."""
    c, groups = config, make_groups(model, config)
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True)
    make = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
    return make(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=EPSILON, fused=True)


def make_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters by what share of the rate they get ("scale") and whether they decay.

    Raises InputError for a `head_lr` where the head has no trainable parameters of its own, and for a `layer_decay`
    where nothing below the top is trained.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # a tied one once
    if config.head_lr is not None and not any(is_head(name) for name, _ in named):
        raise InputError(
            "--head-lr has nothing to act on",
            found="a head without trainable parameters of its own",
            fix="leave it out",
        )
    scales = learning_scales(model, config)
    if config.layer_decay != 1 and all(scales[name] == 1 or is_head(name) for name, _ in named):
        raise InputError(
            "--layer-decay has nothing to act on",
            found="layers that are not trained",
            fix="leave it out",
        )
    for decays in (True, False):
        for name, parameter in named:
            if (parameter.ndim >= 2) == decays:
                groups.setdefault((scales[name], decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]


def learning_scales(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Return the share of the learning rate that each parameter gets, by name."""
    names = [name for name, _ in model.named_parameters()]
    blocks = {name: int(match[1]) for name in names if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    top = max(blocks.values(), default=-1) + 2  # the place of what follows the stack
    scales = {}
    for name in names:
        first = re.search(r"(?:^|\.)embeddings\.", name) is not None
        place = blocks[name] + 1 if name in blocks else 0 if first else top
        scales[name] = config.layer_decay ** (top - place)
        if config.head_lr is not None and is_head(name):
            scales[name] = config.head_lr / config.lr
    return scales


def is_head(name: str) -> bool:
    """Tell whether a parameter belongs to the head."""
    return re.search(r"(?:^|\.)head\.", name) is not None


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this rate, times each group's scale, for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def clip_gradient(parameters: list[nn.Parameter], *, max_norm: float, value: float = 0.0) -> float:
    """Clip the gradient's global norm, or instead every number of it, at a bound (0: off); return the norm before."""
    if max_norm and not value:
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if value:
        nn.utils.clip_grad_value_(parameters, value)
    return norm


def moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return what the optimizer remembers of each parameter, by torch's names."""
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    return ("exp_avg", "exp_avg_sq")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer remembers of every parameter that has been updated, named after it."""
    found = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in moments(optimizer)
    }
    return found | fewer_updates(model, optimizer)


def fewer_updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the updates of the parameters that had fewer than others, such as a head whose task takes turns."""
    updates = {
        name: optimizer.state[parameter]["step"] if parameter in optimizer.state else torch.tensor(0.0)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not isinstance(optimizer, torch.optim.SGD)
    }
    most = max((float(step) for step in updates.values()), default=0.0)
    return {f"step.{name}": step for name, step in updates.items() if float(step) < most}


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], *, step: int
) -> None:
    """Put back what `optimizer_tensors` gave after `step` updates; a missing or mis-shaped tensor is a FormatError."""
    optimizer.state.clear()
    names = moments(optimizer)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or step == 0 or not names:
            continue
        state: dict[str, Tensor] = {}
        updates = float(tensors.get(f"step.{name}", step))
        if updates == 0:
            continue
        if not isinstance(optimizer, torch.optim.SGD):
            state["step"] = torch.tensor(updates, device=parameter.device)  # the fused update reads it there
        for moment in names:
            tensor = tensors.get(f"{moment}.{name}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise FormatError(
                    f"the optimizer's state does not fit {name}", found=found, expected=str(tuple(parameter.shape))
                )
            # ordered in memory as the parameter is (GPT-2's matrices are transposed): the fused update expects it
            state[moment] = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        optimizer.state[parameter] = state
