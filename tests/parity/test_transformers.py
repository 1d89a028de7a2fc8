"""Our models against transformers: the same numbers from the same files, both ways.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lmworks.base.errors import InputError
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model, save_model
from lmworks.runtime.torch_runtime import TorchRuntime

CLOSE = 1e-5
VOCAB = 99


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def reference_logits(case: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the reference's logits (B, T, V) for whole rows, without any padding."""
    with torch.inference_mode():
        logits: torch.Tensor = case.reference(input_ids=ids).logits
    return logits


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and torch.isfinite(a).all()
    return (a - b).abs().max().item()


@torch.inference_mode()
def test_logits(case: Any) -> None:
    ids = random_ids(3, 100)
    assert largest(load_model(case.folder)(ids), reference_logits(case, ids)) <= CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padding_on_either_side_changes_nothing(case: Any, side: str) -> None:
    """The real tokens of a padded batch score as each row scores alone, unpadded, in the reference."""
    lengths, T = (100, 61, 1), 100
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids, mask = torch.full((3, T), 7), torch.zeros(3, T, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(T - row.shape[1], T) if side == "left" else slice(0, row.shape[1])
        ids[i, place], mask[i, place] = row[0], 1
    model = load_model(case.folder)
    through_runtime = TorchRuntime(model).run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]
    for logits in (model(ids, mask), torch.from_numpy(through_runtime)):
        for i, row in enumerate(rows):
            assert largest(logits[i][mask[i].bool()][None], reference_logits(case, row)) <= CLOSE


@torch.inference_mode()
def test_left_padding_agrees_with_the_reference_in_a_batch(case: Any) -> None:
    """The same, against the positions that transformers' generate counts from the mask."""
    ids, mask = random_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, :20] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = case.reference(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
    assert largest(load_model(case.folder)(ids, mask)[mask.bool()], expected[mask.bool()]) <= CLOSE


@torch.inference_mode()
def test_cache_equals_whole_sequence(case: Any) -> None:
    """Prompt, pieces and single tokens, the rows together and apart and out of order, score as one whole pass."""
    ids = random_ids(3, 90)
    expected = reference_logits(case, ids)
    model = load_model(case.folder)
    cache = KVCache(model.config, rows=4)
    place = [2, 0, 3]  # of our rows in the cache
    done = [0, 0, 0]

    def go_on(rows: list[int], T: int) -> None:
        new = torch.stack([ids[row, done[row] : done[row] + T] for row in rows])
        logits = model(new, cache=cache.select([place[row] for row in rows]))
        for row, out in zip(rows, logits, strict=True):
            assert largest(out, expected[row, done[row] : done[row] + T]) <= CLOSE, (rows, T, done)
            done[row] += T

    go_on([0, 1, 2], 20)  # a prompt for all
    go_on([1], 7)  # one goes on alone
    go_on([1, 0], 1)  # different lengths, scattered and out of order
    go_on([0, 2], 1)  # neighbours in the cache, different lengths
    go_on([2, 1, 0], 5)  # a piece, different lengths
    for _ in range(40):
        go_on([0, 1, 2], 1)
    assert cache.lengths == [done[1], 0, done[0], done[2]]


def test_greedy_equals_generate(case: Any) -> None:
    """C12: 64 greedy tokens for two prompts of different length, transformers' batch padded on the left."""
    prompts = [random_ids(17).tolist(), random_ids(5, seed=2).tolist()]
    ids = torch.tensor([prompts[0], [0] * 12 + prompts[1]])
    mask = torch.tensor([[1] * 17, [0] * 12 + [1] * 5])
    expected = case.reference.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=64)[:, 17:]
    runtime = TorchRuntime(case.folder, slots=2)
    logits = runtime.prefill([1, 0], prompts)
    tokens = [logits.argmax(-1)]
    for _ in range(63):
        tokens.append(runtime.step([1, 0], tokens[-1].tolist()).argmax(-1))
    assert np.array_equal(np.stack(tokens, 1), expected.numpy())
    assert len(set(expected.flatten().tolist())) > 4  # the comparison is worth something


def test_transformers_reads_what_we_write(case: Any, tmp_path: Path) -> None:
    """C21, C22: our folder loads there without a missing or unexpected key, and every bit is the same."""
    save_model(load_model(case.folder), tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected, found = case.reference.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    ours, theirs = again.config.to_dict(), case.reference.config.to_dict()
    added = {"_name_or_path", "transformers_version", "rope_theta", "rope_scaling", "torch_dtype", "architectures"}
    added |= {"max_position_embeddings"} if case.name.startswith("gpt2") else set()
    assert {k: v for k, v in ours.items() if k not in added} == {k: v for k, v in theirs.items() if k not in added}
    assert not again.generation_config.to_diff_dict().keys() - {
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
    }


def test_files_are_the_same(case: Any, tmp_path: Path) -> None:
    """The same keys (a tied head left out), dtypes and bits as in the file that transformers wrote."""
    save_model(load_model(case.folder), tmp_path)
    expected, found = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key].dtype == found[key].dtype and torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(case: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    """They become float32 by default, and survive to the bit with dtype=None."""
    reference = copy.deepcopy(case.reference).to(dtype)
    reference.save_pretrained(tmp_path)
    expected = reference.state_dict()
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.embeddings.tokens.weight, expected[embedding_key(case)].float())
    save_model(load_model(tmp_path, dtype=None), tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert all(found[key].dtype == dtype and torch.equal(found[key], expected[key]) for key in found)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def embedding_key(case: Any) -> str:
    return "transformer.wte.weight" if case.name.startswith("gpt2") else "model.embed_tokens.weight"


def test_shards(case: Any, tmp_path: Path) -> None:
    case.reference.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = random_ids(1, 20)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(ids), load_model(case.folder)(ids))


def test_a_body_without_its_head(case: Any, tmp_path: Path) -> None:
    """C34: files of the bare body carry no prefix: enough where the head is tied, else an error."""
    case.reference.base_model.save_pretrained(tmp_path)
    assert embedding_key(case) not in load_file(tmp_path / "model.safetensors")
    ids = random_ids(1, 20)
    if case.reference.config.tie_word_embeddings:
        with torch.inference_mode():
            assert torch.equal(load_model(tmp_path, "CausalLM")(ids), load_model(case.folder)(ids))
    else:
        with pytest.raises(InputError, match="this checkpoint has no head for CausalLM"):
            load_model(tmp_path, "CausalLM")


def test_config_of_the_other_generation(case: Any, tmp_path: Path) -> None:
    """A config.json as transformers 4 wrote it: rope_theta and rope_scaling side by side, torch_dtype."""
    shutil.copytree(case.folder, tmp_path, dirs_exist_ok=True)
    hf = json.loads((tmp_path / "config.json").read_text())
    rope = hf.pop("rope_parameters", None)
    if rope is not None:
        hf["rope_theta"] = rope.pop("rope_theta")
        hf["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    hf["torch_dtype"] = hf.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ids = random_ids(1, 100)
    with torch.inference_mode():
        assert largest(load_model(tmp_path)(ids), reference_logits(case, ids)) <= CLOSE
    save_model(load_model(tmp_path), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, reference_logits(case, ids))
