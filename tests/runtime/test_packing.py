"""Ragged batches without padding, and packed matrices: every encoder and head against transformers and our plain path.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import zoo
from torch import nn

from lmworks.models import inference
from lmworks.models.checkpoint import load_model
from lmworks.models.compact import Grid, QuantizedLinear
from lmworks.models.inference import PackedAttention, PackedLinear, pack, pack_if_faster, packing_pays
from lmworks.runtime import torch_runtime
from lmworks.runtime.torch_runtime import TorchRuntime

LENGTHS, T = (7, 100, 1, 61, 7, 33), 100  # windows are shorter than some, longer than others; two are alike
POOLED = [("gpt2", "SequenceClassification"), ("mistral", "SequenceClassification"), ("mistral", "CausalLM")]
CELLS = [cell for cell in zoo.CELLS if cell[0].split()[0] not in {*zoo.DECODERS, "vit"}] + POOLED


def make_batch(side: str, pad: int) -> dict[str, np.ndarray]:
    """Return rows of random ids, padded to T on one side; segments change in the middle of a row."""
    rng = np.random.default_rng(0)
    batch = {name: np.zeros((len(LENGTHS), T), np.int64) for name in ("input_ids", "attention_mask")}
    batch["input_ids"][:] = pad
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(T - length, T)
        batch["input_ids"][row, place] = rng.integers(4, zoo.VOCAB, length)
        batch["attention_mask"][row, place] = 1
    return batch


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reference, and the folder that it was saved to."""
    case, head = request.param
    folder: Path = tmp_path_factory.mktemp("cell")
    reference = zoo.make_reference(case, head)
    reference.save_pretrained(folder)
    return case, head, reference, folder


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave padding out of models as small as these, too."""
    monkeypatch.setattr(torch_runtime, "LEAST_SAVING", 0)


@torch.inference_mode()
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_padding_is_computed_and_no_number_changes(cell: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of unlike lengths costs its tokens alone; the same numbers as padded, and as transformers."""
    case, head, reference, folder = cell
    runtime = TorchRuntime(folder, head=head)
    batch = make_batch(side, zoo.pad_id(case))
    mask = batch["attention_mask"].astype(bool)
    types = {"token_type_ids": np.tile((np.arange(T) // 50) % 2, (len(LENGTHS), 1))} if case == "bert" else {}
    seen: list[int] = []
    runtime.model.transformer.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[:-1].numel())
    )
    found = next(iter(runtime.run({**batch, **types}).values()))
    assert seen == [sum(LENGTHS)] * runtime.model.transformer.order.count(0)  # ALBERT's layer runs several times
    tensors = {name: torch.from_numpy(array) for name, array in types.items()}
    padded = runtime.model(torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"]), **tensors)
    assert found.shape == tuple(padded.shape) and found.dtype == np.float32
    rows = mask if found.ndim == 3 else np.full(len(LENGTHS), True)
    assert np.abs(found[rows] - padded.numpy()[rows]).max() <= 2e-6 * max(1, np.abs(found).max())
    for row, ids in enumerate(batch["input_ids"]):
        own = found[row][mask[row]] if found.ndim == 3 else found[row]
        inputs = {"input_ids": ids, **{name: array[row] for name, array in types.items()}}
        single = {name: torch.from_numpy(array[mask[row]])[None] for name, array in inputs.items()}
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        if head == "MultipleChoice":
            single = {name: value[:, None] for name, value in single.items()}
        expected = zoo.numbers(reference(**single)).numpy()
        assert np.abs(own - expected.reshape(own.shape)).max() <= 1e-5


def test_whole_rows_and_empty_rows_take_the_padded_path(cell: Any) -> None:
    """A row of padding alone has no state to pool; nothing fails and the other rows are as ever."""
    case, head, _, folder = cell
    runtime, batch = TorchRuntime(folder, head=head), make_batch("right", zoo.pad_id(case))
    (expected,) = runtime.run(batch).values()
    batch["attention_mask"][0] = 0
    (found,) = runtime.run(batch).values()
    real = batch["attention_mask"][1:].astype(bool) if found.ndim == 3 else slice(None)
    assert np.abs(found[1:][real] - expected[1:][real]).max() <= 1e-5
    whole = {"input_ids": batch["input_ids"][1:2]}
    (found,) = runtime.run(whole).values()
    assert np.abs(found[0] - expected[1]).max() <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("act", sorted(inference.POST_OPS))
@pytest.mark.parametrize("case", ["bert", "modernbert", "vit", "llama"])
def test_packed_matrices_give_the_same_numbers(case: str, act: str, tmp_path: Path) -> None:
    """The joint product of q, k and v, grouped heads, gates, each activation as a part of its product: fp32 to 1e-5."""
    head = {"vit": "ImageClassification", "llama": "CausalLM"}.get(case, "SequenceClassification")
    setting = {"hidden_activation" if case == "modernbert" else "hidden_act": act}
    reference = zoo.make_reference(case, head, **setting)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, head)
    pack(model, rows=64)
    kinds = {type(module) for module in model.modules()}
    assert kinds & {PackedLinear, PackedAttention} == {PackedLinear, PackedAttention} and nn.Linear not in kinds
    x = torch.randn(2, 3, 32, 32) if case == "vit" else torch.randint(4, zoo.VOCAB, (2, 50))
    assert (model(x) - zoo.numbers(reference(x))).abs().max() <= 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.make_reference("bert", "SequenceClassification").save_pretrained(tmp_path)
    return tmp_path


def test_padding_is_left_out_where_that_pays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a token or two, not for rows that are all padding, and not where the products are tiny."""
    runtime = TorchRuntime(folder)
    mask = np.ones((4, 30), np.int64)
    assert not runtime.is_wasteful(mask)
    mask[1, 28:] = 0
    assert not runtime.is_wasteful(mask)
    mask[1, 5:] = 0
    assert runtime.is_wasteful(mask)
    monkeypatch.setattr(torch_runtime, "LEAST_SAVING", 150_000)
    assert not runtime.is_wasteful(mask)  # 25 tokens over 2 lengths in a model of 32
    monkeypatch.setattr(torch_runtime, "LEAST_SAVING", 0)
    mask[2] = 0
    assert not runtime.is_wasteful(mask)


def is_packed(runtime: TorchRuntime) -> bool:
    return any(isinstance(module, PackedLinear) for module in runtime.model.modules())


@pytest.mark.parametrize("pays", [True, False])
def test_a_runtime_packs_after_many_tokens_where_it_pays(
    folder: Path, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text pays for nothing; a model that was given, and may be in training, stays as it is."""
    monkeypatch.setattr(inference, "packing_pays", lambda *sizes: pays)
    monkeypatch.setattr(torch_runtime, "WARM", 1500)
    runtime, given = TorchRuntime(folder), TorchRuntime(load_model(folder))
    batch = make_batch("right", 0)
    first, again, third = (runtime.run(batch)["logits"] for _ in range(3))
    assert is_packed(runtime) is pays
    assert np.abs(first - third).max() <= 1e-5 and np.array_equal(again, third)
    for _ in range(3):
        plain = given.run(batch)["logits"]
    assert not is_packed(given) and np.array_equal(plain, first)


def test_what_writes_text_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is one row at a time, which torch's own product does best; a classifier of the family reads."""
    monkeypatch.setattr(inference, "packing_pays", lambda *sizes: True)
    for head, expected in (("CausalLM", False), ("SequenceClassification", True)):
        zoo.make_reference("gpt2", head).save_pretrained(tmp_path / head)
        model = load_model(tmp_path / head)
        pack_if_faster(model)
        assert any(isinstance(module, PackedLinear) for module in model.modules()) is expected


def test_a_torch_without_the_operators_keeps_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        """A namespace of operators that lacks these."""

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    for dtype in ("fp32", "bf16"):
        runtime = TorchRuntime(folder, dtype=dtype)
        monkeypatch.setattr(runtime, "cold", 1)
        assert np.isfinite(runtime.run(make_batch("right", 0))["logits"]).all() and not is_packed(runtime)


def test_the_trial_refuses_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    packing_pays.cache_clear()
    assert packing_pays(64, 128, 1) in (True, False)
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: right(self, x) + 1e-4)
    packing_pays.cache_clear()
    assert packing_pays(64, 128, 1) is False
    packing_pays.cache_clear()


