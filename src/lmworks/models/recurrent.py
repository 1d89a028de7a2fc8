"""Networks that read a token at a time: vanilla RNN, LSTM and GRU, with a state in place of a key/value cache.

    rnn    h = tanh(W x + U h + b)                                                   (Elman 1990)
    gru    r, z = σ(…), σ(…);  n = tanh(W x + b + r ⊙ (U h + b′));  h = (1−z) ⊙ n + z ⊙ h   (Cho et al. 2014)
    lstm   i, f, g, o = σ, σ, tanh, σ;  c = f ⊙ c + i ⊙ g;  h = o ⊙ tanh(c)    (Hochreiter and Schmidhuber 1997)

The arithmetic is torch.nn's: one call runs all steps of a layer, many times as fast as a Python loop over them, and the
tests hold it to the formulas above in NumPy. A state knows nothing of positions, so a text may be longer than any that
was seen in training.

Shapes: B batch, T tokens, D hidden_size, E embedding_size, S states of a layer (lstm 2: h and c; else 1), R rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.config import Config
from lmworks.models.prefix import PrefixSlot

CELLS: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
ENDLESS = 2**62  # tokens that fit a state


class StateCache:
    """The states of R texts, in place of a KVCache: of each layer (R, S, D), and how many tokens they stand for.

    A call continues all rows, or, of `select([2, 0])`, only rows 2 and 0 in this order. A state cannot go back.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: int = 1, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.states = [torch.zeros(rows, *shape, dtype=dtype, device=device) for shape in shapes]  # (R, S, D) each
        self.lengths, self.read = [0] * rows, [0] * rows  # as a runtime counts them; that the states stand for
        self.kept = [0] * rows  # no prefix stands before them
        self.rows = list(range(rows))
        self.capacity = ENDLESS
        self.new: Tensor | None = None  # (B,) tokens of the call, where rows differ

    @property
    def longest(self) -> int:
        """The length of the longest selected row."""
        return max(self.lengths[row] for row in self.rows)

    def select(self, rows: Sequence[int]) -> StateCache:
        """Return the same states for calls that continue only these rows."""
        part = copy.copy(self)
        part.rows = list(rows)
        return part

    def reset(self) -> None:
        """Start the selected rows over."""
        for row in self.rows:
            self.lengths[row] = self.read[row] = 0
            for state in self.states:
                state[row] = 0

    def begin(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Prepare to add (B, T) tokens, padded on the right where the mask says so."""
        if len(self.rows) != len(input_ids):
            raise InputError("the cache and the batch differ", found=f"{len(input_ids)} rows",
                             expected=f"{len(self.rows)} rows")  # fmt: skip
        back = [row for row in self.rows if self.lengths[row] not in (0, self.read[row])]
        if back:
            raise InputError("a state cannot go back to an earlier token", found=f"row {back[0]}",
                             fix="run the text again from its beginning")  # fmt: skip
        for row in self.rows:
            if not self.lengths[row] and self.read[row]:
                self.read[row] = 0
                for state in self.states:
                    state[row] = 0
        whole = attention_mask is None or bool(attention_mask.bool().all())
        self.new = None if whole or attention_mask is None else attention_mask.bool().sum(1)

    def end(self, T: int) -> None:
        """Count the tokens of the call."""
        counts = [T] * len(self.rows) if self.new is None else self.new.tolist()
        for row, count in zip(self.rows, counts, strict=True):
            self.lengths[row] += count
            self.read[row] = self.lengths[row]


class RecurrentLayer(nn.Module):
    """One layer: all steps of the rows, from their states to their states."""

    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        width = c.hidden_size if layer else c.embedding_size or c.hidden_size
        self.cell = CELLS[c.block](width, c.hidden_size, batch_first=True)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, state: Tensor | None = None, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read (B, T, E or D) from states (B, S, D), of row b only `counts[b]` tokens -> (B, T, D), (B, S, D)."""
        if state is None:
            start: Any = None
        elif isinstance(self.cell, nn.LSTM):
            start = (state[:, 0][None].contiguous(), state[:, 1][None].contiguous())  # (1, B, D) each
        else:
            start = state[:, 0][None].contiguous()
        if counts is None:
            y, last = self.cell(x, start)  # (B, T, D), (1, B, D)
        else:
            rows = nn.utils.rnn.pack_padded_sequence(x, counts.cpu(), batch_first=True, enforce_sorted=False)
            packed, last = self.cell(rows, start)
            y, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        held = torch.cat(last) if isinstance(last, tuple) else last  # (S, B, D)
        return self.drop(y), held.transpose(0, 1)


class WordVectors(nn.Module):
    """A vector a token, of a width of its own."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.embedding_size or c.hidden_size)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ids (B, T) -> (B, T, E)."""
        x: Tensor = self.drop(self.tokens(input_ids))
        return x


class Sequential(nn.Module):
    """What networks without attention share: padding on either side, and texts that go on."""

    attends = False

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embeddings = WordVectors(c)
        self.prefix = PrefixSlot()  # always empty: there is no attention to read one

    def make_cache(
        self, rows: int, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StateCache:  # fmt: skip
        """Return the states of so many texts before their first token; any capacity fits a state."""
        raise NotImplementedError

    def run(self, x: Tensor, cache: StateCache | None) -> Tensor:
        """Read vectors (B, T, E), padded on the right -> (B, T, D)."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        cache: StateCache | None = None, token_type_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run (B, T) -> (B, T, D); positions and segments mean nothing here, nor does what comes out at padding."""
        if cache is not None:
            cache.begin(inputs, attention_mask)
            x = self.run(self.embeddings(inputs), cache)
            cache.end(inputs.shape[1])
            return x
        if attention_mask is None or bool(attention_mask[:, 0].all()):
            return self.run(self.embeddings(inputs), None)
        order = torch.argsort((~attention_mask.bool()).byte(), dim=1, stable=True)  # (B, T) real tokens first
        x = self.run(self.embeddings(inputs.gather(1, order)), None)  # (B, T, D)
        return torch.empty_like(x).scatter(1, order[:, :, None].expand_as(x), x)


class Recurrent(Sequential):
    """A stack of recurrent layers: token ids (B, T) -> hidden states (B, T, D)."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.layers = nn.ModuleList(RecurrentLayer(c, layer) for layer in range(c.num_hidden_layers))

    def make_cache(
        self, rows: int, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StateCache:  # fmt: skip
        """Return states of 0 for so many texts."""
        shape = (2 if self.config.block == "lstm" else 1, self.config.hidden_size)
        return StateCache([shape] * len(self.layers), rows, dtype=dtype, device=device)

    def run(self, x: Tensor, cache: StateCache | None) -> Tensor:
        """Run every layer over all tokens: (B, T, E) -> (B, T, D)."""
        for i, layer in enumerate(self.layers):
            if cache is None:
                x, _ = layer(x)
                continue
            states = cache.states[i]
            x, states[cache.rows] = layer(x, states[cache.rows], cache.new)
        return x
