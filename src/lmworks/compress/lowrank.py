"""Replace matrices by two thin factors: the best of each rank by the singular values (Eckart and Young 1936).

    W = U S V^T    is about    (U_r S_r^1/2) (S_r^1/2 V_r^T)

The rank is the least that keeps a share of the energy, the sum of the squared singular values. It pays where
r (O + I) < O I: other layers stay as they are.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.compress.quantize import check_plain, find_linears, put
from lmworks.models.compact import LowRankLinear
from lmworks.models.heads import Model


def keep_energy(values: Tensor, energy: float) -> int:
    """Return the least rank that keeps a share of the energy: ([3, 1, 0], 0.9) -> 1. `values` fall."""
    kept = values.double().square().cumsum(0)
    return int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1


def factorize(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (O, R), (R, I) of the nearest matrix of a rank; the singular values are shared evenly."""
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float().contiguous(), (root[:, None] * vt[:rank]).float().contiguous()


def lower_ranks(
    model: Model, *, energy: float = 0.9, rank: int | None = None, skip: Collection[str] = ()
) -> dict[str, tuple[int, float]]:
    """Factorize every Linear of the body that becomes smaller, in place; return the rank and kept energy of each.

    `rank` is one rank for all instead of a share of the energy. Raises InputError where no layer becomes smaller.
    """
    check_plain(model)
    if not 0 < energy <= 1 or (rank is not None and rank < 1):
        raise InputError("the ranks cannot be chosen so", found=f"energy {energy}, rank {rank}",
                         expected="energy above 0 and at most 1, rank 1 or more")  # fmt: skip
    done = {}
    for name, linear in find_linears(model, head=False).items():
        if name in skip:
            continue
        w = linear.weight.detach()
        values = torch.linalg.svdvals(w.double())
        chosen = keep_energy(values, energy) if rank is None else min(rank, len(values))
        if chosen * sum(w.shape) < w.numel():
            left, right = factorize(w, chosen)
            bias = None if linear.bias is None else linear.bias.detach().clone()
            put(model, name, LowRankLinear(left, right, bias))
            done[name] = (chosen, float(values[:chosen].square().sum() / values.square().sum()))
    if not done:
        raise InputError("no layer becomes smaller with these ranks", found=f"energy {energy}, rank {rank}",
                         fix="keep less of the energy, such as --energy 0.8, or give a --rank")  # fmt: skip
    return done


def multiply_out(model: nn.Module) -> nn.Module:
    """Put plain Linears in the place of factors, in place: the same answers from a published layout."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(module.weight.detach())
            if module.bias is not None:
                linear.bias = module.bias
            put(model, name, linear)
    return model
