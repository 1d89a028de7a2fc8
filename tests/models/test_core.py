"""The network itself: fresh weights, dropout, masks, positions, sizes; all without a file.

Shapes: B batch, T tokens, E head_dim.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmworks.base.errors import InputError
from lmworks.models.cache import KVCache
from lmworks.models.config import HEAD_ACTS, Config, RopeScaling, Rotary
from lmworks.models.families import FAMILIES, gpt2, llama
from lmworks.models.heads import CausalLM
from lmworks.models.layers import ACTIVATIONS
from lmworks.models.rope import rope_at, rope_frequencies, rope_table, rotate, stretch
from lmworks.models.view import Whole

GPT2 = gpt2.new(hidden_size=64, num_attention_heads=4, vocab_size=300, num_hidden_layers=8, max_position_embeddings=64)
LLAMA = llama.new(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=300, num_hidden_layers=8,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(3))


@BOTH
def test_fresh_weights(config: Config) -> None:
    """Normal with deviation 0.02; 0.02 / sqrt(2 * 8) = 0.005 where a branch ends; norms 1 and biases 0."""
    for name, parameter in CausalLM(config).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        expected = 0.005 if "o_proj" in name or "down_proj" in name else 0.02
        assert abs(parameter.std().item() / expected - 1) < 0.05, name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


@BOTH
def test_seed(config: Config) -> None:
    """The seed decides, and torch's own random state is neither read nor moved."""
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a = CausalLM(config, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    b, c = CausalLM(config, seed=5).state_dict(), CausalLM(config, seed=6).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.project.weight"], c["head.project.weight"])
    assert torch.equal(
        CausalLM(config).state_dict()["head.project.weight"], CausalLM(config, seed=0).head.project.weight
    )


@BOTH
def test_first_loss_is_that_of_a_guess(config: Config) -> None:
    x = ids(4, 33)
    loss = F.cross_entropy(CausalLM(config)(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item()
    assert abs(loss - math.log(300)) < 0.05


def test_tied_weights_are_one_parameter() -> None:
    tied, untied = CausalLM(GPT2), CausalLM(LLAMA)
    assert tied.head.project.weight is tied.transformer.embeddings.tokens.weight
    assert untied.head.project.weight is not untied.transformer.embeddings.tokens.weight
    tied(ids(1, 4)).sum().backward()
    assert tied.head.project.weight.grad is not None
    assert sum(p.numel() for p in tied.parameters()) == count_gpt2(GPT2)


def count_gpt2(c: Config) -> int:
    """Count the parameters of a GPT-2 by hand."""
    D, layers = c.hidden_size, c.num_hidden_layers
    block = 2 * 2 * D + (D * 3 * D + 3 * D) + (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D)
    return c.vocab_size * D + c.max_position_embeddings * D + layers * block + 2 * D


@BOTH
def test_dropout_is_on_in_training_only(config: Config) -> None:
    model = CausalLM(dataclasses.replace(config, dropout=0.3))
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.allclose(model(ids(1, 9)), model(ids(1, 9)))
        model.eval()
        plain = CausalLM(config).eval()
        assert torch.equal(model(ids(1, 9)), plain(ids(1, 9)))


def test_dropout_is_in_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on the embeddings, two on each block's additions, and attention's own, all with the config's rate."""
    rates: list[float] = []
    attention: list[float] = []
    dropout, attend = F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, *a: rates.append(p) or dropout(x, p, *a))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: attention.append(k["dropout_p"]) or attend(*a, **k)
    )
    CausalLM(dataclasses.replace(GPT2, dropout=0.25))(ids(1, 5))
    assert rates == [0.25] * (1 + 2 * 8)
    assert attention == [0.25] * 8
    attention.clear()
    CausalLM(dataclasses.replace(GPT2, dropout=0.25)).eval()(ids(1, 5))
    assert attention == [0.0] * 8


@BOTH
def test_no_mask_where_nothing_is_hidden(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask costs the fast kernel: whole rows, prompts and steps of one token must go without."""
    calls: list[tuple[bool, bool]] = []
    attend = F.scaled_dot_product_attention

    def watch(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model, cache = CausalLM(config).eval(), KVCache(config, rows=3)

    def kinds(*args: Any, **kwargs: Any) -> set[tuple[bool, bool]]:
        calls.clear()
        with torch.no_grad():
            model(*args, **kwargs)
        return set(calls)

    assert kinds(ids(2, 8)) == {(True, True)}
    assert kinds(ids(2, 8), cache=cache.select([0, 1])) == {(True, True)}
    assert kinds(ids(2, 1), cache=cache.select([0, 1])) == {(True, False)}
    assert kinds(ids(2, 1), cache=cache.select([1, 2])) == {(False, False)}  # different lengths
    assert kinds(ids(1, 4), cache=cache.select([0])) == {(False, False)}  # a piece after a past
    assert kinds(ids(2, 8), torch.ones(2, 8)) == {(False, False)}  # padding, perhaps


@BOTH
def test_a_token_sees_the_past_only(config: Config) -> None:
    model, x = CausalLM(config).eval(), ids(1, 20)
    y = x.clone()
    y[0, 12] += 1
    with torch.no_grad():
        for mask in (None, torch.ones(1, 20)):
            a, b = model(x, mask), model(y, mask)
            assert torch.equal(a[:, :12], b[:, :12])
            assert (a[:, 12:] - b[:, 12:]).abs().amax(-1).min() > 1e-6


@BOTH
def test_padding_is_finite_and_gradients_too(config: Config) -> None:
    """A row that is padding at first has no key to look at but itself."""
    model, mask = CausalLM(config), torch.ones(2, 10)
    mask[0, :9] = 0
    logits = model(ids(2, 10), mask)
    logits[mask.bool()].sum().backward()
    assert torch.isfinite(logits).all()
    seen, _ = Whole(ids(2, 10), mask, causal=True).look(None)
    assert seen is not None and seen.any(-1).all()  # not every kernel forgives a row without keys
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@BOTH
def test_last(config: Config) -> None:
    """Logits of one token a row are those of the whole."""
    model, x = CausalLM(config).eval(), ids(3, 10)
    with torch.no_grad():
        whole = model(x)
        assert torch.allclose(model(x, last=-1), whole[:, -1], atol=1e-6)
        assert torch.allclose(model(x, last=torch.tensor([4, 0, 9])), whole[range(3), [4, 0, 9]], atol=1e-6)
        assert torch.allclose(model.head(model.hidden_states(x)), whole)


@BOTH
def test_positions_can_be_given(config: Config) -> None:
    model, x = CausalLM(config).eval(), ids(2, 10)
    with torch.no_grad():
        assert torch.equal(model(x, position_ids=torch.arange(10)[None]), model(x))
        moved = (model(x, position_ids=torch.arange(5, 15)[None]) - model(x)).abs().max()
    assert moved < 1e-5 if config.positions == "rope" else moved > 1e-3  # rotation sees distances only


def test_learned_positions_end() -> None:
    model = CausalLM(GPT2)
    with pytest.raises(InputError, match=r"does not fit the model[\s\S]*65 tokens[\s\S]*at most 64"):
        model(ids(1, 65))
    cache = KVCache(GPT2, capacity=100)
    with torch.no_grad():
        model(ids(1, 60), cache=cache)
    with pytest.raises(InputError, match="65 tokens"):
        model(ids(1, 5), cache=cache)
    assert CausalLM(LLAMA)(ids(1, 70)).shape == (1, 70, 300)


def test_rope_by_complex_numbers() -> None:
    """Rotation is multiplication by exp(i * position * frequency)."""
    c = dataclasses.replace(LLAMA, head_dim=12, rotary=Rotary(theta=100.0))
    x, positions = torch.randn(2, 3, 5, 12), torch.tensor([[0, 1, 2, 3, 4], [7, 9, 50, 51, 0]])
    frequencies = torch.tensor([100.0 ** (-2 * i / 12) for i in range(6)])
    turn = torch.polar(torch.ones(2, 1, 5, 6), positions[:, None, :, None] * frequencies)
    expected = torch.complex(x[..., :6], x[..., 6:]) * turn
    found = rotate(x, *rope_at(rope_frequencies(c), positions))
    assert torch.allclose(found, torch.cat((expected.real, expected.imag), -1), atol=1e-5)
    cos, sin = rope_table(c, 60)
    assert torch.allclose(torch.complex(cos, sin)[positions][:, None], turn, atol=1e-5)


def test_stretch_keeps_fast_waves_and_slows_long_ones() -> None:
    s = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=100)
    turns = torch.tensor([10.0, 4.0, 2.5, 1.0, 0.1])  # within 100 tokens
    waves = turns * 2 * math.pi / 100
    expected = torch.tensor([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8])
    assert torch.allclose(stretch(waves, s) / waves, expected, atol=1e-6)


def test_rope_keeps_its_precision_in_bfloat16() -> None:
    model = CausalLM(LLAMA)
    before = model.transformer.frequencies
    model.to(torch.bfloat16)
    assert model.transformer.frequencies == before == tuple(rope_frequencies(LLAMA).tolist())
    assert model(ids(1, 8)).dtype == torch.bfloat16


def test_config_is_small_and_torch_free() -> None:
    beside = set(
        "model_type dropout initializer_range bos_token_id eos_token_id pad_token_id labels problem_type source".split()
    )
    assert len({field.name for field in dataclasses.fields(Config)} - beside) <= 32
    assert set(HEAD_ACTS) == set(ACTIVATIONS)
    code = "import lmworks.models.families, lmworks.models.hf_config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_never_asks_for_a_name() -> None:
    """A family is data: nothing but its own file, and the one that picks it, reads model_type."""
    from pathlib import Path

    import lmworks.models

    folder = Path(lmworks.models.__file__).parent
    for path in folder.glob("*.py"):
        if path.name not in ("checkpoint.py", "config.py"):
            assert "model_type" not in path.read_text(), path.name
        assert not any(f'"{name}"' in path.read_text() for name in FAMILIES), path.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "a divisor of 4"),
        ({"dropout": 1.0}, "below 1"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"hidden_act": "elu"}, "hidden_act"),
        ({"positions": "rope", "head_dim": 3}, "head_dim"),
    ],
)
def test_impossible_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GPT2, **changes)


def test_impossible_gpt2() -> None:
    """transformers could not read it."""
    with pytest.raises(InputError, match=r"hidden_size[\s\S]*a multiple of 4 heads"):
        gpt2.new(hidden_size=30, num_attention_heads=4, vocab_size=9, num_hidden_layers=1, max_position_embeddings=8)


def test_new_llama_is_as_wide_as_it_says() -> None:
    assert (
        llama.new(
            hidden_size=256, num_attention_heads=4, vocab_size=9, num_hidden_layers=1, max_position_embeddings=8
        ).intermediate_size
        == 704
    )  # 682.67, rounded up to a multiple of 32
