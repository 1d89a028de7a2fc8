"""`quantize`, `prune` and `--budget` on a classifier that was really trained: folders that every verb opens."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_languages, two_languages, write_rows

import lmworks
from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.export.merge import merge
from lmworks.export.receipt import check_receipt
from lmworks.models.families import read_config
from lmworks.runtime.predictor import load
from lmworks.text.labelled import Labelled
from lmworks.training.tuning import Tuning
from lmworks.verbs.compress_budget import compress, report_path
from lmworks.verbs.compress_knobs import Pruning, Quantizing
from lmworks.verbs.compressing import prune, quantize
from lmworks.verbs.finetuning import evaluate_task, finetune, match_labels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of English and German, its training data and others to judge by."""
    root = tmp_path_factory.mktemp("compress")
    make_languages(root, data_folder, 150)
    write_rows(root / "judge.jsonl", two_languages(data_folder, skip=500, count=60))
    finetune(root / "body", root / "train.jsonl", root / "model", validation=root / "judge.jsonl",
             task="text-classification", epochs=4, lr=2e-3, batch_size=8, dtype="fp32")  # fmt: skip
    return root


def data(root: Path) -> dict[str, Path]:
    return {"data": root / "train.jsonl", "validation": root / "judge.jsonl"}


@pytest.mark.parametrize(
    "how",
    [
        Quantizing(), Quantizing(bits=4, group=16), Quantizing(activations="static", percentile=99.9),
        Quantizing(bits=4, tolerance=1e-11), Quantizing(asymmetric=True, embeddings=False), Quantizing(per_tensor=True),
    ],
    ids=["int8", "int4", "static", "int4-mixed", "asymmetric", "tensor"],
)  # fmt: skip
def test_a_quantized_folder_answers_and_is_scored(how: Quantizing, root: Path, tmp_path: Path) -> None:
    """The score in the report is that of `evaluate`; the file shrinks; the receipt holds."""
    report = quantize(root / "model", tmp_path / "out", how=how, **data(root))
    values = report.values
    assert values["scores_before"]["accuracy"] >= 0.9
    assert values["scores"]["accuracy"] >= values["scores_before"]["accuracy"] - 0.05
    assert values["size_share"] < (0.85 if not how.embeddings or how.tolerance else 0.45)
    assert check_receipt(tmp_path / "out")["passed"]
    found = evaluate_task(tmp_path / "out", root / "judge.jsonl").values
    assert found["accuracy"] == pytest.approx(values["scores"]["accuracy"], abs=0.01)
    label = load(tmp_path / "out")("a man is standing in the street")[0].label
    assert label == "en"
    if how.tolerance is not None:
        assert values["divergence"] <= how.tolerance and values["skipped"]


def test_zeros_come_gradually_while_it_is_trained_and_transformers_reads_them(root: Path, tmp_path: Path) -> None:
    """Nine of ten weights gone: trained, it knows what it forgets when they go at once."""
    once = prune(root / "model", tmp_path / "once", how=Pruning(sparsity=0.9), **data(root)).values
    how = Pruning(sparsity=0.9, epochs=4, lr=2e-3, batch_size=8)
    report = prune(root / "model", tmp_path / "out", how=how, **data(root))
    values = report.values
    assert values["sparsity"] == pytest.approx(0.9, abs=1e-3) == once["sparsity"]
    assert values["scores"]["accuracy"] >= max(0.75, once["scores"]["accuracy"] + 0.1)
    assert "Zeros take as much room" in report.notes[0]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    named = theirs.named_parameters()
    zeros = [float((w == 0).float().mean()) for name, w in named if "intermediate.dense.w" in name]
    assert min(zeros) > 0.5


def test_neurons_and_ranks_go_and_the_network_recovers(root: Path, tmp_path: Path) -> None:
    how = Pruning(structured=True, sparsity=0.5, importance="taylor", epochs=1, lr=1e-3, batch_size=8)
    values = prune(root / "model", tmp_path / "narrow", how=how, **data(root)).values
    assert values["intermediate_size"] == 32 and values["published_layout"]
    assert values["parameters"] < values["parameters_before"]
    assert values["scores"]["accuracy"] >= 0.85
    heads = prune(root / "model", tmp_path / "heads", how=Pruning(structured=True, sparsity=0.1, heads=0.5))
    assert heads.values["num_attention_heads"] == 1 and not heads.values["published_layout"]
    load(tmp_path / "heads")("ein Mann")
    ranks = prune(root / "model", tmp_path / "ranks", how=Pruning(energy=0.6, epochs=1, batch_size=8), **data(root))
    assert ranks.values["ranks"] and not ranks.values["published_layout"]
    assert ranks.values["scores"]["accuracy"] >= 0.85


