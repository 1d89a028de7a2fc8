"""OnnxRuntime: slots of different lengths against transformers one row at a time; no torch; errors with a fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import POSITIONS, VOCAB, save_reference

from lmworks.base.errors import FormatError, InputError
from lmworks.export.onnx import export_onnx
from lmworks.runtime import onnx_runtime
from lmworks.runtime.onnx_runtime import OnnxRuntime, neighbours

IDS = np.random.default_rng(1).integers(0, VOCAB, (6, POSITIONS))


@pytest.fixture(scope="module", params=["gpt2", "llama-gqa-tied", "llama-llama3"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_reference(request.param, path)
    export_onnx(path, path)
    return path


@pytest.fixture(scope="module")
def expected(folder) -> np.ndarray:
    """transformers' logits (6, P, V), each row run alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(row[None])).logits.numpy() for row in IDS])


def make(folder: Path, **settings) -> OnnxRuntime:
    return OnnxRuntime(folder, threads=1, **settings)


def test_whole_sequences(folder, expected):
    runtime = make(folder)
    np.testing.assert_allclose(runtime.run({"input_ids": IDS})["logits"], expected, atol=1e-4)
    assert (runtime.vocab_size, runtime.max_length) == (VOCAB, POSITIONS)
    assert (runtime.name, runtime.dtype) == ("onnx", "fp32")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(folder, expected, side):
    lengths, width = (50, 1, 17, 33, 8, 21), 50
    ids, mask = np.full((6, width), 3), np.zeros((6, width), np.int64)
    for row, n in enumerate(lengths):
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = IDS[row, :n], 1
    logits = make(folder).run({"input_ids": ids, "attention_mask": mask})["logits"]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row, mask[row] == 1], expected[row, :n], atol=1e-4)


def test_slots_of_different_lengths_share_every_step(folder, expected):
    """Prompts of 1 to 60 tokens, steps in changing company, a slot started over among running ones."""
    runtime, rng = make(folder, slots=6), np.random.default_rng(2)
    lengths = [1, 60, 7, 33, 20, 12]
    logits = runtime.prefill([4, 1, 0, 5, 3, 2], [IDS[s][: lengths[s]].tolist() for s in (4, 1, 0, 5, 3, 2)])
    for row, slot in enumerate((4, 1, 0, 5, 3, 2)):
        np.testing.assert_allclose(logits[row], expected[slot, lengths[slot] - 1], atol=1e-4)
    for turn in range(30):
        if turn == 11:
            lengths[3] = 5
            again = runtime.prefill([3], [IDS[3][:5]])
            np.testing.assert_allclose(again[0], expected[3, 4], atol=1e-4)
        slots = rng.permutation(6)[: rng.integers(1, 7)].tolist()
        logits = runtime.step(slots, [int(IDS[s][lengths[s]]) for s in slots])
        assert logits.shape == (len(slots), VOCAB)
        for row, slot in enumerate(slots):
            np.testing.assert_allclose(logits[row], expected[slot, lengths[slot]], atol=1e-4)
            lengths[slot] += 1


def test_a_row_in_company_equals_the_row_alone(folder):
    """The day-one experiment, kept: per-row lengths in one step differ from batches of one by rounding only."""
    together, alone = make(folder, slots=4), make(folder)
    prompts = [IDS[row][:n] for row, n in enumerate((40, 3, 18, 29))]
    together.prefill(range(4), prompts)
    steps = np.stack([together.step(range(4), IDS[:4, 50 + i]) for i in range(5)], 1)
    for row, prompt in enumerate(prompts):
        alone.prefill([0], [prompt])
        single = np.stack([alone.step([0], [IDS[row, 50 + i]])[0] for i in range(5)])
        np.testing.assert_allclose(steps[row], single, atol=1e-5)


def test_the_cache_is_written_in_place(folder):
    runtime = make(folder, slots=2)
    runtime.prefill([0, 1], [IDS[0][:5], IDS[1][:9]])
    addresses, before = [cache.ctypes.data for cache in runtime.caches], [cache.copy() for cache in runtime.caches]
    runtime.step([1], [3])
    assert [cache.ctypes.data for cache in runtime.caches] == addresses
    for cache, old in zip(runtime.caches, before, strict=True):
        np.testing.assert_array_equal(cache[0], old[0])
        np.testing.assert_array_equal(cache[1][:, :9], old[1][:, :9])
        assert np.abs(cache[1][:, 9]).max() > 0


