"""Distillation from a teacher's folder to a student's: what it keeps, who reads it, and that a kill changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_languages, two_languages, write_rows

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.export.receipt import check_receipt
from lmworks.verbs.distilling import distill
from lmworks.verbs.finetuning import evaluate_task, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).with_name("training") / "kill_finetune.py"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LMWORKS_THREADS": "1"}
QUICK: dict[str, Any] = {"epochs": 1, "lr": 2e-3, "batch_size": 8, "dtype": "fp32"}


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that tells English from German, a body without a head, and sentences."""
    root = tmp_path_factory.mktemp("languages")
    make_languages(root, data_folder, 120)
    settings = {"validation": root / "validation.jsonl", "task": "text-classification", **QUICK, "epochs": 4}
    finetune(root / "body", root / "train.jsonl", root / "teacher", **settings)
    return root


def learn(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Distil the teacher; return the report's values."""
    settings = {"validation": root / "validation.jsonl", **QUICK, **changes}
    return distill(root / "teacher", root / "train.jsonl", out, **settings).values


def test_a_student_of_one_layer_is_a_model_folder_that_transformers_reads(languages: Path, tmp_path: Path) -> None:
    """Scores are those of transformers' pipeline; the report has both models, the receipt names the teacher."""
    out = tmp_path / "out"
    values = learn(languages, out, layers=1, temperature=3.0, epochs=2)
    rows = [json.loads(line) for line in (languages / "validation.jsonl").read_text().splitlines()]
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    said = transformers.pipeline("text-classification", model=str(out), device="cpu")(texts)
    right = sum(one["label"] == label for one, label in zip(said, labels, strict=True)) / len(labels)
    teacher = evaluate_task(languages / "teacher", languages / "validation.jsonl").values["accuracy"]
    assert values["accuracy"] == right and values["teacher_scores"]["accuracy"] == teacher
    assert values["kept"] == right / teacher >= 0.9
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(languages / "teacher").num_parameters()
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(out).num_parameters()
    assert values["size_share"] == ours / theirs < 1 and values["parameters"] == ours
    assert 0 < values["time_share"] < 1
    assert set(values["baselines"]) == {"majority", "frozen features", "student before distillation"}
    receipt = json.loads((out / "lmworks.json").read_text())
    assert receipt["teacher"] == str(languages / "teacher") and len(receipt["teacher_sha256"]) == 64
    assert receipt["settings"]["temperature"] == 3.0 and check_receipt(out)["passed"]
    assert "Student beside teacher" in (out / "report.html").read_text()
    assert not list(out.rglob("last.*")) and not out.with_name("out.partial").exists()


def test_a_student_of_another_width_learns_through_a_projection_that_it_does_not_keep(
    languages: Path, tmp_path: Path
) -> None:
    config = transformers.BertConfig.from_pretrained(languages / "body", hidden_size=16, num_hidden_layers=1)
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained(tmp_path / "small")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(languages / "body" / name, tmp_path / "small" / name)
    values = learn(languages, tmp_path / "out", student=str(tmp_path / "small"), epochs=2, hidden="mse")
    model, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and model.config.hidden_size == 16
    assert model.num_parameters() == values["parameters"] and values["new_head"]


def test_an_adapter_can_teach(languages: Path, tmp_path: Path) -> None:
    """LoRA is merged, so that its layers can be copied: as many layers as the teacher has say what it says."""
    settings = {"validation": languages / "validation.jsonl", "task": "text-classification", **QUICK}
    tuned = finetune(languages / "body", languages / "train.jsonl", tmp_path / "lora", method="lora", **settings)
    values = distill(
        tmp_path / "lora", languages / "train.jsonl", tmp_path / "out", validation=languages / "validation.jsonl",
        layers=2, **QUICK,
    ).values  # fmt: skip
    assert values["teacher_scores"]["accuracy"] == tuned.values["accuracy"]
    assert values["baselines"]["student before distillation"] == values["teacher_scores"]


@pytest.mark.parametrize("task", ["fill-mask", "text-generation"])
def test_language_models_are_distilled(task: str, languages: Path, data_folder: Path, tmp_path: Path) -> None:
    """The perplexity in the report is that of the words alone, for both models."""
    config: Any = transformers.BertConfig.from_pretrained(languages / "body")
    torch.manual_seed(0)
    if task == "fill-mask":
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    else:
        gpt2 = transformers.GPT2Config(vocab_size=config.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=160)
        transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "teacher")
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(languages / "body" / name, tmp_path / "teacher" / name)
    texts = [text for text, _ in two_languages(data_folder, skip=0, count=30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = distill(
        tmp_path / "teacher", tmp_path / "train.jsonl", tmp_path / "out", validation=tmp_path / "train.jsonl",
        task=task, layers=1, alpha=0.1, **{**QUICK, "epochs": 2},
    ).values  # fmt: skip
    assert values["student_scores"]["perplexity"] < 0.9 * values["teacher_scores"]["perplexity"]
    assert values["perplexity"] == values["student_scores"]["perplexity"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, "the teacher has fewer layers"),
        ({"keep_layers": "0,2"}, "no such layers"),
        ({"keep_layers": "a"}, "holds no numbers"),
        ({"layers": 1, "keep_layers": "1"}, "begins in one way"),
        ({"alpha": 0.0, "hidden_weight": 0.0}, "nothing would be learned"),
        ({"alpha": 1.5}, "--alpha is out of range"),
        ({"temperature": 0.0}, "--temperature is out of range"),
        ({"lr": 0.0}, "--lr is out of range"),
        ({"temprature": 1.0}, "no knob"),
        ({"task": "token-classification"}, "which column holds the words"),
        ({"task": "fill-mask"}, "no head for fill-mask"),
        ({"task": "feature-extraction"}, "no distillation for the task"),
        ({"student": "body2"}, "different tokenizers"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, Any], message: str, languages: Path, tmp_path: Path
) -> None:
    """Nothing is left behind."""
    if "student" in settings:
        shutil.copytree(languages / "body", languages / "body2", dirs_exist_ok=True)
        words = (languages / "body" / "vocab.txt").read_text().split("\n")
        words[-2], words[-3] = words[-3], words[-2]
        (languages / "body2" / "vocab.txt").write_text("\n".join(words))
        settings = {"student": str(languages / "body2")}
    with pytest.raises(InputError, match=message):
        learn(languages, tmp_path / "out", **{"layers": None, **settings})
    assert list(tmp_path.iterdir()) == []


def test_labels_that_the_teacher_lacks_are_refused(languages: Path, tmp_path: Path) -> None:
    rows = [("a house", "en"), ("ein Haus", "ger")] * 20
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError) as error:
        distill(languages / "teacher", tmp_path / "train.jsonl", tmp_path / "out", layers=1)
    assert 'does not know the label "ger"' in str(error.value) and "en, de" in str(error.value)


def test_the_command_line_says_what_it_would_cost(
    languages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", str(languages / "teacher"), str(languages / "train.jsonl"), "-o", str(tmp_path / "out")]
    assert main([*words, "--layers", "1", "--dry-run", "--json", "--dtype", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0 and list(tmp_path.iterdir()) == []
    assert main([*words, "--layers", "7"]) == 2
    assert "--layers 7" in capsys.readouterr().err


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_changes_no_bit(kills: int, languages: Path, tmp_path: Path) -> None:
    """The teacher is in no checkpoint, and read anew by the resumed run."""
    shutil.copytree(languages, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:24] + lines[-24:]))
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills), "0", "distill"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == [] and found["kills"] == kills
