"""AdamW (Loshchilov and Hutter 2019) with weight decay by dimension, and its state as named tensors.

Matrices and embeddings decay; norms, biases and other vectors do not. A tied parameter appears once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import FormatError

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, its update fused into one pass over memory."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # parameters() names a tied one once
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return both moments of every parameter that has been updated, named after it."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor], *, step: int) -> None:
    """Put back what `optimizer_tensors` gave after `step` updates; a missing or mis-shaped tensor is a FormatError."""
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or step == 0:
            continue
        state: dict[str, Tensor] = {"step": torch.tensor(float(step))}
        for moment in MOMENTS:
            tensor = tensors.get(f"{moment}.{name}")
            if tensor is None or tensor.shape != parameter.shape:
                found = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise FormatError(
                    f"the optimizer's state does not fit {name}", found=found, expected=str(tuple(parameter.shape))
                )
            state[moment] = tensor.to(parameter.device, copy=True)
        optimizer.state[parameter] = state


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this rate for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr
