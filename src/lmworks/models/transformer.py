"""The one Transformer: embeddings, a stack of blocks, a final norm.

Shapes: B batch, T new tokens (or patches and the class token), S keys (past and new), D hidden_size, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.attention import Context, Distances, Past
from lmworks.models.blocks import Block, make_block
from lmworks.models.cache import Call, KVCache
from lmworks.models.config import Config, LongRope, Vision
from lmworks.models.disentangled import RelativeEmbeddings
from lmworks.models.layers import make_norm
from lmworks.models.prefix import After, PrefixSlot
from lmworks.models.rope import Rope, rope_at, rope_frequencies
from lmworks.models.view import View, Whole


class TokenEmbeddings(nn.Module):
    """A vector a token, plus one a position where positions are learned, plus one a segment where there are any.

    Where they are smaller than the hidden states, a matrix brings them to their size (Lan et al. 2020, section 3.1).
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.offset, size = c.position_offset, c.embedding_size or c.hidden_size
        self.tokens = nn.Embedding(c.vocab_size, size)
        self.positions = nn.Embedding(c.max_position_embeddings, size) if c.positions == "learned" else None
        self.types = nn.Embedding(c.type_vocab_size, size) if c.type_vocab_size else None
        self.norm = make_norm(c, size) if c.embedding_norm else None
        self.drop = nn.Dropout(c.dropout)
        self.project = nn.Linear(size, c.hidden_size) if c.embedding_size else None

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Look up ids (B, T), positions (B or 1, T) and segments (B, T; None: all 0) -> (B, T, D)."""
        x = self.tokens(input_ids)  # (B, T, D)
        if self.types is not None:
            x = x + (self.types.weight[0] if token_type_ids is None else self.types(token_type_ids))  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(position_ids + self.offset)  # (B, T, D)
        y: Tensor = self.drop(x if self.norm is None else self.norm(x))
        return y if self.project is None else self.project(y)


class PatchEmbeddings(nn.Module):
    """A vector a patch of an image, after a class token, plus one a place (Dosovitskiy et al. 2021)."""

    def __init__(self, c: Config, v: Vision) -> None:
        super().__init__()
        self.shape = (v.num_channels, v.image_size, v.image_size)
        self.patches = nn.Conv2d(v.num_channels, c.hidden_size, v.patch_size, v.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, c.max_position_embeddings, c.hidden_size))
        self.drop = nn.Dropout(c.dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Cut images (B, channels, height, width) into patches -> (B, T, D)."""
        if tuple(pixel_values.shape[1:]) != self.shape:
            found, expected = tuple(pixel_values.shape[1:]), self.shape
            where = "preprocessor_config.json, config.json"
            raise InputError("the images have the wrong shape", where=where, found=f"{found}", expected=f"{expected}")
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)  # (B, T - 1, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.positions  # (B, T, D)
        y: Tensor = self.drop(x)
        return y