def test_bfloat16_is_close(cell: Any) -> None:
    """bf16 keeps eight bits of a number: within a tenth of float32's size, ragged rows too. Never the default."""
    case, head, _, folder = cell
    batch = make_batch("right", zoo.pad_id(case))
    runtimes = TorchRuntime(folder, head=head), TorchRuntime(folder, head=head, dtype="bf16")
    assert runtimes[0].dtype == "fp32"
    whole, half = (next(iter(runtime.run(batch).values())) for runtime in runtimes)
    rows = batch["attention_mask"].astype(bool) if whole.ndim == 3 else np.full(len(whole), True)
    assert 1e-4 < np.abs(half[rows] - whole[rows]).mean() / np.abs(whole[rows]).mean() < 0.1


@torch.inference_mode()
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
@pytest.mark.parametrize("case", ["bert", "mistral"])
def test_quantized_layers_are_joined_with_the_same_numbers(case: str, activations: str, tmp_path: Path) -> None:
    """One product of q, k and v, grouped heads too, against the plain arithmetic of each layer; padding is left out."""
    head = "SequenceClassification"
    zoo.make_reference(case, head).save_pretrained(tmp_path)
    model = load_model(tmp_path, head)
    generator = torch.Generator().manual_seed(1)
    for parent in list(model.transformer.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                scale = child.weight.abs().amax(1, keepdim=True) / 127
                span = torch.tensor([-4.0, 4.0]) if activations == "static" else None
                bias = torch.randn(child.out_features, generator=generator) if child.bias is None else child.bias
                q = torch.round(child.weight / scale).to(torch.int8)
                layer = QuantizedLinear(q, scale, None, Grid(activations=activations), bias=bias, span=span)  # type: ignore[arg-type]
                setattr(parent, name, layer)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    batch = make_batch("right", 0)
    ids, mask = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
    for layer in layers:
        layer.keeps = False  # the reference's arithmetic
    expected = model(ids, mask).numpy()
    for layer in layers:
        layer.keeps = True
    inference.join(model)
    left = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    attentions = [block.attention for block in model.transformer.layers]
    if activations == "none":
        assert not left and all(type(attention.q_proj) is nn.Linear for attention in attentions)
    else:
        assert len(left) == len(layers) - 2 * len(attentions)
        assert all(isinstance(attention, PackedAttention) for attention in attentions)
    runtime = TorchRuntime(model)
    found = runtime.run(batch)["logits"]
    limit = 1e-5 if activations == "none" else 2e-2 * np.abs(expected).max()  # a rounding may fall the other way
    assert np.abs(found - expected).max() <= limit
    assert np.abs(np.median(found - expected)) <= 1e-3 * np.abs(expected).max()


def test_layers_that_differ_are_not_joined() -> None:
    def layer(bits: int = 8, span: float = 0.0, bias: bool = True) -> QuantizedLinear:
        grid = Grid(bits=bits, activations="static" if span else "dynamic")  # type: ignore[arg-type]
        q, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 1)
        edges = torch.tensor([-span, span]) if span else None
        return QuantizedLinear(q, scale, None, grid, bias=torch.ones(4) if bias else None, span=edges)

    assert inference.joined_layers([layer(), layer(), layer()]) is not None
    assert inference.joined_layers([layer(), layer(bits=4), layer()]) is None
    assert inference.joined_layers([layer(), layer(bias=False), layer()]) is None
    assert inference.joined_layers([layer(span=1.0), layer(span=2.0), layer(span=1.0)]) is None
    assert inference.joined_layers([layer(), layer()]) is None


