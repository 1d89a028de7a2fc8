"""Which matrices a graph keeps, and how four bits are rounded for what they multiply: by NumPy, ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from lmworks.compress.calibrate import distance, say
from lmworks.compress.precision import LARGEST, choose_precision, emulate, find_moments, find_units, place
from lmworks.compress.quantize import find_linears
from lmworks.compress.rounding import BLOCK, quantize_blocks, quantize_bytes, restore_blocks
from lmworks.export.onnx import make_onnx
from lmworks.models.families import find_family, find_head
from lmworks.models.heads import Model

RANDOM = np.random.default_rng(3)


def make(causal: bool = False) -> Model:
    """A perturbed small model with a head of three labels, that looks both ways or back."""
    width = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    hf = {"model_type": "bert", "vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3, **width}
    if causal:
        hf = {"model_type": "gpt2", "vocab_size": 60, "n_positions": 40, "n_embd": 64, "n_head": 4, "n_layer": 2}
    config = find_family(hf["model_type"]).config({**hf, "num_labels": 3, "pad_token_id": 0})
    kind = "SequenceClassification"
    model = Model(config, kind, find_head(config, kind), seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def rows(count: int = 6) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(5)
    return [{"input_ids": random.integers(0, 60, (1, 10 + i))} for i in range(count)]


def correlated(inputs: int, count: int = 4000) -> np.ndarray:
    """Inputs that a few directions explain, as a network's are: (n, I)."""
    low = RANDOM.normal(size=(count, 12)) @ RANDOM.normal(size=(12, inputs))
    return (low + 0.1 * RANDOM.normal(size=(count, inputs))).astype(np.float32)


@pytest.mark.parametrize("inputs", [64, 50])
def test_rounding_for_the_inputs_halves_the_error_on_inputs_that_it_has_not_seen(inputs: int) -> None:
    """The plain rounding is nearer to the matrix, this one to the product; a block that is not full included."""
    w, x = RANDOM.normal(size=(24, inputs)).astype(np.float32), correlated(inputs)
    moments = x[:2000].T @ x[:2000] / 2000
    plain = restore_blocks(*quantize_blocks(w), inputs)
    found = restore_blocks(*quantize_blocks(w, moments), inputs)
    assert found.shape == w.shape and np.square(plain - w).sum() < np.square(found - w).sum()
    wrong = [float(np.square(x[2000:] @ (known - w).T).sum()) for known in (plain, found)]
    assert wrong[1] < 0.5 * wrong[0]
    assert len(np.unique(quantize_blocks(w, moments)[0] & 15)) <= 16


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_plainly() -> None:
    """With H = I no input can make up for another: the numbers are the nearest ones."""
    w = RANDOM.normal(size=(8, 2 * BLOCK)).astype(np.float32)
    for one, two in zip(quantize_blocks(w), quantize_blocks(w, np.eye(2 * BLOCK, dtype=np.float32)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_moments_are_the_mean_of_what_a_layer_reads() -> None:
    model, batches, seen = make(), rows(), []
    layer = model.transformer.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].detach()))
    moments = find_moments(model, find_units(model), batches)
    hook.remove()
    x = torch.cat(seen).numpy()
    np.testing.assert_allclose(moments["layers.1.mlp.down_proj"], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert moments["layers.0.attention.k_proj"] is moments["layers.0.attention.q_proj"]
    assert set(moments) == set(find_units(model))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "q4"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_graph_computes_what_the_choice_was_made_by(dtype: str, causal: bool) -> None:
    """ONNX Runtime beside torch with emulated layers: a part of what the rounding does itself; some matrix is kept.

    The embedding is one that 8 bits hold already, so that only the matrices are rounded.
    """
    model, batches = make(causal), rows()
    table = model.transformer.embeddings.tokens.weight.data
    whole, scale = quantize_bytes(table.numpy(), axis=1, largest=LARGEST.get(dtype, 63))
    table.copy_(torch.from_numpy(whole * scale))
    chosen = choose_precision(model, batches, dtype, limit=0.0, share=0.3)
    assert chosen.kept and len(chosen.kept) < len(find_units(model)) == (8 if causal else 12)
    assert all(type(linear) is torch.nn.Linear for linear in find_linears(model, head=False).values())
    session = onnxruntime.InferenceSession(make_onnx(model, dtype=dtype, precision=chosen))
    names = [item.name for item in session.get_inputs()]
    exact = torch.cat(say(model, batches)).numpy()
    for name, part in find_units(model).items():
        place(model, emulate(part, "exact" if name in chosen.kept else dtype, chosen.moments.get(name)))
    known = torch.cat(say(model, batches)).numpy()
    given = []
    for batch in batches:
        ids = batch["input_ids"]
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        given.append(session.run(["logits"], {name: feeds[name] for name in names})[0])
    error, moved = np.square(np.concatenate(given) - known).mean(), np.square(exact - known).mean()
    assert error < 0.1 * moved, f"{error:.2e} beside {moved:.2e}"


def test_the_matrices_that_mind_most_for_their_size_are_kept_until_the_limit_holds() -> None:
    """One input of each block with weights ten times the others spoils a matrix in 4 bits."""
    model, batches = make(), rows()
    with torch.no_grad():
        model.get_submodule("transformer.layers.1.attention.v_proj").weight[:, ::32] *= 10
    worst = choose_precision(model, batches, "q4", limit=0.0, share=1.0)
    assert max(worst.sensitivity, key=worst.sensitivity.__getitem__) == worst.kept[0] == "layers.1.attention.v_proj"
    limit = worst.sensitivity["layers.1.attention.v_proj"] / 2
    some = choose_precision(model, batches, "q4", limit=limit, share=1.0)
    assert some.divergence is not None and some.divergence <= limit and 1 <= len(some.kept) < len(worst.kept)
    assert choose_precision(model, batches, "q4", limit=1e9).kept == ()
    known = say(model, batches)
    assert distance(model, known, say(model, batches)) == pytest.approx(0, abs=1e-9)  # given back as it was