def test_the_cache_grows_and_long_prompts_come_in_chunks(folder, expected, monkeypatch):
    monkeypatch.setattr(onnx_runtime, "FIRST_CAPACITY", 4)
    monkeypatch.setattr(onnx_runtime, "CHUNK", 7)
    runtime = make(folder, slots=2)
    assert runtime.capacity == 4
    logits = runtime.prefill([0, 1], [IDS[0][:3], IDS[1][:40]])
    np.testing.assert_allclose(logits, [expected[0, 2], expected[1, 39]], atol=1e-4)
    for i in range(POSITIONS - 40):
        logits = runtime.step([0, 1], [IDS[0][3 + i], IDS[1][40 + i]])
        np.testing.assert_allclose(logits, [expected[0, 3 + i], expected[1, 40 + i]], atol=1e-4)
    assert runtime.capacity == POSITIONS
    with pytest.raises(InputError, match="does not fit") as caught:
        runtime.step([1], [0])
    assert f"{POSITIONS + 1} tokens" in caught.value.found


def test_int8_runs_and_differs_a_little(folder, expected):
    runtime = make(folder, dtype="int8")
    logits = runtime.run({"input_ids": IDS})["logits"]
    error = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
    assert 1e-4 < error < 0.15
    alone = runtime.run({"input_ids": IDS[:1, :20]})["logits"][0, -1]
    np.testing.assert_allclose(runtime.prefill([0], [IDS[0][:20]])[0], alone, atol=0.3)


def test_neighbours_cover_every_row_once():
    assert list(neighbours([4, 1, 0])) == [(slice(0, 2), [2, 1]), (slice(4, 5), [0])]
    assert list(neighbours([3])) == [(slice(3, 4), [0])]
    assert list(neighbours([])) == []


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda r: r.prefill([0], [[]]), "no token"),
        (lambda r: r.prefill([0], [[1] * (POSITIONS + 1)]), "does not fit"),
        (lambda r: r.prefill([2], [[1]]), "slots"),
        (lambda r: r.prefill([0, 0], [[1], [1]]), "slots"),
        (lambda r: r.prefill([0, 1], [[1]]), "slots"),
        (lambda r: r.prefill([0], [[VOCAB]]), "vocabulary"),
        (lambda r: r.step([0], [-1]), "vocabulary"),
        (lambda r: r.step([-1], [1]), "slots"),
        (lambda r: r.run({"input_ids": np.array([[VOCAB]])}), "vocabulary"),
        (lambda r: r.run({"input_ids": np.zeros((1, POSITIONS + 1), int)}), "does not fit"),
    ],
)
def test_wrong_calls_are_refused(folder, call, text):
    """C5, C32: ids outside the embedding and texts too long end in a message, never in a kernel or a silent cut."""
    with pytest.raises(InputError, match=text):
        call(make(folder, slots=2))


def test_a_refused_prompt_leaves_the_slots_as_they_were(folder, expected):
    runtime = make(folder, slots=2)
    runtime.prefill([0, 1], [IDS[0][:5], IDS[1][:6]])
    with pytest.raises(InputError):
        runtime.prefill([0, 1], [IDS[0][:9], [VOCAB]])
    np.testing.assert_allclose(runtime.step([0], [IDS[0][5]])[0], expected[0, 5], atol=1e-4)


def test_a_missing_graph_names_its_path_and_the_fix(folder, tmp_path):
    with pytest.raises(InputError) as caught:
        OnnxRuntime(tmp_path)
    assert caught.value.where == str(tmp_path / "onnx" / "model.onnx")
    assert "lmworks export MODEL --to onnx" in caught.value.fix
    with pytest.raises(InputError, match="dtype"):
        OnnxRuntime(folder, dtype="fp64")


def test_a_broken_graph_or_config_is_named(folder, tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes((folder / "onnx" / "model.onnx").read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"model\.onnx cannot be loaded"):
        OnnxRuntime(tmp_path)
    (tmp_path / "onnx" / "model.onnx").write_bytes((folder / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        OnnxRuntime(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": "many"}))
    with pytest.raises(FormatError, match="number of positions"):
        OnnxRuntime(tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "q4", "q4f16"])
def test_other_dtypes_keep_a_cache_of_their_own_type(folder, tmp_path, dtype):
    """Prompts and steps equal the same graph over the whole sequence: the caches are float16 where the graph's are."""
    export_onnx(folder, tmp_path, dtypes=[dtype])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    runtime = make(tmp_path, dtype=dtype, slots=2)
    assert {cache.dtype for cache in runtime.caches} == {np.dtype(np.float16 if "16" in dtype else np.float32)}
    whole = runtime.run({"input_ids": IDS[:2, :20]})["logits"]
    assert whole.dtype == np.float32
    spread = whole.std()
    found = runtime.prefill([0, 1], [IDS[0][:12], IDS[1][:17]])
    assert np.abs(found - [whole[0, 11], whole[1, 16]]).max() < 0.15 * spread
    for i in range(3):
        found = runtime.step([0, 1], [IDS[0][12 + i], IDS[1][17 + i]])
        assert np.abs(found - [whole[0, 12 + i], whole[1, 17 + i]]).max() < 0.15 * spread


def test_a_window_holds_with_slots_of_different_lengths(tmp_path):
    """Mistral: each step sees the last `window` tokens of its own row, whatever the other row's length."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                           num_key_value_heads=2, intermediate_size=96, max_position_embeddings=POSITIONS,
                           sliding_window=12)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        known = [model(torch.from_numpy(row[None])).logits[0].numpy() for row in IDS[:2]]
    model.save_pretrained(tmp_path)
    export_onnx(tmp_path, tmp_path, dtypes=["fp32"])
    runtime = make(tmp_path, slots=2)
    found = runtime.prefill([0, 1], [IDS[0][:40], IDS[1][:5]])
    np.testing.assert_allclose(found, [known[0][39], known[1][4]], atol=1e-4)
    for i in range(20):
        found = runtime.step([0, 1], [IDS[0][40 + i], IDS[1][5 + i]])
        np.testing.assert_allclose(found, [known[0][40 + i], known[1][5 + i]], atol=1e-4)


def test_batches_are_as_large_as_the_runtime_likes():
    from lmworks.runtime.batching import run_features
    from lmworks.tasks.base import Feature

    class Counts:
        batch_tokens, sizes = 20, list[int]()

        def run(self, batch):
            self.sizes.append(batch["input_ids"].size)
            return {"logits": batch["input_ids"][:, :1].astype(np.float32)}

    features, runtime = [Feature({"input_ids": [i] * 9}, i) for i in range(7)], Counts()
    rows = run_features(runtime, features, output="logits")
    assert [int(row[0]) for row in rows] == list(range(7))
    assert runtime.sizes == [18, 18, 18, 9]
    assert OnnxRuntime.batch_tokens < 2048


def test_a_graph_whose_answer_nobody_reads_is_named(tmp_path):
    from lmworks.runtime.onnx_runtime import choose_outputs

    assert choose_outputs(["start_logits", "end_logits"], tmp_path) == {
        "start_logits": "logits",
        "end_logits": "logits",
    }
    assert choose_outputs(["last_hidden_state", "pooler_output"], tmp_path) == {"last_hidden_state": "hidden_states"}
    with pytest.raises(FormatError, match="nothing that a task reads") as caught:
        choose_outputs(["sentence_embedding"], tmp_path)
    assert caught.value.found == "sentence_embedding"


TORCH_FREE = """
import sys
sys.modules["torch"] = None  # any import of torch now fails
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.decoding import generate
from lmworks.runtime.sampling import Sampling

class Numbers:
    eos_id = None
    def encode_prompt(self, text): return [int(word) for word in text.split()]
    def decode(self, ids): return "".join(f" {i}" for i in ids)

for dtype in ("fp32", "int8"):
    runtime = OnnxRuntime(sys.argv[1], dtype=dtype, threads=1)
    print("".join(generate(runtime, Numbers(), "5 6 7", max_tokens=8)))
assert not any(name.partition(".")[0] in ("torch", "transformers", "onnx") for name in sys.modules if sys.modules[name])
"""


def test_it_runs_without_torch(folder):
    """C38: an exported model needs neither torch nor transformers nor onnx."""
    done = subprocess.run([sys.executable, "-c", TORCH_FREE, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fp32, int8 = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    assert fp32 == model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    assert len(int8) == 8
