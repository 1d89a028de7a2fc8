"""Adapters around frozen layers: low-rank ones, bottlenecks, prefixes, copies of a layer, rows of an embedding.

    LoRA    y = W x + b + s B A dropout(x)               s = alpha / R, rsLoRA: alpha / sqrt(R)
    DoRA    y = m / |W + s B A| * (W + s B A) x + b      | | of each output's row, held constant in the gradient
    bottleneck    h = W x + b,  y = h + U act(D h + d) + u

Sources: Hu et al. 2021; Kalajdzievski 2023 (rsLoRA); Liu et al. 2024, section 4.3 (DoRA); Houlsby et al. 2019.

Several adapters may sit on one layer, by name; at most one is active. `weight` is the matrix that the layer acts as.

Shapes: I inputs, O outputs, R rank, V vocab_size, D hidden_size, N trained rows, or the length
of a prefix, L layers, K key/value heads, E head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.compact import LowRankLinear, QuantizedLinear
from lmworks.models.heads import NoDraw
from lmworks.models.layers import ACTIVATIONS
from lmworks.models.prefix import PrefixSlot

T = TypeVar("T", bound=nn.Module)


class LowRank(nn.Module):
    """One adapter of one layer: A (R, I), B (O, R) and, for DoRA, the magnitudes (O,)."""

    def __init__(
        self, a: nn.Parameter, b: Tensor, *, alpha: float, dropout: float = 0.0, rslora: bool = False,
        magnitude: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take A itself: the parts of a matrix that is stored as one share theirs."""
        super().__init__()
        self.A, self.B = a, nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.rank, self.alpha, self.dropout, self.rslora = len(a), alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(self.rank) if rslora else self.rank)

    def change(self) -> Tensor:
        """Return what is added to the matrix: s B A (O, I)."""
        change: Tensor = self.scale * (self.B @ self.A)
        return change

    def factor(self, weight: Tensor) -> Tensor:
        """Return DoRA's factor of each output for the frozen matrix (O, I): (O,)."""
        assert self.magnitude is not None
        with torch.no_grad():
            norm = torch.linalg.norm(weight.to(self.A.dtype) + self.change(), dim=1)
        factor: Tensor = self.magnitude / norm
        return factor

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the matrix (O, I) with the adapter in it, in the adapter's precision."""
        merged = weight.to(self.A.dtype) + self.change()
        return merged if self.magnitude is None else self.factor(weight)[:, None] * merged


class Bottleneck(nn.Module):
    """What a layer gives, plus a narrow network's change to it: O -> R -> O."""

    def __init__(self, down: nn.Linear, up: nn.Linear, *, act: str) -> None:
        super().__init__()
        self.down, self.up, self.act = down, up, act

    def forward(self, y: Tensor) -> Tensor:
        """Add to what the layer gives: (…, O) -> (…, O)."""
        change: Tensor = self.up(ACTIVATIONS[self.act](self.down(y.to(self.down.weight.dtype))))  # (…, O)
        return (y + change).to(y.dtype)

    def apply_to(self, weight: Tensor) -> Tensor:
        """Refuse: no matrix does the same."""
        raise InputError(
            "a bottleneck adapter cannot be worked into a matrix: it is not linear",
            fix="use it beside its base, as lmworks evaluate does, or train with --method lora, which can be merged",
        )


class Prefix(nn.Module):
    """Keys and values of every layer before the first token: (N, L, 2, K, E), the order in which peft stores them."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = nn.Parameter(numbers)


class Adapted(nn.Module, Generic[T]):
    """A frozen layer and the adapters on it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.adapters, self.active = base, nn.ModuleDict(), ""

    def current(self) -> T | None:
        """Return the active adapter, or None where this layer has none of that name."""
        found: Any = self.adapters._modules.get(self.active)
        return found  # type: ignore[no-any-return]

    @property
    def frozen(self) -> Tensor:
        """The matrix without any adapter."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer acts as."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer acts with."""
        return getattr(self.base, "bias", None)

    def merged(self) -> nn.Module:
        """Return the plain layer that does what this one does."""
        base: nn.Module = self.base
        if isinstance(base, QuantizedLinear | LowRankLinear):
            out, inner = self.frozen.shape
            with NoDraw():
                base = nn.Linear(inner, out, bias=base.bias is not None)
            base.bias = self.base.bias  # type: ignore[assignment]
        if self.current() is not None or base is not self.base:
            base.weight = nn.Parameter(self.weight.detach().to(self.frozen.dtype))
        return base