@torch.inference_mode()
def test_a_few_rows_go_through_onednn_with_the_matrix_as_it_lies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied, only what reads is changed, and a product of many rows is torch's own."""
    plain = nn.Linear(32, 48)
    layer = nn.Sequential(plain)
    address, calls = plain.weight.data_ptr(), []
    inference.multiply_directly(layer)
    own = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(len(a[0])) or own(*a))
    for rows in (1, 2, 64, 65):
        x = torch.randn(rows, 32)
        assert (layer(x) - nn.functional.linear(x, plain.weight, plain.bias)).abs().max() <= 1e-5
    assert calls == [2, 64] and plain.weight.data_ptr() == address and type(plain) is inference.DirectLinear
    monkeypatch.undo()
    kinds = {type(module) for module in TorchRuntime(folder).model.modules()}
    assert inference.DirectLinear in kinds and nn.Linear not in kinds
    given = load_model(folder)
    assert nn.Linear in {type(module) for module in TorchRuntime(given).model.modules()}


def test_a_matrix_that_lies_transposed_is_left_to_torch(tmp_path: Path) -> None:
    """GPT-2's files hold (in, out): oneDNN would turn each of them round at every call, which took seconds."""
    zoo.make_reference("gpt2", "CausalLM").save_pretrained(tmp_path)
    model = TorchRuntime(tmp_path).model
    direct = [layer for layer in model.modules() if isinstance(layer, inference.DirectLinear)]
    assert all(layer.weight.is_contiguous() for layer in direct)
    assert any(not layer.weight.is_contiguous() for layer in model.modules() if isinstance(layer, nn.Linear))


def test_a_bf16_reader_is_packed_for_many_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch_runtime, "pack", lambda model, rows: seen.append(rows))
    TorchRuntime(folder, dtype="bf16")
    zoo.make_reference("llama", "CausalLM").save_pretrained(folder / "writes")
    TorchRuntime(folder / "writes", dtype="bf16")
    assert seen == [inference.MANY_ROWS, 1]


def test_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """One that has no such call."""

    assert torch_runtime.keep_memory() in (True, False)
    monkeypatch.setattr(torch_runtime.ctypes, "CDLL", lambda name: Library())
    assert torch_runtime.keep_memory() is False
