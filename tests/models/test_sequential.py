"""RNN, LSTM, GRU and the feed-forward model against their formulas in NumPy and against torch.nn, and their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.export.onnx import export_onnx
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.families.sequential import SEQUENTIAL
from lmworks.models.heads import CausalLM
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.torch_runtime import TorchRuntime

KINDS = ["rnn", "lstm", "gru", "feedforward"]
V, D, E, WINDOW = 30, 12, 7, 4
Array = NDArray[np.float64]


def make(kind: str, *, layers: int = 2, tie: bool = False) -> CausalLM:
    """Return a small network with weights away from where they began."""
    window = {"window": WINDOW} if kind == "feedforward" else {}
    config = SEQUENTIAL[f"lmworks-{kind}"].new(
        vocab_size=V, hidden_size=D, embedding_size=D if tie else E, num_hidden_layers=layers,
        max_position_embeddings=64, eos_token_id=0, tie_word_embeddings=tie, **window,
    )  # fmt: skip
    model = CausalLM(config, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, V, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def by_hand(model: CausalLM, tokens: list[int]) -> Array:
    """Return logits (T, V) in float64, one token and one gate at a time."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    kind, layers = model.config.block, model.config.num_hidden_layers
    vectors = w["transformer.embeddings.tokens.weight"][tokens]  # (T, E)
    if kind == "feedforward":
        padded = np.concatenate([np.zeros((WINDOW - 1, vectors.shape[1])), vectors])
        x = np.stack([padded[t : t + WINDOW].ravel() for t in range(len(tokens))])
        for i in range(layers):
            place = f"transformer.layers.{i}.linear"
            x = np.tanh(x @ w[f"{place}.weight"].T + w[f"{place}.bias"])
        return np.asarray(x @ w["head.project.weight"].T)
    x = vectors
    for i in range(layers):
        place = f"transformer.layers.{i}.cell"
        h, c, out = np.zeros(D), np.zeros(D), []
        for e in x:
            a = w[f"{place}.weight_ih_l0"] @ e + w[f"{place}.bias_ih_l0"]
            b = w[f"{place}.weight_hh_l0"] @ h + w[f"{place}.bias_hh_l0"]
            if kind == "rnn":
                h = np.tanh(a + b)
            elif kind == "lstm":
                i_, f, g, o = np.split(a + b, 4)
                c = sigmoid(f) * c + sigmoid(i_) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            else:
                (ar, az, an), (br, bz, bn) = np.split(a, 3), np.split(b, 3)
                z, n = sigmoid(az + bz), np.tanh(an + sigmoid(ar + br) * bn)
                h = (1 - z) * n + z * h
            out.append(h)
        x = np.stack(out)
    return np.asarray(x @ w["head.project.weight"].T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas(kind: str) -> None:
    model, row = make(kind), ids(1, 9)
    found = model(row)[0].detach().numpy()
    np.testing.assert_allclose(found, by_hand(model, row[0].tolist()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "theirs"), [("rnn", torch.nn.RNN), ("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_a_stack_is_torchs_own(kind: str, theirs: Any) -> None:
    model, rows = make(kind), ids(3, 8)
    stack = theirs(E, D, num_layers=2, batch_first=True)
    stack.load_state_dict({
        name.replace("l0", f"l{i}"): p
        for i, layer in enumerate(model.transformer.layers) for name, p in layer.cell.state_dict().items()  # type: ignore[union-attr,operator]
    })  # fmt: skip
    expected, _ = stack(model.transformer.embeddings.tokens(rows))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(model.hidden_states(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_states_go_on(kind: str) -> None:
    model = make(kind)
    rows, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, 6:] = 0, 0
    whole = model(rows, mask)
    torch.testing.assert_close(whole[1, 4:], model(rows[1:2, 4:])[0])
    torch.testing.assert_close(whole[2, :6], model(rows[2:, :6])[0])
    runtime = TorchRuntime(model, slots=3)
    expected = model(rows).detach().numpy()
    first = runtime.prefill([2, 0, 1], [rows[0].tolist(), rows[1, :5].tolist(), rows[2, :2].tolist()])
    np.testing.assert_allclose(first, expected[[0, 1, 2], [8, 4, 1]], rtol=1e-5, atol=1e-6)
    for t in (5, 6):
        found = runtime.step([1, 0], [int(rows[2, t - 3]), int(rows[1, t])])
        np.testing.assert_allclose(found, expected[[2, 1], [t - 3, t]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(runtime.prefill([0], [rows[2, :3].tolist()])[0], expected[2, 2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(runtime.extend(0, rows[2, 3:6].tolist(), at=3), expected[2, 5], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="cannot go back"):
        runtime.extend(0, [1], at=2)
    np.testing.assert_allclose(runtime.extend(0, rows[2, :4].tolist(), at=0), expected[2, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_its_graph(kind: str, tmp_path: Path) -> None:
    for layers, tie in ((2, False), (1, True)):
        model, folder = make(kind, layers=layers, tie=tie), tmp_path / f"{layers}"
        save_model(model, folder)
        again = load_model(folder)
        assert again.config == model.config
        rows = ids(3, 9)
        assert torch.equal(again(rows), model(rows))
        export_onnx(model, folder, dtypes=["fp32", "int8"])
        mask = np.ones((3, 9), np.int64)
        mask[1, :4], mask[2, 6:] = 0, 0
        runtimes = [TorchRuntime(model, slots=3), OnnxRuntime(folder, slots=3), OnnxRuntime(folder, dtype="int8")]
        theirs, ours, rounded = (r.run({"input_ids": rows.numpy(), "attention_mask": mask})["logits"] for r in runtimes)
        np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)
        assert np.abs(rounded - theirs)[mask == 1].max() < 0.5
        prompts = [rows[0].tolist(), rows[1, :5].tolist(), rows[2, :2].tolist()]
        np.testing.assert_allclose(*(r.prefill([0, 2, 1], prompts) for r in runtimes[:2]), atol=1e-5)
        for step in range(3):
            np.testing.assert_allclose(*(r.step([1, 0], [step, 9]) for r in runtimes[:2]), atol=1e-5)
        np.testing.assert_allclose(*(r.extend(2, [4, 5], at=5) for r in runtimes[:2]), atol=1e-5)
        with pytest.raises(InputError, match="cannot go back"):
            runtimes[1].extend(2, [4, 5], at=3)
    with pytest.raises(InputError, match="cannot be had so"):
        export_onnx(model, tmp_path / "x", dtypes=["fp16"])


def test_gates_and_vectors_begin_where_they_should() -> None:
    config = SEQUENTIAL["lmworks-lstm"].new(
        vocab_size=400, hidden_size=64, embedding_size=50, num_hidden_layers=1, max_position_embeddings=64
    )
    state = CausalLM(config, seed=0).state_dict()
    assert state["transformer.layers.0.cell.bias_ih_l0"].split(64)[1].tolist() == [1.0] * 64
    assert state["transformer.layers.0.cell.bias_hh_l0"].abs().max() == 0
    assert 0.95 < state["transformer.embeddings.tokens.weight"].std() < 1.05
    for name, inputs in {"transformer.layers.0.cell.weight_ih_l0": 50, "transformer.layers.0.cell.weight_hh_l0": 64,
                         "head.project.weight": 64}.items():  # fmt: skip
        assert state[name].std() == pytest.approx(inputs**-0.5, rel=0.05), name
