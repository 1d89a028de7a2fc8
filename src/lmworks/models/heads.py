"""Heads: from hidden states to what a task predicts, and the causal language model.

Shapes: B batch, T tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmworks.models.cache import KVCache
from lmworks.models.config import Config
from lmworks.models.transformer import Transformer


class Head(nn.Module):
    """A linear projection of each hidden state."""

    def __init__(self, size: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(size, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Score: (…, D) -> (…, outputs)."""
        y: Tensor = self.project(x)
        return y


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


class CausalLM(nn.Module):
    """Predict the next token: input ids (B, T) -> logits (B, T, V).

    Fresh weights come from a generator of their own: the same seed gives the same weights, and torch's random state is
    left alone. `seed=None` leaves them on the meta device, without memory, for a loader to fill in.
    """

    def __init__(self, config: Config, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"), NoDraw():  # nothing is drawn that would be thrown away
            self.transformer = Transformer(config)
            self.head = Head(config.hidden_size, config.vocab_size)
        if seed is not None:
            self.to_empty(device=torch.get_default_device())
        self.tie()
        if seed is not None:
            initialise(self, config, seed)

    def tie(self) -> None:
        """Let the projection share the embedding's matrix (Press and Wolf 2017), where the config says so."""
        if self.config.tie_word_embeddings:
            self.head.project.weight = self.transformer.embeddings.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        last: Tensor | int | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or only those (B, V) of token `last[b]` of each row (-1: the last one)."""
        x = self.hidden_states(input_ids, attention_mask, position_ids=position_ids, cache=cache)  # (B, T, D)
        if isinstance(last, int):
            x = x[:, last]  # (B, D)
        elif last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        logits: Tensor = self.head(x)
        return logits

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the states (B, T, D) that the head reads: a loss may project them piece by piece."""
        states: Tensor = self.transformer(input_ids, attention_mask, position_ids, cache)
        return states


def initialise(model: nn.Module, c: Config, seed: int) -> None:
    """Draw fresh weights as GPT-2 does: normal, and smaller where a residual branch ends (Radford et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    shrink = math.sqrt(2 * c.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = c.initializer_range / (shrink if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            drawn = torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)  # drawn on the CPU, so that every device gets the same