class LoraLinear(Adapted[LowRank | Bottleneck]):
    """A frozen Linear with low-rank adapters, or bottlenecks after it."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: (…, I) -> (…, O)."""
        y: Tensor = self.base(x)
        adapter = self.current()
        if adapter is None:
            return y
        if isinstance(adapter, Bottleneck):
            after: Tensor = adapter(y)
            return after
        inner = x.to(adapter.A.dtype)
        dropping = self.training and adapter.dropout > 0
        if dropping:
            inner = F.dropout(inner, adapter.dropout)
        change = F.linear(F.linear(inner, adapter.A), adapter.B) * adapter.scale  # (…, O)
        if adapter.magnitude is not None:
            weight = self.frozen.to(inner.dtype)
            plain = F.linear(inner, weight) if dropping else y if self.bias is None else y - self.bias
            factor = adapter.factor(weight)  # (O,)
            change = (factor - 1) * plain + factor * change
        return (y + change).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I) that the layer acts as."""
        adapter = self.current()
        return self.frozen if adapter is None else adapter.apply_to(self.frozen)


class LoraEmbedding(Adapted[LowRank]):
    """A frozen Embedding (V, D) with low-rank adapters: A (R, V), B (D, R), magnitudes (D,)."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: (…) -> (…, D)."""
        y: Tensor = self.base(ids)
        adapter = self.current()
        if adapter is None:
            return y
        y = y + F.linear(F.embedding(ids, adapter.A.t()), adapter.B) * adapter.scale
        return y if adapter.magnitude is None else adapter.factor(self.frozen.t()) * y

    @property
    def weight(self) -> Tensor:
        """The matrix (V, D) that the layer acts as."""
        adapter = self.current()
        return self.frozen if adapter is None else adapter.apply_to(self.frozen.t()).t().contiguous()


class Whole(Adapted[nn.Module]):
    """A frozen layer that each adapter replaces by a copy of its own, trained as a whole: a head."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the copy of the active adapter."""
        module = self.current() or self.base
        first = next(module.parameters(), None)
        y: Tensor = module(x if first is None or not x.is_floating_point() else x.to(first.dtype))  # a copy is float32
        return y

    @property
    def weight(self) -> Tensor:
        """The weights of the copy that is active."""
        weight = (self.current() or self.base).weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the copy that is active."""
        return getattr(self.current() or self.base, "bias", None)

    def merged(self) -> nn.Module:
        """Return the copy that is active."""
        return self.current() or self.base


class Rows(nn.Module):
    """Trained rows (N, D) of an embedding, and the tokens that they belong to."""

    place: Tensor

    def __init__(self, tokens: Sequence[int], rows: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.rows = tuple(tokens), nn.Parameter(rows)
        place = torch.full((vocab_size,), -1)
        place[list(self.tokens)] = torch.arange(len(self.tokens))
        self.register_buffer("place", place, persistent=False)  # (V,), the row of a token, or -1


class TokenRows(Adapted[Rows]):
    """A frozen Embedding, or the projection to the vocabulary, of which only some tokens' rows are trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Look up (…) -> (…, D), or score (…, D) -> (…, V)."""
        y: Tensor = self.base(x)
        rows = self.current()
        if rows is None:
            return y
        if isinstance(self.base, nn.Embedding):
            place = rows.place[x]
            return torch.where((place >= 0)[..., None], F.embedding(place.clamp(min=0), rows.rows).to(y.dtype), y)
        index = list(rows.tokens)
        bias = None if self.bias is None else self.bias[index]
        return y.index_copy(-1, torch.tensor(index, device=y.device), F.linear(x, rows.rows.to(x.dtype), bias))

    @property
    def weight(self) -> Tensor:
        """The matrix (V, D) with the trained rows in it."""
        rows = self.current()
        if rows is None:
            return self.frozen
        index = torch.tensor(rows.tokens, device=self.frozen.device)
        return self.frozen.index_copy(0, index, rows.rows.to(self.frozen.dtype))


class Prefixed(Adapted[Prefix], PrefixSlot):
    """The place before a Transformer's first token, with prefixes."""

    def __init__(self, base: PrefixSlot) -> None:
        super().__init__(base)

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values (L, K, N, E) of the active prefix, or None."""
        prefix = self.current()
        if prefix is None:
            return None
        keys, values = prefix.numbers.permute(2, 1, 3, 0, 4)  # (L, K, N, E) each
        return keys, values

    def merged(self) -> nn.Module:
        """Refuse where a prefix is active: no matrix does the same."""
        if self.current() is not None:
            raise InputError(
                "a prefix cannot be worked into the weights: it is what attention reads beside the text",
                fix="use it beside its base, as lmworks evaluate does, or train with --method lora, which merges",
            )  # fmt: skip
        return self.base


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let the model act as it is without any adapter for a while; what is trained stays as chosen."""
    active = {module: module.active for module in adapted_layers(model).values()}
    for module in active:
        module.active = ""
    try:
        yield
    finally:
        for module, name in active.items():
            module.active = name


def adapted_layers(model: nn.Module) -> dict[str, Adapted[Any]]:
    """Return the layers that carry adapters, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
