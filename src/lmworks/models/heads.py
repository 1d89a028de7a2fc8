"""Heads: from hidden states to what a task predicts, and the causal language model.

Shapes: B batch, T tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.models.cache import CacheStep
from lmworks.models.config import Config
from lmworks.models.transformer import Transformer


class Head(nn.Module):
    """A linear projection of each hidden state."""

    def __init__(self, size: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(size, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, outputs)."""
        y: Tensor = self.project(x)
        return y


class CausalLM(nn.Module):
    """Predict the next token: input ids (B, T) -> logits (B, T, V).

    `seed` makes fresh weights from a generator of its own (None leaves them as torch makes them).
    """

    def __init__(self, config: Config, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.hf_config: dict[str, Any] = {}  # the published config that this was read from; unknown keys survive in it
        self.transformer = Transformer(config)
        self.head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie()
        if seed is not None:
            initialise(self, config, seed)

    def tie(self) -> None:
        """Let the projection share the embedding's matrix (Press and Wolf 2017)."""
        self.head.project.weight = self.transformer.embeddings.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: CacheStep | None = None,
        last: Tensor | int | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or only those (B, V) of token `last[b]` of each row (-1: the last one)."""
        x = self.hidden_states(input_ids, attention_mask, position_ids=position_ids, cache=cache)  # (B, T, D)
        if isinstance(last, int):
            x = x[:, last]  # (B, D)
        elif last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        y: Tensor = self.head(x)
        return y

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Return the states (B, T, D) that the head reads: a loss may project them piece by piece."""
        y: Tensor = self.transformer(input_ids, attention_mask, position_ids, cache)
        return y


def initialise(model: nn.Module, c: Config, seed: int) -> None:
    """Draw fresh weights as GPT-2 does: normal, and smaller where a residual branch ends (Radford et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    ends = ("o_proj.weight", "down_proj.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            shrink = math.sqrt(2 * c.num_hidden_layers) if name.endswith(ends) else 1.0
            parameter.normal_(0.0, c.initializer_range / shrink, generator=generator)
