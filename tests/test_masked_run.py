"""`lmworks train --objective masked-lm` and what follows: evaluate, fill-mask, finetune, resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import lmworks
from lmworks.base.files import sha256
from lmworks.cli import main
from lmworks.text.sample import make_documents

KNOBS = ("--objective masked-lm --hidden-size 32 --layers 2 --heads 2 --context 32 --batch-size 8 --vocab-size 300 "
         "--eval-every 20 --dtype fp32 --dropout 0.1 --whole-words --lr 1e-2").split()  # fmt: skip
ONE_THREAD = {**os.environ, "LMWORKS_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a held-out text, and a model that was trained on the first."""
    root = tmp_path_factory.mktemp("masked")
    (root / "text.txt").write_text("".join(d.text for d in make_documents(30, seed=1)), encoding="utf-8")
    (root / "held.txt").write_text("".join(d.text for d in make_documents(3, seed=2)), encoding="utf-8")
    subprocess.run(command(root / "text.txt", root / "model"), env=ONE_THREAD, check=True, capture_output=True)
    return root


def command(text: Path, out: Path) -> list[str]:
    """Return the command that trains in a process of its own."""
    return [sys.executable, "-m", "lmworks", "train", str(text), "-o", str(out), "--steps", "80", *KNOBS]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Return what a command prints as JSON."""
    code = main([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


def test_it_learns_and_says_so(root: Path) -> None:
    report = json.loads((root / "model" / "report.json").read_text())
    assert report["validation_loss"] < 0.75 * math.log(report["vocab_size"])  # where it began
    assert 0 < report["commonest_token_accuracy"] < 0.2
    assert len(report["samples"]) == 3
    receipt = json.loads((root / "model" / "lmworks.json").read_text())
    assert receipt["task"] == "fill-mask"
    assert receipt["files"]["model.safetensors"]["sha256"] == sha256(root / "model" / "model.safetensors")
    assert "<svg" in (root / "model" / "report.html").read_text()


def test_evaluate_is_transformers_with_one_token_hidden_at_a_time(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (root / "held.txt").read_text()[:300].rpartition("\n")[0]
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    values = run(capsys, "evaluate", root / "model", tmp_path / "short.txt")
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    model = AutoModelForMaskedLM.from_pretrained(root / "model").eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin, end, mask = (tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
    pseudo, seventh, right = [], [], []
    with torch.no_grad():
        for number, start in enumerate(range(0, len(ids), 30)):
            window = [begin, *ids[start : start + 30], end]
            places = range(1, len(window) - 1)
            for place in places:
                hidden = [*window[:place], mask, *window[place + 1 :]]
                logits = model(torch.tensor([hidden])).logits[0, place].double()
                pseudo.append(float(logits.log_softmax(-1)[window[place]]))
            rows = list(places)[number % 7 :: 7]
            hidden = [mask if place in rows else id for place, id in enumerate(window)]
            logits = model(torch.tensor([hidden])).logits[0].double().log_softmax(-1)
            seventh += [float(logits[place, window[place]]) for place in rows]
            right += [int(logits[place].argmax()) == window[place] for place in rows]
    assert values["pseudo_tokens"] == len(ids)
    assert values["pseudo_perplexity"] == pytest.approx(math.exp(-np.mean(pseudo)), rel=1e-4)
    assert values["perplexity"] == pytest.approx(math.exp(-np.mean(seventh)), rel=1e-4)
    assert values["accuracy"] == pytest.approx(np.mean(right))
    assert values["hidden_tokens"] == len(right)
    low, high = values["intervals"]["perplexity"]
    assert low < values["perplexity"] < high


def test_it_fills_masks_and_can_be_fine_tuned(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in (root / "held.txt").read_text().splitlines() if len(line.split()) > 5)
    words = line.split()[:6]
    words[3] = "[MASK]"
    fills = run(capsys, "fill-mask", root / "model", " ".join(words), "--top-k", "3")
    assert len(fills) == 3
    assert sum(fill["score"] for fill in fills) < 1
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": str(i % 2)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = lmworks.finetune(root / "model", tmp_path / "rows.jsonl", tmp_path / "out", task="text-classification",
                              epochs=1)  # fmt: skip
    assert report.values["new_head"]
    again = lmworks.finetune(root / "model", root / "text.txt", tmp_path / "more", task="fill-mask", epochs=1)
    assert again.values["validation_loss"] > 0


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_same_bits(root: Path, tmp_path: Path) -> None:
    words = command(root / "text.txt", tmp_path / "out")
    process = subprocess.Popen(words, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "out.partial" / "training" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"val_loss"') >= 1):
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    if not (tmp_path / "out").exists():  # as good as always
        done = subprocess.run([*words, "--resume"], env=ONE_THREAD, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(root / "model" / "model.safetensors")


@pytest.mark.parametrize(("words", "said"), [
    (("--family", "llama"), "llama is not made for masked-lm"),
    (("--arch", "lstm"), "both sides"),
    (("--objective", "maskedlm"), "did you mean"),
    (("--context", "100000"), "shorter than one window"),
])  # fmt: skip
def test_what_does_not_go_together(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    given = [*KNOBS[:2], *KNOBS[10:14], *words] if "--objective" not in words else list(words)
    assert main(["train", str(root / "text.txt"), "-o", str(tmp_path / "x"), "--steps", "2", *given]) == 2
    shown = capsys.readouterr()
    assert said in " ".join((shown.err + shown.out).replace("│", " ").split()).lower().replace("│", "")
    assert not (tmp_path / "x").exists()


def test_build_and_other_objectives_refuse(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x")
    assert main(["build", str(root / "text.txt"), "-o", out, "--objective", "masked-lm"]) == 2
    assert "the page of build writes texts" in capsys.readouterr().err
    assert main(["train", str(root / "text.txt"), "-o", out, "--family", "bert"]) == 2
    assert "bert is not made for causal-lm" in capsys.readouterr().err
    assert main(["train", str(root / "text.txt"), "-o", out, "--whole-words"]) == 2
    assert "--whole-words belongs to masked-lm" in capsys.readouterr().err
    assert main(["train", str(root / "text.txt"), "-o", out, "--steps", "3", "--dry-run", *KNOBS]) == 0
    assert "parameters" in capsys.readouterr().out
