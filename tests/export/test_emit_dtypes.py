"""Every dtype: what is stored is what the kernels multiply by, and only the weights are smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_emit import LENGTHS, WIDTH, batches, expected, make_model, open_graph, real, run, sizes  # noqa: F401
from torch import nn

from lmworks.base.errors import InputError
from lmworks.compress.rounding import BLOCK, BNB_BLOCK, NF4, quantize_blocks, quantize_nf4
from lmworks.export.arithmetic import ARITHMETIC, MIDDLE, quantize
from lmworks.export.emit import make_graph
from lmworks.export.graph import Graph
from lmworks.export.onnx import check_dtypes
from lmworks.models.heads import Model
from lmworks.runtime.onnx_runtime import FILES

RANDOM = np.random.default_rng(0)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the two numbers of each byte side by side, low first."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def restore_blocks(weight: np.ndarray) -> np.ndarray:
    """Return what (O, I) is after q4."""
    packed, scale, zeros = quantize_blocks(weight)
    zero = unpack(zeros)[:, : scale.shape[1]]
    floats = (unpack(packed).astype(np.float32) - zero[..., None]) * scale[..., None]
    return floats.reshape(len(weight), -1)[:, : weight.shape[1]]


def restore_nf4(weight: np.ndarray) -> np.ndarray:
    """Return what (O, I) is after bnb4."""
    packed, largest = quantize_nf4(weight)
    places = np.stack((packed >> 4, packed & 15), -1).ravel()[: weight.size]
    return (NF4[places] * largest.repeat(BNB_BLOCK)[: weight.size]).reshape(weight.shape)


def restore_bytes(weight: np.ndarray, *, axis: int, dtype: str) -> np.ndarray:
    """Return what a matrix is after int8 or uint8."""
    whole, scale = quantize(weight, axis=axis, **({"largest": MIDDLE - 1} if dtype == "uint8" else {}))
    return whole * scale


def restored(model: Model, dtype: str) -> Model:
    """Put the numbers that a dtype stores into the torch model itself; heads of few labels stay."""
    tied = model.is_tied
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module) not in (nn.Linear, nn.Embedding) or "positions" in name or "types" in name:
                continue
            if name.startswith("head.") and model.spec.outputs != "vocab":
                continue
            if name == "head.project" and tied:
                continue
            weight = module.weight.numpy()
            byte = "int8" if dtype in ("q4", "bnb4") else dtype
            if type(module) is nn.Embedding and not (tied and dtype == "q4"):
                new = restore_bytes(weight, axis=1, dtype=byte)
            elif dtype in ("q4", "bnb4"):
                new = restore_blocks(weight) if dtype == "q4" else restore_nf4(weight)
            else:
                new = restore_bytes(weight, axis=1, dtype=dtype)
            module.weight.copy_(torch.from_numpy(np.ascontiguousarray(new, np.float32)))
    return model


@pytest.mark.parametrize("cell", [("bert", "SequenceClassification"), ("gpt2", "CausalLM"), ("llama", "CausalLM"),
                                  ("bert", "MaskedLM"), ("albert groups", "MaskedLM")],
                         ids=lambda cell: f"{cell[0]}-{cell[1]}")  # fmt: skip
@pytest.mark.parametrize(("dtype", "close"), [("int8", 0.05), ("uint8", 0.05), ("q4", 0.05), ("bnb4", 1e-4)])
def test_the_stored_numbers_are_those_that_the_kernel_uses(cell, dtype, close):
    """Torch with the restored weights: bnb4 is exact; the others quantize the activations too, a small difference.

    A tied embedding in bnb4 is multiplied in 8 bits, so there it is close as well.
    """
    session = open_graph(make_graph(make_model(*cell), dtype=dtype).to_bytes())
    model = restored(make_model(*cell), dtype)
    close = 0.05 if dtype == "bnb4" and model.is_tied else close
    *_, batch = batches(model)
    known, given = real(expected(model, batch), batch), real(run(session, batch), batch)
    error = np.sqrt(np.square(given - known).mean()) / known.std()
    plain = real(expected(make_model(*cell), batch), batch)
    assert error < close
    assert np.sqrt(np.square(plain - known).mean()) / known.std() > (0.05 if "4" in dtype else 1e-3), "cut weights"


@pytest.mark.parametrize("dtype", ["fp16", "q4f16"])
@pytest.mark.parametrize("cell", [("bert", "QuestionAnswering"), ("modernbert", "TokenClassification"),
                                  ("gpt2", "CausalLM"), ("mistral", "CausalLM"), ("vit", "ImageClassification"),
                                  ("deberta-v2 conv", "TokenClassification"), ("albert", "MaskedLM"),
                                  ("qwen3", "CausalLM"), ("phi3 long", "CausalLM")],
                         ids=lambda cell: f"{cell[0]}-{cell[1]}")  # fmt: skip
def test_half_graphs_compute_in_float16_and_answer_in_float32(cell, dtype):
    graph = make_graph(make_model(*cell), dtype=dtype)
    session = open_graph(graph.to_bytes())
    other = open_graph(make_graph(make_model(*cell), dtype={"fp16": "fp32", "q4f16": "q4"}[dtype]).to_bytes())
    for batch in batches(make_model(*cell)):
        given, known = real(run(session, batch), batch), real(run(other, batch), batch)
        assert np.isfinite(given).all()
        assert np.sqrt(np.square(given - known).mean()) / known.std() < 0.03
    assert not any(array.dtype == np.float32 for array in graph.weights.values())
    for item in (*session.get_inputs(), *session.get_outputs()):
        half = item.name.startswith(("past_key_values.", "present."))
        assert ("float16" in item.type) == half, "transformers.js makes caches of the type that the graph declares"


def test_a_weight_beyond_float16_is_an_error():
    model = make_model("bert", "SequenceClassification")
    with torch.no_grad():
        model.transformer.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(InputError, match="float16") as caught:
        make_graph(model, dtype="fp16")
    assert "up_proj" in caught.value.where


@pytest.mark.parametrize("shape", [(7, 64), (5, 50), (3, 33)])
def test_blocks_keep_zero_and_lose_little(shape):
    weight = RANDOM.normal(0, 1, shape).astype(np.float32)
    weight[0, :40], weight[1, 3] = 0, 20
    found = restore_blocks(weight)
    assert (found[0, :32] == 0).all()
    error = np.square(found[2:] - weight[2:]).mean()
    full = (weight[2:].max() - weight[2:].min()) / 15
    assert error < full**2 / 12
    assert BLOCK == 32


def test_nf4_takes_the_nearest_of_its_numbers():
    weight = RANDOM.normal(0, 1, (4, 96)).astype(np.float32)
    found = restore_nf4(weight)
    largest = np.abs(weight).reshape(-1, 64).max(-1).repeat(64).reshape(weight.shape)
    nearest = np.abs((weight / largest)[..., None] - NF4).min(-1) * largest
    np.testing.assert_allclose(np.abs(found - weight), nearest, atol=1e-5)


def test_uint8_uses_all_its_bits():
    graph = make_graph(make_model("bert", "SequenceClassification"), dtype="uint8")
    stored = [array for array in graph.weights.values() if array.dtype == np.uint8 and array.ndim == 2]
    assert len(stored) == 4 * 6 + 1
    assert min(array.min() for array in stored) == 1
    assert max(array.max() for array in stored) == 255


def test_sizes_go_down():
    model = make_model("llama", "CausalLM")
    size = {dtype: len(make_graph(model, dtype=dtype).to_bytes()) for dtype in ARITHMETIC}
    assert size["fp16"] < 0.52 * size["fp32"]
    assert size["int8"] < 0.45 * size["fp32"]
    assert size["q4f16"] < size["q4"] < 0.33 * size["fp32"]
    assert set(FILES) == set(ARITHMETIC)


def test_dtypes_are_checked_and_q8_is_int8():
    assert check_dtypes(["q8", "fp32", "int8"]) == ["int8", "fp32"]
    for wrong in (["q5"], []):
        with pytest.raises(InputError, match="dtype"):
            check_dtypes(wrong)


def test_weights_beside_the_graph_say_where_they_are(tmp_path: Path):
    graph = Graph()
    x = graph.input("x", np.float32, ["n", 600])
    y = graph.output("y", np.float32, ["n", 600])
    graph.add("Add", [x, graph.weight("b", np.arange(600, dtype=np.float32))], name="add", outputs=[y])
    files = graph.to_files("model_q4.onnx", external=True)
    assert list(files) == ["model_q4.onnx", "model_q4.onnx_data"]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    onnx.checker.check_model(tmp_path / "model_q4.onnx")
    found = onnx.load(tmp_path / "model_q4.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(found.graph.initializer[0]), np.arange(600))
    assert LENGTHS[0] == WIDTH