def test_a_budget_picks_a_folder_or_refuses(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held: the picked folder opens, has the score and the size of its row. Not: exit 1, a report, and no folder."""
    words = ["quantize", str(root / "model"), "-o", str(tmp_path / "out"), "--data", str(root / "train.jsonl"),
             "--validation", str(root / "judge.jsonl"), "--candidates", "int8,onnx-int8", "--json",
             "--text-column", "text", "--label-column", "label"]  # fmt: skip
    assert main([*words, "--budget", "accuracy>=-5%, size<=0.5x"]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in values["candidates"]}
    assert list(rows) == ["fp32", "int8", "onnx-int8"] and values["held_out"] == 120
    picked = rows[values["picked"]]
    assert picked["size_share"] <= 0.5 and picked["accuracy"] >= rows["fp32"]["accuracy"] - 0.05
    assert all(row["memory"] > 20 and row["latency"] > 0 for row in rows.values())
    predictor = load(tmp_path / "out")
    said = [json.loads(line) for line in (root / "judge.jsonl").read_text().splitlines()]
    right = [predictor(row["text"])[0].label == row["label"] for row in said]
    assert sum(right) / len(right) == pytest.approx(picked["accuracy"], abs=0.01)
    assert check_receipt(tmp_path / "out")["passed"]

    words[3] = str(tmp_path / "none")
    (tmp_path / "none.try.staged" / "int8").mkdir(parents=True)  # as a killed run leaves it
    assert main([*words, "--budget", "accuracy>=+0%, speed>=500x"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["picked"] is None and values["broken"]["int8"] == ["speed>=500x"]
    assert not (tmp_path / "none").exists()
    page = report_path(tmp_path / "none").read_text()
    assert "<svg" in page and "int8" in page and "nothing was written" in page
    assert {path.name for path in tmp_path.iterdir()} == {"out", "none.report.html"}  # nothing half-made is left


def test_what_cannot_be_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", root / "model"
    for how in (Quantizing(group=32, per_tensor=True), Quantizing(group=32, activations="dynamic"),
                Quantizing(tolerance=0.1), Quantizing(activations="static"), Quantizing(percentile=3),
                Quantizing(skip=("nothing",)), Quantizing(percentile=99), Quantizing(tolerance=-1)):  # fmt: skip
        with pytest.raises(InputError):
            quantize(model, out, how=how)
    for pruning in (Pruning(sparsity=1.5), Pruning(heads=0.5), Pruning(energy=0.5, structured=True), Pruning(epochs=1),
                    Pruning(structured=True, importance="taylor"), Pruning(energy=0.5, sparsity=0.9),
                    Pruning(importance="taylor"), Pruning(lr=1.0), Pruning(energy=0.5, scope="layer")):  # fmt: skip
        with pytest.raises(InputError):
            prune(model, out, how=pruning)
    for budget, candidates in (("speed>=2", ""), ("accuracy>=-1%", "int9")):
        with pytest.raises(InputError):
            compress(model, out, budget=budget, candidates=candidates, **data(root))
    with pytest.raises(InputError, match="no perplexity"):
        compress(model, out, budget="perplexity<=+1%", candidates="fp32", **data(root))
    with pytest.raises(InputError, match="replace the model itself"):
        quantize(model, model, overwrite=True)
    with pytest.raises(InputError, match="a budget chooses") as caught:
        compress(model, out, budget="size<=1x", how=Pruning(sparsity=0.9), **data(root))
    assert caught.value.found == "--sparsity"
    with pytest.raises(InputError, match="those of --data"):
        quantize(model, out, text_column="nope")
    assert main(["quantize", str(model), "-o", str(out), "--budget", "speed>=2x"]) == 2
    assert main(["prune", str(model), "-o", str(out), "--candidates", "int8"]) == 2
    assert not any(tmp_path.iterdir())
    quantize(model, out)
    with pytest.raises(InputError, match="smaller again"):
        quantize(out, tmp_path / "twice")
    with pytest.raises(InputError, match="own numbers"):
        load(out, dtype="bf16")


def test_labels_that_the_model_does_not_have_are_refused(root: Path, tmp_path: Path) -> None:
    """Before anything is trained: the message names the row, and what the model knows."""
    (tmp_path / "other.csv").write_text("text,label\n" + "a man,0\nein Mann,1\n" * 10)
    with pytest.raises(InputError, match="is not one of the model's labels") as caught:
        prune(root / "model", tmp_path / "out", how=Pruning(sparsity=0.5, epochs=1), data=tmp_path / "other.csv")
    assert "en" in caught.value.expected and "other.csv" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_labels_are_matched_as_evaluate_matches_them(root: Path) -> None:
    """0, 1 … for labels without names, and numbers for a model that gives a number."""
    rows = Labelled("text-classification", ["a", "b"], ["1", "0"], ("0", "1"), "rows")
    config = read_config(root / "model")
    plain, number = (replace(config, labels=labels) for labels in (("LABEL_0", "LABEL_1"), ("LABEL_0",)))
    assert match_labels(rows, plain).references == ["LABEL_1", "LABEL_0"]
    assert match_labels(rows, number).references == [1.0, 0.0]


def test_a_folder_that_fails_spoils_no_budget(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that cannot be read nor what costs more than the model counts."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_bytes((root / "model/config.json").read_bytes())
    monkeypatch.setattr("lmworks.verbs.compress_trial.weigh", lambda *args: 100.0)
    values = compress(root / "model", tmp_path / "out", budget="accuracy>=-1%", candidates="fp32",
                      also=[tmp_path / "broken"], **data(root)).values  # fmt: skip
    assert values["picked"] == "fp32" and values["candidates"][1]["failed"]
    assert "no graph was measured" in values["recommendations"]["browser"]


@pytest.mark.parametrize("how", [Quantizing(), Quantizing(bits=4), Pruning(energy=0.6)], ids=["8 bits", "4", "factors"])
def test_an_adapter_learns_on_a_compact_model_and_is_merged(
    root: Path, tmp_path: Path, how: Quantizing | Pruning
) -> None:
    """The model answers before it is copied, so packed matrices are there; merged, answers stay."""
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    (prune if isinstance(how, Pruning) else quantize)(root / "model", small, how=how)
    finetune(small, root / "judge.jsonl", tuned, tuning=Tuning(method="lora", epochs=1))
    known = lmworks.load(tuned)("ein Mann steht da")[0]
    assert known.score > 0.5
    if how == Quantizing():  # inputs of the merged matrices are not rounded any more: its limit may be too narrow
        return
    assert merge(tuned, tmp_path / "merged").values["max_abs_diff"] < 1e-3
    found = lmworks.load(tmp_path / "merged")("ein Mann steht da")[0]
    assert (found.label, found.score) == (known.label, pytest.approx(known.score, abs=1e-3))
