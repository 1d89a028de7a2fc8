"""Take weights away: the smallest ones to zero, or whole attention heads and MLP neurons.

    magnitude     the share s of a matrix, or of all matrices together, that is nearest to 0 becomes 0
    gradual       s(t) = s_end (1 - (1 - t / T)^3), while the model is trained (Zhu and Gupta 2017, section 3)
    structured    the least important heads and neurons go, the same number in every layer, and the matrices shrink
    importance    the norm of a neuron's weights, or |sum w dL/dw| over them on real data (Molchanov et al. 2019, eq. 8)

Zeros leave the size of a file and the time of a product as they are; fewer neurons do not.

Shapes: D hidden_size, H heads, E head_dim, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.compress.quantize import check_plain, find_linears
from lmworks.models.attention import Attention
from lmworks.models.blocks import Block
from lmworks.models.heads import Model
from lmworks.models.layers import MLP, GatedMLP

Scope = Literal["global", "layer"]


def smallest(weights: Mapping[str, Tensor], share: float, *, scope: Scope = "global") -> dict[str, Tensor]:
    """Return masks, False for exactly the share of the weights that is smallest: of each matrix, or of all together."""
    if scope == "layer":
        return {name: mask for name, w in weights.items() for mask in smallest({name: w}, share).values()}
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    kept = torch.ones(len(sizes), dtype=torch.bool)
    kept[sizes.topk(round(share * len(sizes)), largest=False, sorted=False).indices] = False
    parts = torch.split(kept, [w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def prunable(model: Model) -> dict[str, Tensor]:
    """Return the matrices that may lose weights: those of the body's Linears, neither embeddings nor the head."""
    return {f"{name}.weight": linear.weight for name, linear in find_linears(model, head=False).items()}


def prune(model: Model, share: float, *, scope: Scope = "global") -> dict[str, Tensor]:
    """Set the smallest weights to zero in place; return the masks. Raises InputError for a share that cannot be."""
    check_plain(model)
    check_share(share)
    weights = prunable(model)
    masks = smallest(weights, share, scope=scope)
    apply_masks(weights, masks)
    return masks


def check_share(share: float) -> None:
    """Raise InputError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise InputError("--sparsity is out of range", found=str(share), expected="0 or more, below 1")


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the masked weights to zero, in place."""
    for name, mask in masks.items():
        weights[name].mul_(mask)


def sparsity(model: Model) -> dict[str, float]:
    """Return the share of zeros of each prunable matrix, and "all" of them together."""
    weights = prunable(model)
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    return {"all": sum(zeros.values()) / max(total, 1)} | {name: n / weights[name].numel() for name, n in zeros.items()}


def cubic(step: int, *, begin: int, end: int, final: float) -> float:
    """Return the share of zeros at a step: 0 until `begin`, `final` from `end` on, fast first, then slowly."""
    if step >= end:
        return final
    if step < begin:
        return 0.0
    return final * (1 - (1 - (step - begin) / (end - begin)) ** 3)


# ---------------------------------------------------------------------------------------------------------- structured


def mlp_scores(block: Block, gradients: bool) -> Tensor:
    """Return the importance of each neuron (I,): of all the numbers that go if it goes."""
    mlp = block.mlp
    ins = [mlp.up_proj, *([mlp.gate_proj] if isinstance(mlp, GatedMLP) else [])]
    parts = [importance(linear.weight, gradients) for linear in ins]  # (I, D) each
    parts += [importance(linear.bias, gradients)[:, None] for linear in ins if linear.bias is not None]
    parts.append(importance(mlp.down_proj.weight, gradients).T)
    return gather(torch.cat(parts, 1), gradients)


def head_scores(block: Block, gradients: bool) -> Tensor:
    """Return the importance of each group of heads that share keys and values (K,)."""
    a = block.attention
    parts = [importance(linear.weight, gradients).reshape(a.kv_heads, -1) for linear in (a.q_proj, a.k_proj, a.v_proj)]
    out = importance(a.o_proj.weight, gradients)  # (D, H E)
    parts.append(out.T.reshape(a.kv_heads, -1))
    return gather(torch.cat(parts, 1), gradients)


def importance(w: Tensor, gradients: bool) -> Tensor:
    """Return w², or what the loss would change by, to first order: w dL/dw."""
    if not gradients:
        return w.detach().square()
    assert w.grad is not None
    return w.detach() * w.grad


def gather(parts: Tensor, gradients: bool) -> Tensor:
    """Sum over what goes together."""
    return parts.sum(1).abs() if gradients else parts.sum(1)


