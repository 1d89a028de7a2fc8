"""A tiny run for the tests of training: a Llama of a few thousand parameters on a stream that can be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmworks.models.families import gpt2, llama
from lmworks.models.heads import NEXT_TOKEN, CausalLM, Head
from lmworks.training.data import TokenWindows
from lmworks.training.objectives import CausalLoss
from lmworks.training.train_config import TrainConfig
from lmworks.training.trainer import Trainer

VOCAB, CONTEXT, BATCH = 23, 12, 8
FIXED = {"dtype": "fp32", "compile": "never"}  # nothing is measured


def make_model(*, seed: int = 1, dropout: float = 0.0) -> CausalLM:
    """Return a small Llama with fresh weights."""
    config = llama.new(
        vocab_size=VOCAB,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        dropout=dropout,
    )
    return CausalLM(config, seed=seed)


class Bigram(nn.Module):
    """Two matrices: for tests of many saves, or to show that the loop knows no architecture."""

    def __init__(self) -> None:
        super().__init__()
        size = gpt2.new(
            vocab_size=VOCAB, hidden_size=4, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=1
        )
        self.tokens, self.head = nn.Embedding(VOCAB, 4), Head(size, NEXT_TOKEN)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.tokens(input_ids)
        return y


def make_stream(length: int, *, seed: int = 0) -> np.ndarray:
    """Return tokens that mostly count upwards."""
    rng = np.random.default_rng(seed)
    return ((np.arange(length) + rng.integers(0, 2, length)) % VOCAB).astype(np.uint16)


def make_data(**changes: Any) -> TokenWindows:
    """Return windows of such streams."""
    settings: dict[str, Any] = {"context": CONTEXT, "batch_size": BATCH, **changes}
    return TokenWindows(make_stream(700), make_stream(160, seed=1), **settings)


def make_trainer(folder: Path, *, dropout: float = 0.0, **changes: Any) -> Trainer:
    """Return a trainer of 12 steps that validates and saves every 3."""
    settings: dict[str, Any] = {"steps": 12, "lr": 3e-3, "eval_every": 3, "warmup": 2, **FIXED, **changes}
    parts = {name: settings.pop(name) for name in ("model", "data", "objective", "stream") if name in settings}
    return Trainer(
        parts.get("model") or make_model(dropout=dropout),
        objective=parts.get("objective") or CausalLoss(),
        data=parts.get("data") or make_data(),
        config=TrainConfig(**settings),
        folder=folder,
        stream=parts.get("stream"),
    )
