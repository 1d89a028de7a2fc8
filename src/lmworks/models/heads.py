"""Heads: from hidden states to what a task predicts; and a Transformer together with its head.

Shapes: B batch, T tokens, D hidden_size, O outputs of the head, V vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmworks.models.cache import KVCache
from lmworks.models.config import Config, HeadSpec
from lmworks.models.feedforward import FeedForward
from lmworks.models.layers import ACTIVATIONS
from lmworks.models.recurrent import CELLS, Recurrent, StateCache
from lmworks.models.transformer import Transformer

NEXT_TOKEN = HeadSpec(outputs="vocab", bias=False, keys={"lm_head": "project"})


class Head(nn.Module):
    """Pool, then dense, act and norm, then project; what the spec switches off is None."""

    def __init__(self, c: Config, spec: HeadSpec) -> None:
        super().__init__()
        size = inner = c.hidden_size
        if spec.dense and spec.outputs == "vocab":  # the projection may be the embedding's matrix
            size = c.embedding_size or size
        self.pool = spec.pool
        self.dense = nn.Linear(inner, size, bias=spec.dense_bias) if spec.dense else None
        self.act = ACTIVATIONS[spec.act]
        self.norm = None if spec.norm == "none" else nn.LayerNorm(size, c.norm_eps, bias=spec.norm == "layer")
        self.project = nn.Linear(size, spec.size(c), bias=spec.bias) if spec.outputs != "none" else None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score each token (B, T, D) -> (B, T, O), or each row: (B, O)."""
        x = pool(x, self.pool, attention_mask)  # (B, T, D) or (B, D)
        if self.dense is not None:
            x = self.act(self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        y: Tensor = x if self.project is None else self.project(x)
        return y


def pool(x: Tensor, kind: str, attention_mask: Tensor | None) -> Tensor:
    """Choose a state of each row (B, T, D), or their mean, padding apart: (B, D); "none" keeps all (B, T, D)."""
    if kind == "none":
        return x
    if attention_mask is None:
        return {"first": x[:, 0], "last": x[:, -1], "mean": x.mean(1)}[kind]  # (B, D)
    rows = torch.arange(len(x), device=x.device)
    if kind == "mean":
        real = attention_mask[:, :, None].to(x.dtype)  # (B, T, 1)
        return (x * real).sum(1) / real.sum(1)  # (B, D)
    place = torch.arange(x.shape[1], device=x.device) * attention_mask  # (B, T)
    index = attention_mask.int().argmax(1) if kind == "first" else place.argmax(1)  # (B,)
    return x[rows, index]  # (B, D)


class NoDraw(TorchFunctionMode):
    """Leave parameters as they are where a module would draw its first weights.

    Drawing on the meta device does nothing, but loads torch's compiler first: a second at every start.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip the functions of `torch.nn.init`, run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Model(nn.Module):
    """A Transformer and the head of one task: input ids (B, T) or images -> logits (B, T, O) or (B, O).

    `kind` is the published class's name without its family ("SequenceClassification", "MaskedLM" …), `spec` its head;
    "Model" is the bare Transformer, which returns hidden states (B, T, D).

    Fresh weights come from a generator of their own: the same seed gives the same weights, and torch's random state is
    left alone. `seed=None` leaves them on the meta device, without memory, for a loader to fill in.
    """

    def __init__(self, config: Config, kind: str, spec: HeadSpec, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config, self.kind, self.spec = config, kind, spec
        self.parts: tuple[Any, ...] = ()  # layers of a user's own: models/custom.py
        with torch.device("meta"), NoDraw():  # nothing is drawn that would be thrown away
            self.transformer: Transformer = make_body(config)
            self.head = Head(config, self.spec)
        if seed is not None:
            self.to_empty(device=torch.get_default_device())
        self.tie()
        if seed is not None:
            initialise(self, config, seed)

    def tie(self) -> None:
        """Let the projection share the embedding's matrix (Press and Wolf 2017), where the config says so."""
        if self.is_tied and self.head.project is not None:
            self.head.project.weight = self.transformer.embeddings.tokens.weight  # type: ignore[union-attr,assignment]

    @property
    def is_tied(self) -> bool:
        """Whether the projection is the embedding's matrix."""
        return self.spec.outputs == "vocab" and self.config.tie_word_embeddings

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | StateCache | None = None,
        last: Tensor | int | None = None,
    ) -> Tensor:
        """Return the head's numbers (B, T, O) or (B, O), for "Model" the states (B, T, D).

        With `last` only those of token `last[b]` of each row (-1: the last one) of a head that scores tokens: (B, O).
        """
        x = self.hidden_states(
            inputs, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids, cache=cache
        )  # (B, T, D)
        if self.kind == "Model":
            return x
        if isinstance(last, int):
            x = x[:, last]  # (B, D)
        elif last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        logits: Tensor = self.head(x, attention_mask)
        return logits

    def hidden_states(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | StateCache | None = None,
    ) -> Tensor:
        """Return the states (B, T, D) that the head reads: a loss may project them piece by piece."""
        states: Tensor = self.transformer(inputs, attention_mask, position_ids, cache, token_type_ids)
        return states


def make_body(c: Config) -> Any:
    """Return the network that reads: of blocks with attention, of cells with a state, or of a window."""
    if c.block in CELLS:
        return Recurrent(c)
    return FeedForward(c) if c.block == "feedforward" else Transformer(c)


class CausalLM(Model):
    """Predict the next token: input ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: Config, spec: HeadSpec = NEXT_TOKEN, *, seed: int | None = 0) -> None:
        super().__init__(config, "CausalLM", spec, seed=seed)


def initialise(model: nn.Module, c: Config, seed: int) -> None:
    """Draw fresh weights as GPT-2 does: normal, and smaller where a residual branch ends (Radford et al. 2019).

    Networks without norms keep the variance of what they read instead: 1 / √inputs (LeCun et al. 1998).
    """
    generator = torch.Generator().manual_seed(seed)
    shrink = math.sqrt(2 * c.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if "bias" in name.rpartition(".")[2] else 1.0)
                if c.block == "lstm" and name.endswith("bias_ih_l0"):  # forget gates open (Jozefowicz et al. 2015)
                    parameter[c.hidden_size : 2 * c.hidden_size] = 1.0
                continue
            std = c.initializer_range / (shrink if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            if c.block in (*CELLS, "feedforward"):
                std = 1.0 if name.endswith("embeddings.tokens.weight") else parameter.shape[1] ** -0.5
            drawn = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)  # drawn on the CPU, so that every device gets the same