def shrink(model: Model, *, neurons: float = 0.0, heads: float = 0.0, gradients: bool = False) -> Model:
    """Remove a share of the neurons and of the heads of every layer, in place; the matrices and the config shrink.

    The same number goes in every layer: published configs have one size for all. Heads that share keys and values go
    together. With `gradients` the parameters' `grad` is what importance is made of. Raises InputError where nothing,
    or everything, would go.
    """
    check_plain(model)
    c = model.config
    keep_neurons = c.intermediate_size - round(neurons * c.intermediate_size)
    keep_groups = c.num_key_value_heads - round(heads * c.num_key_value_heads)
    if keep_neurons < 1 or keep_groups < 1:
        raise InputError("nothing would be left of a layer", found=f"{keep_neurons} neurons, {keep_groups} heads",
                         fix="remove a smaller share")  # fmt: skip
    if (keep_neurons, keep_groups) == (c.intermediate_size, c.num_key_value_heads):
        raise InputError("nothing would be removed", found=f"neurons {neurons}, heads {heads}",
                         fix="remove a larger share: the smallest part is one neuron, or one head")  # fmt: skip
    for block in model.transformer.layers:
        assert isinstance(block, Block)
        if keep_neurons < c.intermediate_size:
            cut_neurons(block.mlp, best(mlp_scores(block, gradients), keep_neurons))
        if keep_groups < c.num_key_value_heads:
            cut_heads(block.attention, best(head_scores(block, gradients), keep_groups))
    each = c.num_attention_heads // c.num_key_value_heads
    model.config = replace(
        c, intermediate_size=keep_neurons, num_key_value_heads=keep_groups, num_attention_heads=keep_groups * each
    )
    model.transformer.config = model.config
    return model


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores, in their order."""
    return scores.topk(count).indices.sort().values


def cut_neurons(mlp: MLP, kept: Tensor) -> None:
    """Leave these neurons of an MLP."""
    for linear in (mlp.up_proj, *([mlp.gate_proj] if isinstance(mlp, GatedMLP) else [])):
        cut(linear, kept, outputs=True)
    cut(mlp.down_proj, kept, outputs=False)


def cut_heads(attention: Attention, groups: Tensor) -> None:
    """Leave these groups of heads: (n,) numbers of key/value heads."""
    each, size = attention.heads // attention.kv_heads, attention.head_dim
    keys = (groups[:, None] * size + torch.arange(size)).flatten()
    queries = (groups[:, None] * each * size + torch.arange(each * size)).flatten()
    cut(attention.q_proj, queries, outputs=True)
    cut(attention.k_proj, keys, outputs=True)
    cut(attention.v_proj, keys, outputs=True)
    cut(attention.o_proj, queries, outputs=False)
    attention.heads, attention.kv_heads = len(groups) * each, len(groups)


def cut(linear: nn.Linear, kept: Tensor, *, outputs: bool) -> None:
    """Leave these outputs, or these inputs, of a Linear."""
    weight = linear.weight.detach()
    linear.weight = nn.Parameter((weight[kept] if outputs else weight[:, kept]).contiguous())
    if outputs and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[kept])
    linear.out_features, linear.in_features = linear.weight.shape


class Gradual:
    """A training callback: more zeros with every few steps, and what is zero stays zero until the end.

    What it does follows from the step and the weights alone, so that a resumed run ends with the same bits. Weights
    from before the last zeros were made are never the best ones.
    """

    def __init__(
        self, model: Model, final: float, *, begin: int, end: int, every: int, scope: Scope = "global"
    ) -> None:
        """Reach the share `final` between two steps, with new masks every few; 0 to 0 prunes before the first step."""
        check_share(final)
        self.weights, self.final, self.scope = prunable(model), final, scope
        self.begin, self.end, self.every = begin, end, max(every, 1)
        self.masks: dict[str, Tensor] = {}

    def on_start(self, trainer: Any) -> None:
        """Find the zeros of an interrupted run, or make the first ones."""
        if trainer.state.step:
            self.masks = {name: w.detach() != 0 for name, w in self.weights.items()}
        self.renew(trainer.state.step)

    def on_step(self, trainer: Any, row: dict[str, Any]) -> None:
        """Make new zeros where the schedule says so, and keep the old ones."""
        self.renew(trainer.state.step)

    def renew(self, step: int) -> None:
        """Choose the masks of this step and apply them."""
        if step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0):
            share = cubic(step, begin=self.begin, end=self.end, final=self.final)
            self.masks = smallest(self.weights, share, scope=self.scope)
        apply_masks(self.weights, self.masks)

    def on_validation(self, trainer: Any, row: dict[str, Any]) -> None:
        """Forget a score of weights that have too few zeros."""
        if trainer.state.step < self.end:
            trainer.state.best_loss = trainer.state.mark = None

    def on_end(self, trainer: Any, result: Any) -> None:
        """Nothing is left to do."""
