"""Fixtures: what transformers answered, compared with where it cannot be imported.

What a fixture holds is checked against transformers run here on the stored inputs; that it is compared without
transformers is proven in a process where the import fails.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lmworks.base.errors import FormatError, InputError
from lmworks.cli.check import verify
from lmworks.export import fixture
from lmworks.export.parity import hash_weights, verify_against
from lmworks.models import checkpoint

CASES = [
    ("bert", "SequenceClassification"), ("bert", "MultipleChoice"), ("roberta", "CausalLM"),
    ("modernbert", "TokenClassification"), ("distilbert", "QuestionAnswering"), ("gpt2", "CausalLM"),
    ("mistral", "CausalLM"), ("vit", "ImageClassification"),
]  # fmt: skip
ALONE = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ImportError("transformers may not be imported here")
sys.meta_path.insert(0, Refuse())
from lmworks.cli.check import verify
codes = [verify(folder, against=file, json=True) for folder, file in json.loads(sys.argv[1])]
assert codes == [0] * len(codes) and not any(name.startswith("transformers") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path, dict[str, Any]]]:
    """A folder, its fixture, and the certificate that was given while transformers was there, for every case."""
    found = {}
    for case, head in CASES:
        place = tmp_path_factory.mktemp("fixture")
        zoo.make_reference(case, head).save_pretrained(place / "model")
        file = place / "sub" / "answers.safetensors"
        found[case, head] = (place / "model", file, verify_against(place / "model", save_fixture=file).values)
    return found


def test_compared_where_transformers_cannot_be_imported(made: Any) -> None:
    """C22, B3: the same differences as with transformers at hand."""
    jobs = [(str(folder), str(file)) for folder, file, _ in made.values()]
    run = subprocess.run([sys.executable, "-c", ALONE, json.dumps(jobs)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    decoder, text = json.JSONDecoder(), run.stdout
    for _, file, live in made.values():
        found, end = decoder.raw_decode(text)
        text = text[end:].lstrip()
        assert found["passed"] and found["max_abs_diff"] == live["max_abs_diff"]
        assert {head: set(row) for head, row in found["cells"].items()} == {
            head: set(row) for head, row in live["cells"].items()
        }
        assert found.get("greedy") == live.get("greedy")
        assert found["reference"] == {**live["reference"], "fixture": file.name}
        assert "round_trip" not in found and "round trip" in found["notes"][-1]


@pytest.mark.parametrize(("case", "head"), CASES)
@torch.inference_mode()
def test_a_fixture_holds_what_transformers_says(case: str, head: str, made: Any) -> None:
    """The stored numbers are those of the stored inputs; the metadata says who computed them, and how."""
    folder, file, _ = made[case, head]
    with safe_open(file, framework="numpy") as opened:
        facts = opened.metadata()
    assert facts == {
        "format": "lmworks-parity-1", "source": "model", "source_sha": hash_weights(folder), "attention": "eager",
        "transformers_version": transformers.__version__, "torch_version": torch.__version__,
    }  # fmt: skip
    stored = load_file(file)
    rows = {key.rpartition("/")[0] for key in stored if key.startswith(head)}
    model = zoo.reference_class(case, head).from_pretrained(folder, attn_implementation="eager").eval()
    assert len({row.split("/")[1] for row in rows}) >= (1 if case == "vit" else 2)
    for row in rows:
        given = {key.rpartition("/")[2]: torch.from_numpy(value) for key, value in stored.items() if row + "/" in key}
        if "tokens" in given:
            ids = torch.cat((given["input_ids"], given["tokens"]))[None]
            expected = model(input_ids=ids).logits[0, len(given["input_ids"]) - 1 : -1]
            assert torch.equal(expected.argmax(-1), given["tokens"])
            assert (expected - given["numbers"]).abs().max() < 1e-5
            continue
        names = ("input_ids", "token_type_ids", "pixel_values")
        inputs = {name: given[name][None] for name in names if name in given}
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if head == "MultipleChoice":
            inputs = {name: value[:, None] for name, value in inputs.items()}
        assert torch.equal(zoo.numbers(model(**inputs))[0], given["numbers"])


def test_wide_outputs_are_thinned(tmp_path: Path) -> None:
    """Logits over a large vocabulary are kept for a few tokens, the last among them; small ones whole."""
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 80}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=1500, **small)).save_pretrained(tmp_path / "model")
    verify_against(tmp_path / "model", save_fixture=tmp_path / "f.safetensors")
    stored = load_file(tmp_path / "f.safetensors")
    assert stored["CausalLM/texts/0/kept"].tolist() == [0, 5, 10, 15, 20, 25, 30, 36]
    assert stored["CausalLM/texts/0/numbers"].shape == (8, 1500)
    assert stored["Model/texts/0/numbers"].shape == (37, 32) and "Model/texts/0/kept" not in stored
    assert stored["CausalLM/greedy/0/numbers"].shape == (32, 1500)
    assert verify_against(tmp_path / "model", tmp_path / "f.safetensors").values["passed"]
    row = {"numbers": np.arange(40.0).reshape(20, 2), "input_ids": np.arange(20)}
    assert fixture.thin(row) is row


@pytest.mark.parametrize("name", ["numbers", "input_ids", "tokens"])
def test_a_changed_fixture_fails(name: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that are not ours are seen: one number, one id of the input, one token that greedy search chose."""
    folder, file, _ = made["gpt2", "CausalLM"]
    key = {"numbers": "CausalLM/texts/2/numbers", "input_ids": "CausalLM/long/0/input_ids"}.get(
        name, "CausalLM/greedy/0/tokens"
    )
    change(file, tmp_path / "f.safetensors", lambda t: t[key].reshape(-1).__setitem__(7, (t[key].flat[7] + 3) % 90))
    assert verify(str(folder), against=str(tmp_path / "f.safetensors"), json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and found["max_abs_diff"] > 1e-3
    assert (found["greedy"]["equal"] < 32) is (name == "tokens")


def change(file: Path, out: Path, edit: Any, **metadata: str) -> None:
    """Rewrite a fixture with other tensors or metadata."""
    with safe_open(file, framework="numpy") as opened:
        facts = opened.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, out, metadata={**facts, **metadata})


