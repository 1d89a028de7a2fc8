"""Our own networks without attention: lmworks-rnn, lmworks-lstm, lmworks-gru and lmworks-feedforward.

Nobody publishes these, so the names are ours: `hidden_size`, `embedding_size`, `num_hidden_layers`, `window` (of the
feed-forward one), and torch.nn's own for the weights of a cell. `max_position_embeddings` is no property of a network:
it says how many tokens of a text are read in one go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.models.config import Config, HeadSpec
from lmworks.models.hf_config import Fields
from lmworks.models.hf_shared import decoder_heads, shared

TYPE = "lmworks-"
AT_ONCE = 4096  # tokens that are read in one go, at least
NAMES = {"rnn": "LmworksRNN", "lstm": "LmworksLSTM", "gru": "LmworksGRU", "feedforward": "LmworksFeedForward"}


class Sequential:
    """One of them."""

    PREFIX = "model."
    TRANSPOSED: frozenset[str] = frozenset()
    IGNORED: frozenset[str] = frozenset()

    def __init__(self, block: str) -> None:
        self.block, self.NAME = block, NAMES[block]
        inner = "linear" if block == "feedforward" else "cell"
        self.KEYS: dict[str, str | tuple[str, ...]] = {
            "embeddings": "embeddings.tokens",
            f"layers.{{}}.{inner}": f"layers.{{}}.{inner}",
        }

    def heads(self, c: Config) -> Mapping[str, HeadSpec]:
        """The next token."""
        return {"Model": HeadSpec(outputs="none"), "CausalLM": decoder_heads()["CausalLM"]}

    def config(self, hf: Mapping[str, Any]) -> Config:
        """Read one."""
        f = Fields(hf)
        return self.new(
            vocab_size=f.integer("vocab_size"), hidden_size=f.integer("hidden_size"),
            embedding_size=f.integer("embedding_size"), num_hidden_layers=f.integer("num_hidden_layers"),
            window=f.integer("window") if self.block == "feedforward" else None, dropout=f.number("dropout", 0.0),
            max_position_embeddings=f.integer("max_position_embeddings"), **shared(hf, tie=False))  # fmt: skip

    def to_hf(self, c: Config) -> dict[str, Any]:
        """Write what `config` reads."""
        window = {"window": c.window} if self.block == "feedforward" else {}
        return {
            "hidden_size": c.hidden_size, "embedding_size": c.embedding_size, "dropout": c.dropout, **window,
            "num_hidden_layers": c.num_hidden_layers, "max_position_embeddings": c.max_position_embeddings,
        }  # fmt: skip

    def new(self, *, hidden_size: int, embedding_size: int, max_position_embeddings: int, **rest: Any) -> Config:
        """Return a network of this size; its projection has a matrix of its own."""
        return Config(
            model_type=TYPE + self.block, block=self.block, hidden_size=hidden_size,  # type: ignore[arg-type]
            embedding_size=embedding_size, max_position_embeddings=max(AT_ONCE, max_position_embeddings),
            num_attention_heads=1, num_key_value_heads=1, head_dim=hidden_size, intermediate_size=hidden_size,
            positions="none", **{"tie_word_embeddings": False, **rest})  # fmt: skip


SEQUENTIAL = {TYPE + block: Sequential(block) for block in NAMES}
