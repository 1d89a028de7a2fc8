"""The static cache: rows of different lengths, rows that wait, buffers that grow, and nothing seen beyond a length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmworks.base.errors import InputError
from lmworks.models.cache import KVCache
from lmworks.models.config import Config
from lmworks.models.families import gpt2, llama
from lmworks.models.heads import CausalLM

SIZES = {"vocab_size": 90, "num_hidden_layers": 2, "max_position_embeddings": 48, "initializer_range": 0.3}
CONFIGS = {
    "gpt2": gpt2.new(hidden_size=32, num_attention_heads=4, **SIZES),
    "llama": llama.new(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **SIZES),
}
Made = tuple[CausalLM, Config]


@pytest.fixture(params=CONFIGS)
def made(request: pytest.FixtureRequest) -> Made:
    config = CONFIGS[request.param]
    return CausalLM(config).eval(), config


def ids(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_ragged_prompts_then_steps(made: Made) -> None:
    """Prompts of different lengths in one call, padded on the right; then steps; each row as if alone."""
    model, config = made
    x, lengths = ids(3, 30), [12, 1, 7]
    whole = model(x)
    cache = KVCache(config, rows=3)
    prompt, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12)
    for row, length in enumerate(lengths):
        prompt[row, :length], mask[row, :length] = x[row, :length], 1
    logits = model(prompt, mask, cache=cache)
    assert cache.lengths == lengths
    for row, length in enumerate(lengths):
        assert (logits[row, :length] - whole[row, :length]).abs().max() < 1e-5
    for t in range(10):
        now = [length + t for length in lengths]
        logits = model(x[range(3), now][:, None], cache=cache)
        assert (logits[:, 0] - whole[range(3), now]).abs().max() < 1e-5
    assert cache.lengths == [length + 10 for length in lengths]


@torch.inference_mode()
def test_rows_that_wait_are_not_touched(made: Made) -> None:
    model, config = made
    cache = KVCache(config, rows=4)
    model(ids(4, 9), cache=cache)
    idle = [buffer[[0, 2]].clone() for buffer in (*cache.keys, *cache.values)]
    model(ids(2, 6), cache=cache.select([3, 1]))
    model(ids(2, 1), cache=cache.select([1, 3]))
    model(ids(1, 3), cache=cache.select([3]))
    assert cache.lengths == [9, 16, 9, 19]
    assert all(torch.equal(b[[0, 2]], old) for b, old in zip((*cache.keys, *cache.values), idle, strict=True))


@torch.inference_mode()
def test_what_lies_beyond_a_length_is_never_seen(made: Made) -> None:
    """A slot is used again: what the last text left in the buffers must not show."""
    model, config = made
    x = ids(2, 20)
    clean, dirty = KVCache(config, rows=2), KVCache(config, rows=2)
    for buffer in (*dirty.keys, *dirty.values):
        buffer.fill_(1e4)
    dirty.lengths = [40, 3]
    dirty.select([0, 1]).reset()
    assert dirty.lengths == [0, 0]
    for cache in (clean, dirty):
        model(x[:1, :11], cache=cache.select([0]))
        model(x[1:, :4], cache=cache.select([1]))
    assert torch.equal(model(x[:, 11:12], cache=clean), model(x[:, 11:12], cache=dirty))
    assert torch.equal(model(x[:, 12:15], cache=clean), model(x[:, 12:15], cache=dirty))


@torch.inference_mode()
def test_growing_keeps_what_is_held(made: Made) -> None:
    model, config = made
    x = ids(2, 40)
    small, large = KVCache(config, rows=2, capacity=10), KVCache(config, rows=2)
    part = small.select([1])
    for cache in (small, large):
        model(x[:, :10], cache=cache)
    small.reserve(30)
    assert small.capacity == part.capacity == 30 and large.capacity == 48
    assert torch.equal(model(x[:, 10:25], cache=small), model(x[:, 10:25], cache=large))
    small.reserve(5)
    assert small.capacity == 30


@torch.inference_mode()
def test_what_does_not_fit_is_refused_and_nothing_changes(made: Made) -> None:
    model, config = made
    cache = KVCache(config, rows=2, capacity=10)
    model(ids(2, 8), cache=cache)
    with pytest.raises(InputError, match=r"the cache is full[\s\S]*11 tokens[\s\S]*at most 10"):
        model(ids(2, 3), cache=cache)
    with pytest.raises(InputError, match=r"the cache and the batch differ[\s\S]*3 rows[\s\S]*2 rows"):
        model(ids(3, 1), cache=cache)
    with pytest.raises(InputError, match="padding on the right"):
        model(ids(2, 2), torch.tensor([[0, 1], [1, 1]]), cache=cache)
    assert cache.lengths == [8, 8]
    model(ids(2, 2), cache=cache)


@torch.inference_mode()
def test_rows_in_any_order(made: Made) -> None:
    """Row b of the batch belongs to rows[b] of the cache, also where the rows are neighbours but not in order."""
    model, config = made
    x = ids(3, 12)
    whole = model(x)
    cache = KVCache(config, rows=4)
    part = cache.select([1, 3, 2])
    for start, end in ((0, 5), (5, 6), (6, 12)):
        assert (model(x[:, start:end], cache=part) - whole[:, start:end]).abs().max() < 1e-5
    straight = KVCache(config, rows=3)
    model(x, cache=straight)
    assert (cache.keys[1][[1, 3, 2], :, :12] - straight.keys[1][:, :, :12]).abs().max() < 1e-5


def test_one_slice_is_a_view(made: Made) -> None:
    """The fast path copies nothing: what attention reads is the buffer itself, also for neighbouring rows."""
    config = made[1]
    cache = KVCache(config, rows=4)
    for rows in ([2], [1, 2, 3]):
        part = cache.select(rows)
        part.begin(ids(len(rows), 5), None)
        new = torch.randn(len(rows), config.num_key_value_heads, 5, config.head_dim)
        keys, _ = part.append(1, new, new)
        assert keys.data_ptr() == cache.keys[1][rows[0]].data_ptr()
        assert torch.equal(cache.keys[1][rows, :, :5], new)
    assert cache.lengths == [0] * 4  # counted only when the call ends