def test_other_weights_are_refused(made: Any, tmp_path: Path) -> None:
    """One bit of one weight makes another checkpoint; the message names both hashes."""
    folder, file, _ = made["bert", "SequenceClassification"]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model = checkpoint.load_model(other)
    with torch.no_grad():
        model.head.project.bias[0] += 1e-6
    checkpoint.save_model(model, other)
    with pytest.raises(InputError, match="made with other weights") as error:
        verify_against(other, file)
    assert hash_weights(folder) in error.value.found and hash_weights(other) in error.value.expected


def test_a_head_of_a_fixture(made: Any) -> None:
    folder, file, _ = made["bert", "SequenceClassification"]
    found = verify_against(folder, file, head="text-classification").values
    assert found["compared"] == ["SequenceClassification"] and found["passed"]
    with pytest.raises(InputError, match="no answers of MaskedLM"):
        verify_against(folder, file, head="MaskedLM")
    with pytest.raises(InputError, match="texts of its own"):
        verify_against(folder, file, texts=["a"])


def test_broken_fixtures(made: Any, tmp_path: Path) -> None:
    """Every kind of file that is not one ends in one message."""
    folder, file, _ = made["bert", "SequenceClassification"]
    whole, bad = file.read_bytes(), tmp_path / "bad.safetensors"
    for content in (b"", b"x" * 100, whole[:-50], whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match="not a fixture"):
            verify_against(folder, bad)
    with pytest.raises(FormatError, match="not a fixture"):
        verify_against(folder, folder / "model.safetensors")
    with pytest.raises(InputError, match="nothing to compare with"):
        verify_against(folder, tmp_path)
    key = "Model/texts/0/"
    for edit in (
        lambda t: t.pop(key + "numbers"),
        lambda t: t.pop(key + "input_ids"),
        lambda t: t.update({"strange": np.zeros(1)}),
        lambda t: t.update({key + "input_ids": np.full(37, 10**6)}),
        lambda t: t.update({key + "input_ids": np.zeros((2, 2, 2))}),
        lambda t: t.update({key + "token_type_ids": np.full(37, 9)}),
    ):
        change(file, bad, edit)
        with pytest.raises(FormatError, match="fixture"):
            verify_against(folder, bad)
    change(file, bad, lambda t: None, format="other")
    with pytest.raises(FormatError, match="not a fixture"):
        verify_against(folder, bad)


def test_a_fixture_never_replaces_another_file(made: Any, tmp_path: Path) -> None:
    """A slip of the finger must not cost a checkpoint; an older fixture is replaced."""
    folder, file, _ = made["vit", "ImageClassification"]
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(InputError, match="not a fixture"):
        verify_against(folder, save_fixture=weights)
    assert weights.read_bytes() == before
    with pytest.raises(InputError, match="folder"):
        verify_against(folder, save_fixture=tmp_path)
    (tmp_path / "old.safetensors").write_bytes(file.read_bytes())
    verify_against(folder, save_fixture=tmp_path / "old.safetensors", head="Model")
    assert {key.split("/")[0] for key in load_file(tmp_path / "old.safetensors")} == {"Model"}
