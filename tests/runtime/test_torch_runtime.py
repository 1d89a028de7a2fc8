"""The torch runtime: numpy in and out, slots of different lengths, and a model that is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import save_model
from lmworks.models.families import gpt2, llama
from lmworks.models.heads import CausalLM
from lmworks.models.inference import pack
from lmworks.runtime.base import Runtime
from lmworks.runtime.torch_runtime import PackedLinear, TorchRuntime, alike, is_padded_left

SIZES = {"vocab_size": 90, "num_hidden_layers": 2, "max_position_embeddings": 600, "initializer_range": 0.2}
MODELS = {
    "gpt2": CausalLM(gpt2.new(hidden_size=32, num_attention_heads=4, **SIZES)).eval(),
    "llama": CausalLM(llama.new(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **SIZES)).eval(),
}
BOTH = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
IDS = np.random.default_rng(0).integers(0, 90, (4, 60))


def expected(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(np.asarray(ids))[None])[0].numpy()
    return logits


@BOTH
def test_run(model: CausalLM) -> None:
    runtime: Runtime = TorchRuntime(model)
    logits = runtime.run({"input_ids": IDS, "attention_mask": np.ones_like(IDS)})["logits"]
    assert logits.dtype == np.float32 and logits.shape == (4, 60, 90)
    assert np.array_equal(logits, runtime.run({"input_ids": IDS})["logits"])
    assert np.abs(logits[2] - expected(model, IDS[2])).max() < 1e-5
    assert (runtime.name, runtime.dtype, runtime.vocab_size, runtime.max_length) == ("torch", "fp32", 90, 600)


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_run_with_padding(model: CausalLM, side: str) -> None:
    mask = np.ones_like(IDS)
    for row, pads in enumerate((0, 13, 59, 1)):
        mask[row, slice(0, pads) if side == "left" else slice(60 - pads, 60)] = 0
    logits = TorchRuntime(model).run({"input_ids": IDS, "attention_mask": mask})["logits"]
    for row in range(4):
        real = mask[row].astype(bool)
        assert np.abs(logits[row][real] - expected(model, IDS[row][real])).max() < 1e-5


@BOTH
def test_slots(model: CausalLM) -> None:
    """Prompts of all lengths at once, steps of any slots in any order, a slot that starts over, growth past 256."""
    runtime = TorchRuntime(model, slots=5)
    texts: dict[int, list[int]] = {}

    def check(slots: list[int], logits: np.ndarray) -> None:
        assert logits.shape == (len(slots), 90) and logits.dtype == np.float32
        for slot, found in zip(slots, logits, strict=True):
            assert np.abs(found - expected(model, np.array(texts[slot]))[-1]).max() < 1e-5, slot

    def prefill(slots: list[int], lengths: list[int]) -> None:
        prompts = [IDS[slot % 4, :length].tolist() for slot, length in zip(slots, lengths, strict=True)]
        texts.update({slot: list(prompt) for slot, prompt in zip(slots, prompts, strict=True)})
        check(slots, runtime.prefill(slots, prompts))

    def step(slots: list[int]) -> None:
        tokens = [(7 * len(texts[slot]) + slot) % 90 for slot in slots]
        for slot, token in zip(slots, tokens, strict=True):
            texts[slot].append(token)
        check(slots, runtime.step(slots, tokens))

    prefill([3, 0, 4], [9, 40, 30])
    for slots in ([0], [3, 4], [4, 3, 0], [0, 4]):
        step(slots)
    prefill([1], [1])
    prefill([4], [5])  # starts over
    step([0, 1, 3, 4])
    prefill([2], [20])
    for _ in range(249):
        texts[2].append(len(texts[2]) % 90)
        runtime.step([2], texts[2][-1:])
    step([2])  # its 270th token
    step([0, 1, 3, 4])


def test_a_batch_of_prompts_is_padded_little() -> None:
    assert alike([8, 1, 5]) == [[0, 2], [1]]
    assert alike([]) == []
    lengths = [3, 100, 51, 50, 49, 1, 2]
    groups = [[lengths[row] for row in rows] for rows in alike(lengths)]
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    assert all(2 * min(group) >= max(group) for group in groups)


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        ([[1, 1], [1, 1]], False),
        ([[1, 0], [1, 1]], False),
        ([[1, 1], [0, 1]], True),
        ([[1, 0, 1]], True),
        ([[0, 0]], True),
    ],
)
def test_padding_on_the_right_needs_no_mask(mask: list[list[int]], answer: bool) -> None:
    assert is_padded_left(np.array(mask)) is answer


@BOTH
def test_bfloat16(model: CausalLM, tmp_path: Path) -> None:
    """Close to float32, from a model (which stays as it is) and from its folder alike."""
    save_model(model, tmp_path)
    whole = TorchRuntime(model).run({"input_ids": IDS})["logits"]
    runtime = TorchRuntime(model, dtype="bf16")
    logits = runtime.run({"input_ids": IDS})["logits"]
    assert logits.dtype == np.float32 and runtime.dtype == "bf16"
    assert 1e-4 < np.abs(logits - whole).mean() / np.abs(whole).mean() < 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert np.array_equal(TorchRuntime(tmp_path, dtype="bf16").run({"input_ids": IDS})["logits"], logits)
    first = runtime.prefill([0], [IDS[0, :59].tolist()])
    assert runtime.cache.keys[0].dtype == torch.bfloat16
    assert np.abs(runtime.step([0], [IDS[0, 59]]) - logits[0, 59]).mean() < 0.05 * np.abs(logits[0, 59]).mean()
    assert first.shape == (1, 90)


@BOTH
def test_packing_changes_no_number(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 matrix in another order in memory: the same products, but for the last bit; biases included."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.constant_(parameter, 0.3)
    packed = TorchRuntime(model, dtype="bf16")
    monkeypatch.setattr("lmworks.runtime.torch_runtime.pack", lambda model, rows: None)
    plain = TorchRuntime(model, dtype="bf16")
    linears = [[type(m).__name__ for m in r.model.modules() if "Linear" in type(m).__name__] for r in (packed, plain)]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert set(linears[0]) == {"PackedLinear"} and set(linears[1]) == {"Linear"}
    assert len(linears[0]) == len(linears[1]) - 2 * SIZES["num_hidden_layers"]  # q, k and v are one
    a, b = (runtime.run({"input_ids": IDS})["logits"] for runtime in (packed, plain))
    assert np.abs(a - b).mean() < 0.02 * np.abs(b).mean()
    given = copy.deepcopy(model).to(torch.bfloat16)
    monkeypatch.undo()
    TorchRuntime(given, dtype="bf16")
    assert not any(isinstance(module, PackedLinear) for m in (model, given) for module in m.modules())


@BOTH
def test_a_model_that_was_packed_is_packed_once(model: CausalLM) -> None:
    model = copy.deepcopy(model)
    pack(model)
    with torch.no_grad():
        first = model(torch.from_numpy(IDS))
        pack(model)
        assert torch.equal(first, model(torch.from_numpy(IDS)))


def test_a_model_in_training_is_left_in_training() -> None:
    """Evaluation in the middle of training must not drop anything, nor switch dropout off for good."""
    model = CausalLM(gpt2.new(hidden_size=32, num_attention_heads=4, dropout=0.5, **SIZES)).train()
    runtime = TorchRuntime(model)
    reference = expected(copy.deepcopy(model).eval(), IDS[0])
    assert np.abs(runtime.run({"input_ids": IDS[:1]})["logits"][0] - reference).max() < 1e-5
    assert np.abs(runtime.prefill([0], [IDS[0].tolist()])[0] - reference[-1]).max() < 1e-5
    assert model.training and all(module.training for module in model.modules())
    with torch.no_grad():
        model.transformer.embeddings.tokens.weight.mul_(1.5)  # training goes on: the runtime follows
    assert np.abs(runtime.run({"input_ids": IDS[:1]})["logits"][0] - reference).max() > 1e-3
    loss = model(torch.from_numpy(IDS)).sum()
    loss.backward()


@BOTH
def test_what_cannot_be_run_is_refused(model: CausalLM) -> None:
    runtime = TorchRuntime(model, slots=2)
    runtime.prefill([0], [[1, 2, 3]])
    for call, message in (
        (lambda: runtime.run({"input_ids": np.array([[1, 90]])}), "outside the vocabulary"),
        (lambda: runtime.run({"input_ids": np.zeros((1, 601), np.int64)}), "601 tokens"),
        (lambda: runtime.prefill([1], [[-1]]), "outside the vocabulary"),
        (lambda: runtime.prefill([1], [[]]), "no token"),
        (lambda: runtime.prefill([1], [[1] * 601]), "601 tokens"),
        (lambda: runtime.prefill([2], [[1]]), "slots"),
        (lambda: runtime.prefill([0, 0], [[1], [1]]), "slots"),
        (lambda: runtime.step([0, 1], [1]), "slots"),
        (lambda: runtime.step([0], [90]), "outside the vocabulary"),
        (lambda: TorchRuntime(model, dtype="int8"), "fp32 or bf16"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert runtime.cache.lengths == [3, 0]
    runtime.prefill([1], [[5] * 600])
    with pytest.raises(InputError, match=r"does not fit the model[\s\S]*601 tokens"):
        runtime.step([1], [1])
    assert runtime.step([], []).shape == (0, 90) == runtime.prefill([], []).shape


@BOTH
def test_a_slot_is_extended_in_parts_and_from_what_it_holds(model: CausalLM) -> None:
    """A prompt in parts, and one that goes on from another's beginning, give the logits of the whole prompt."""
    runtime = TorchRuntime(model, slots=2)
    ids = np.random.default_rng(0).integers(0, 90, 40).tolist()
    other = ids[:25] + [(token + 1) % 90 for token in ids[25:]]
    whole, branch = (runtime.prefill([0], [row])[0] for row in (ids, other))
    for start, end in ((0, 7), (7, 30), (30, 40)):
        last = runtime.extend(1, ids[start:end], at=start)
    np.testing.assert_allclose(last, whole, atol=1e-5, rtol=0)
    np.testing.assert_allclose(runtime.extend(1, other[25:], at=25), branch, atol=1e-5, rtol=0)
    np.testing.assert_allclose(runtime.step([1], ids[:1]), runtime.step([0], ids[:1]), atol=1e-5, rtol=0)
    for bad in ({"at": 99}, {"at": -1}):
        with pytest.raises(InputError, match=r"cannot be extended|does not fit"):
            runtime.extend(1, ids[:2], **bad)
    with pytest.raises(InputError, match="cannot be extended"):
        runtime.extend(1, [], at=3)