class Transformer(nn.Module):
    """Token ids (B, T), or images (B, channels, height, width) -> hidden states (B, T, D).

    `attention_mask` (B, T) is 1 on tokens and 0 on padding. Without a cache the padding may be on either side: it is
    never looked at, and positions count the tokens alone, as transformers' `generate` counts them. What comes out at
    padding means nothing. Leave the mask out where you can, since it costs the fast attention kernel: whole rows need
    none, and rows padded on the right need none either in a causal model, where no token sees what follows.

    With a cache each row goes on at its own length; the mask then covers the new tokens, padded on the right only.
    """

    attends = True

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embeddings = TokenEmbeddings(c) if c.vision is None else PatchEmbeddings(c, c.vision)
        groups = c.layer_groups or c.num_hidden_layers
        self.layers = nn.ModuleList(make_block(c, layer) for layer in range(groups))
        self.order = [run * groups // c.num_hidden_layers for run in range(c.num_hidden_layers)]  # in which they run
        self.final_norm = make_norm(c) if c.final_norm else nn.Identity()
        self.relative = RelativeEmbeddings(c, c.relative) if c.relative else None
        self.prefix = PrefixSlot()
        # numbers rather than buffers, which would lose their precision when the model is cast to bfloat16
        rotates = c.positions == "rope"
        self.frequencies = tuple(rope_frequencies(c).tolist()) if rotates else ()
        self.local_frequencies = self.long_frequencies = self.frequencies
        if rotates and c.rotary.local_theta is not None:
            self.local_frequencies = tuple(rope_frequencies(c, c.rotary.local_theta).tolist())
        if rotates and isinstance(c.rotary.scaling, LongRope):
            self.long_frequencies = tuple(rope_frequencies(c, long=True).tolist())

    def make_cache(
        self, rows: int, *, capacity: int | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:  # fmt: skip
        """Return empty keys and values for so many texts of up to `capacity` tokens (None: all that it reads)."""
        return KVCache(self.config, rows, capacity=capacity, dtype=dtype, device=device)

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the stack: (B, T) -> (B, T, D). `position_ids` (B or 1, T) replace those that are counted."""
        c = self.config
        if c.vision is not None:
            x = self.embeddings(inputs)  # (B, T, D)
            return self.run(x, Whole(x, None, causal=False), None, None)
        prefix = self.prefix.rows()
        before = 0 if prefix is None else prefix[0].shape[2]
        check_length(c, inputs.shape[1] + max(before, 0 if cache is None else cache.longest), before)
        past: Past | None = cache
        view: View
        if cache is not None:
            view = self.go_on(cache, inputs, attention_mask, prefix)
        elif prefix is None:
            view = Whole(inputs, attention_mask, causal=c.causal)
        else:
            view = past = After(Whole(inputs, attention_mask, causal=c.causal), inputs.shape[1], prefix)
        position_ids = view.position_ids if position_ids is None else position_ids
        x = self.embeddings(inputs, position_ids, token_type_ids)  # (B, T, D)
        x = self.run(x, view, position_ids, past)  # (B, T, D)
        if cache is not None:
            cache.end()
        return x

    def run(self, x: Tensor, view: View, position_ids: Tensor | None, cache: Past | None) -> Tensor:
        """See who may look at whom, then run the blocks: (B, T, D) -> (B, T, D)."""
        rope, distances = self.rope(self.frequencies, position_ids), self.distances(x.shape[1])
        everywhere = Context(*view.look(None), rope, cache, distances=distances)
        local = everywhere
        if self.config.local_layers:
            local = Context(*view.look(self.config.window), self.rope(self.local_frequencies, position_ids), cache)
        return self.through(x, everywhere, local)

    def through(self, x: Tensor, everywhere: Context, local: Context) -> Tensor:
        """Run the blocks, each in its context, and the final norm: (B, T, D) -> (B, T, D)."""
        for place in self.order:
            layer = self.layers[place]
            assert isinstance(layer, Block)
            x = layer(x, local if layer.local else everywhere)  # (B, T, D)
        y: Tensor = self.final_norm(x)
        return y

    def distances(self, T: int) -> Distances | None:
        """Return how far the tokens of rows of up to T are apart; None where attention does not know."""
        return None if self.relative is None else self.relative(T)

    def rope(
        self, frequencies: tuple[float, ...], position_ids: Tensor | None, lengths: Tensor | None = None
    ) -> Rope | None:
        """Return the rotation at these positions; None where nothing is rotated.

        Where long texts have frequencies of their own, a row's length decides: one more than its last position, or
        what `lengths` (B or 1, T) says at each token of rows that lie end to end.
        """
        if not frequencies or position_ids is None:
            return None
        chosen = torch.tensor(frequencies, device=position_ids.device)  # (R/2,)
        scaling = self.config.rotary.scaling
        if not isinstance(scaling, LongRope):
            return rope_at(chosen, position_ids)
        lengths = position_ids.amax(-1, keepdim=True) + 1 if lengths is None else lengths  # (B or 1, T or 1)
        is_long = (lengths > scaling.original_max_position_embeddings)[:, None, :, None]  # (B or 1, 1, T or 1, 1)
        long = torch.tensor(self.long_frequencies, device=position_ids.device)  # (R/2,)
        return rope_at(torch.where(is_long, long, chosen), position_ids, scaling.factor)

    def go_on(
        self, cache: KVCache, input_ids: Tensor, attention_mask: Tensor | None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Call:  # fmt: skip
        """Begin a call that continues a cache, whose empty rows begin with the prefix; only a causal model can."""
        if not self.config.causal:
            raise InputError("a model that reads both ways has no cache", fix="run the whole text again")
        if prefix is not None:
            cache.start(*prefix, new=input_ids.shape[1])
        view = cache.begin(input_ids, attention_mask)
        if self.config.turn is not None:
            check_crossing(view.past, view.new, self.config.turn)
        return view


def check_crossing(past: Sequence[int], new: Sequence[int], original: int) -> None:
    """Raise InputError for a row that becomes long: its keys in the cache were rotated as those of a short text."""
    for before, more in zip(past, new, strict=True):
        if 0 < before <= original < before + more:
            raise InputError(
                "a text that began short cannot go on beyond the model's original context",
                found=f"{before + more} tokens", expected=f"at most {original}, or more than that from the start",
                fix="shorten it, or run the whole text again",
            )  # fmt: skip


def check_length(c: Config, tokens: int, prefix: int = 0) -> None:
    """Raise InputError for more tokens than there are learned positions."""
    if c.positions == "learned" and tokens > c.max_tokens:
        raise InputError(
            "the text does not fit the model",
            found=f"{tokens} tokens" + (f", {prefix} of them the prefix" if prefix else ""),
            expected=f"at most {c.max_tokens}",
            fix="shorten it",
        )
