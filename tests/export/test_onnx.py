"""Our graphs against our torch modules and against transformers: logits, greedy tokens, padding, the cache, int8."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import POSITIONS, VARIANTS, VOCAB, save_reference
from torch import nn

from lmworks.base.errors import InputError
from lmworks.export import graph as graph_module
from lmworks.export.arithmetic import quantize
from lmworks.export.onnx import export_onnx, make_onnx
from lmworks.models.checkpoint import load_model
from lmworks.models.config import Config
from lmworks.models.heads import CausalLM

INT8_TOLERANCE = 0.15  # root mean square error of the logits, in their standard deviations, for random weights


class Case:
    """A tiny model in all its forms."""

    def __init__(self, variant: str, folder: Path) -> None:
        self.variant, self.folder = variant, folder
        self.reference = save_reference(variant, folder)
        self.model = load_model(folder)
        self.paths = export_onnx(folder, folder)
        self.sessions = {dtype: open_strictly(path) for dtype, path in self.paths.items()}

    def run(self, dtype: str, ids: np.ndarray, mask: np.ndarray | None = None, **more) -> dict[str, np.ndarray]:
        """Feed the graph as transformers.js does; past_key_values and num_logits_to_keep may be given."""
        session = self.sessions[dtype]
        mask = np.ones_like(ids) if mask is None else mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "num_logits_to_keep": np.array(0), "position_ids": positions}
        for item in session.get_inputs():
            if item.name.startswith("past"):
                _, heads, _, size = item.shape
                feed[item.name] = np.zeros((len(ids), heads, 0, size), np.float32)
        feed.update(more)
        names = {item.name for item in session.get_inputs()}
        values = session.run(None, {name: value for name, value in feed.items() if name in names})
        return dict(zip((item.name for item in session.get_outputs()), values, strict=True))


def open_strictly(path: Path | bytes) -> onnxruntime.InferenceSession:
    """Open a graph; anything that the runtime would warn about is logged, and the test looks for it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def past_of(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn presents into pasts."""
    return {n.replace("present", "past_key_values"): value for n, value in outputs.items() if n.startswith("present")}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Case:
    return Case("gpt2", tmp_path_factory.mktemp("gpt2"))


IDS = np.random.default_rng(0).integers(0, VOCAB, (3, 60))


def test_logits_equal_torch_and_transformers(case):
    """C1: an own exporter, against both our modules and transformers."""
    logits = case.run("fp32", IDS)["logits"]
    with torch.no_grad():
        ours = case.model(torch.from_numpy(IDS)).numpy()
        theirs = case.reference(torch.from_numpy(IDS)).logits.numpy()
    assert logits.shape == (3, 60, VOCAB)
    assert theirs.std() > 0.3, "the comparison would mean little"
    np.testing.assert_allclose(logits, ours, atol=1e-4)
    np.testing.assert_allclose(logits, theirs, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("gated", [True, False])
def test_every_combination_of_parts_equals_torch(norm, positions, gated):
    """Networks that no published family has yet: the emitters must not know families."""
    config = Config(
        model_type="any", vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, intermediate_size=40, max_position_embeddings=64, norm=norm,
        gated=gated, positions=positions, hidden_act="gelu" if gated else "silu", tie_word_embeddings=False,
    )  # fmt: skip
    model = CausalLM(config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        expected = model(torch.from_numpy(IDS)).numpy()
    case = Case.__new__(Case)
    case.sessions = {"fp32": open_strictly(make_onnx(model))}
    np.testing.assert_allclose(case.run("fp32", IDS)["logits"], expected, atol=1e-4)


def test_greedy_tokens_equal_transformers(case):
    prompt = torch.from_numpy(IDS[:1, :9])
    theirs = case.reference.generate(prompt, max_new_tokens=32, do_sample=False)[0, 9:].tolist()
    tokens, past, ids = [], {}, IDS[:1, :9]
    for step in range(32):
        out = case.run("fp32", ids, np.ones((1, 9 + step), np.int64), num_logits_to_keep=np.array(1), **past)
        past = past_of(out)
        tokens.append(int(out["logits"][0, -1].argmax()))
        ids = np.array([[tokens[-1]]])
    assert tokens == theirs


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_left_padding_changes_nothing(case, dtype):
    """Rows of 40, 23 and 1 tokens in one batch, then three steps with the cache, equal each row alone."""
    if dtype == "int8":  # its activation scales are those of the whole batch: only close
        tolerance = 4 * INT8_TOLERANCE
    else:
        tolerance = 1e-4
    lengths, width = (40, 23, 1), 40
    ids, mask = np.full((3, width), 7), np.zeros((3, width), np.int64)
    for row, n in enumerate(lengths):
        ids[row, width - n :], mask[row, width - n :] = IDS[row, :n], 1
    out = case.run(dtype, ids, mask)
    for row, n in enumerate(lengths):
        alone = case.run(dtype, IDS[row : row + 1, :n])["logits"][0]
        np.testing.assert_allclose(out["logits"][row, width - n :], alone, atol=tolerance)
    for step in range(3):
        new = np.stack([IDS[row, n + step : n + step + 1] for row, n in enumerate(lengths)])
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
        out = case.run(dtype, new, mask, **past_of(out))
        for row, n in enumerate(lengths):
            alone = case.run(dtype, IDS[row : row + 1, : n + step + 1])["logits"][0, -1]
            np.testing.assert_allclose(out["logits"][row, -1], alone, atol=tolerance)


def test_right_padding_changes_nothing(case):
    lengths, width = (40, 23, 1), 40
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    logits = case.run("fp32", np.where(mask == 1, IDS[:, :width], 7), mask)["logits"]
    for row, n in enumerate(lengths):
        alone = case.run("fp32", IDS[row : row + 1, :n])["logits"][0]
        np.testing.assert_allclose(logits[row, :n], alone, atol=1e-4)


def test_a_row_of_padding_alone_does_not_disturb_the_others(case):
    mask = np.stack([np.ones(20, np.int64), np.zeros(20, np.int64)])
    logits = case.run("fp32", IDS[:2, :20], mask)["logits"]
    np.testing.assert_allclose(logits[0], case.run("fp32", IDS[:1, :20])["logits"][0], atol=1e-4)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_num_logits_to_keep(case, dtype, keep):
    full = case.run(dtype, IDS)["logits"]
    kept = case.run(dtype, IDS, num_logits_to_keep=np.array(keep))["logits"]
    assert kept.shape == (3, keep or 60, VOCAB)
    # the projection quantizes only what it is given, so int8 may choose another scale
    np.testing.assert_allclose(kept, full[:, -keep:], atol=1e-5 if dtype == "fp32" else INT8_TOLERANCE)


def test_chunked_prefill_equals_one_go(case):
    whole = case.run("fp32", IDS[:1])
    past, parts = {}, []
    for start, end in ((0, 7), (7, 8), (8, 40), (40, 60)):
        out = case.run("fp32", IDS[:1, start:end], np.ones((1, end), np.int64), **past)
        past = past_of(out)
        parts.append(out["logits"])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole["logits"], atol=1e-4)
    for name, value in past_of(whole).items():
        np.testing.assert_allclose(past[name], value, atol=1e-4)


def test_int8_is_close(case):
    logits, exact = case.run("int8", IDS)["logits"], case.run("fp32", IDS)["logits"]
    error = np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    assert 1e-4 < error < INT8_TOLERANCE
    assert (logits.argmax(-1) == exact.argmax(-1)).mean() > 0.75


def test_a_changed_weight_is_noticed(gpt2):
    """Moving one number of any initializer moves the logits well beyond the tolerance of the tests above."""
    exact = gpt2.run("fp32", IDS)["logits"]
    model = onnx.load(gpt2.paths["fp32"])
    for i, tensor in enumerate(model.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.dtype != np.float32 or values.size < 2:
            continue
        place = (IDS[0, 0], 0) if "tokens" in tensor.name else (0,) * values.ndim
        values[place] += 0.5
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        changed = Case.__new__(Case)
        changed.sessions = {"fp32": open_strictly(model.SerializeToString())}
        assert np.abs(changed.run("fp32", IDS)["logits"] - exact).max() > 1e-3, tensor.name
        model.graph.initializer[i].CopyFrom(onnx.load(gpt2.paths["fp32"]).graph.initializer[i])


def test_names_and_shapes_are_those_of_transformers_js(case):
    """C10: file names and layout are read by transformers.js exactly so."""
    assert [path.name for path in case.paths.values()] == ["model.onnx", "model_quantized.onnx"]
    config = case.model.config
    heads, size, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    for session in case.sessions.values():
        inputs = {item.name: (item.type, item.shape) for item in session.get_inputs()}
        outputs = {item.name: (item.type, item.shape) for item in session.get_outputs()}
        expected = {
            "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
            "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
            "num_logits_to_keep": ("tensor(int64)", []),
        }
        if config.positions == "learned":
            expected["position_ids"] = ("tensor(int64)", ["batch_size", "sequence_length"])
        made = {"logits": ("tensor(float)", ["batch_size", "num_logits", VOCAB])}
        for i in range(layers):
            for kind in ("key", "value"):
                shape = ["batch_size", heads, "past_sequence_length", size]
                expected[f"past_key_values.{i}.{kind}"] = ("tensor(float)", shape)
                shape = ["batch_size", heads, "total_sequence_length", size]
                made[f"present.{i}.{kind}"] = ("tensor(float)", shape)
        assert inputs == expected
        assert outputs == made
        assert next(iter(outputs)) == "logits"


def test_the_checker_passes_and_nothing_is_left_over(case):
    for path in case.paths.values():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        assert {tensor.name for tensor in model.graph.initializer} <= read
        assert all(any(name in read for name in node.output) for node in model.graph.node)


def test_the_runtime_loads_it_without_a_warning(case, capfd):
    for path in case.paths.values():
        session = open_strictly(path)
        case.sessions = {**case.sessions, "again": session}
        case.run("again", IDS[:1, :4])
    assert capfd.readouterr().err == ""


def test_the_graph_is_the_fused_one(case):
    kinds = [node.op_type for node in onnx.load(case.paths["fp32"]).graph.node]
    layers = case.model.config.num_hidden_layers
    assert kinds.count("GroupQueryAttention") == layers
    products = 5 if case.model.config.gated else 4  # qkv, o, (gate,) up, down
    assert kinds.count("MatMul") == products * layers + 1
    rms = case.model.config.norm == "rms"
    assert kinds.count("SkipSimplifiedLayerNormalization" if rms else "LayerNormalization") >= 2 * layers
    assert "SkipLayerNormalization" not in kinds, "processors take three to four times as long for it"
    int8 = [node.op_type for node in onnx.load(case.paths["int8"]).graph.node]
    assert int8.count("MatMulInteger") == products * layers + 1
    assert int8.count("DynamicQuantizeLinear") == 4 * layers + 1, "an activation is quantized once for all its readers"
    assert "MatMul" not in int8


def test_tied_weights_are_stored_once(case):
    floats = sum(p.numel() for p in case.model.parameters())  # a shared parameter counts once
    rope = POSITIONS * case.model.config.head_dim if case.model.config.positions == "rope" else 0
    fp32, int8 = (path.stat().st_size for path in case.paths.values())
    assert fp32 == pytest.approx(4 * (floats + rope), abs=20_000)
    assert int8 < 0.45 * fp32


def test_the_same_model_gives_the_same_bytes(gpt2, tmp_path):
    again = export_onnx(load_model(gpt2.folder), tmp_path)
    for dtype, path in gpt2.paths.items():
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again[dtype].read_bytes()).digest()


def test_int8_weights_use_seven_bits_and_are_symmetric_per_output():
    """C18: a processor without VNNI adds two byte products in 16 bits; 7-bit weights cannot overflow there."""
    weight = np.random.default_rng(0).normal(0, 1, (64, 40)).astype(np.float32)
    weight[:, 3], weight[:, 4] = 0, weight[:, 4] * 1000
    whole, scale = quantize(weight, axis=0)
    assert whole.dtype == np.int8
    assert np.abs(whole).max(0)[:3].tolist() == [63, 63, 63]
    assert 255 * int(np.abs(whole).max()) * 2 < 2**15
    assert (np.abs(whole * scale - weight) <= scale / 2 * 1.001).all()
    assert not (whole * scale)[:, 3].any()


def test_nothing_is_written_when_it_fails(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="too large") as caught:
        export_onnx(gpt2.model, tmp_path, external=False)
    assert "2 GB" in caught.value.expected
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_large_model_has_its_weights_beside_it_in_several_files(gpt2, tmp_path, monkeypatch):
    """C13: above 2 GB a file cannot be read everywhere; the limit is lowered here, the graph is the same."""
    monkeypatch.setattr(graph_module, "MAX_BYTES", 200_000)
    path = export_onnx(gpt2.model, tmp_path, dtypes=["fp32"])["fp32"]
    names = sorted(file.name for file in path.parent.iterdir())
    assert names[:3] == ["model.onnx", "model.onnx_data", "model.onnx_data_1"]
    assert path.stat().st_size < 50_000
    assert sum(file.stat().st_size for file in path.parent.iterdir()) > gpt2.paths["fp32"].stat().st_size
    gpt2.sessions["beside"] = open_strictly(path)
    np.testing.assert_array_equal(gpt2.run("beside", IDS)["logits"], gpt2.run("fp32", IDS)["logits"])
    (path.parent / "model.onnx_data_1").unlink()
    with pytest.raises(Exception, match=r"model\.onnx_data_1"):
        open_strictly(path)


class Wrapped(nn.Linear):
    """As LoRA or a pruned layer would wrap one."""


def test_an_unknown_module_is_named(gpt2):
    """C2: an adapter that is still there is an error, never dropped in silence."""
    model = load_model(gpt2.folder)
    model.transformer.layers[1].attention.k_proj = Wrapped(64, 64)
    with pytest.raises(InputError, match="Wrapped") as caught:
        make_onnx(model)
    assert caught.value.where == "layers.1.attention"
    model = load_model(gpt2.folder)
    model.transformer.layers[2] = nn.Sequential()
    with pytest.raises(InputError, match="Sequential") as caught:
        make_onnx(model)
    assert caught.value.where == "layers.2"
    assert "PreNormBlock" in caught.value.expected


def test_a_weight_without_a_reader_is_named(gpt2):
    model = load_model(gpt2.folder)
    model.transformer.layers[0].attention.extra = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError) as caught:
        make_onnx(model)
    assert caught.value.found == "transformer.layers.0.attention.extra"


def test_an_unknown_activation_is_named(gpt2):
    model = load_model(gpt2.folder)
    model.transformer.layers[0].mlp.act = torch.sin
    with pytest.raises(InputError, match="sin"):
        make_onnx(model)


def test_an_unknown_dtype_is_named(gpt2, tmp_path):
    with pytest.raises(InputError) as caught:
        export_onnx(gpt2.model, tmp_path, dtypes=("fp32", "q7"))
    assert caught.value.found == "q7"


def test_a_head_size_that_the_operator_cannot_take_is_an_error(gpt2):
    config = gpt2.model.config
    with pytest.raises(InputError, match="head size") as caught:
        make_onnx(CausalLM(type(config)(**{**vars(config), "head_dim": 12}), seed=0))
    assert "12" in caught.value.found
