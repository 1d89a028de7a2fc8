"""A run as a whole: settings, the corpus, killing and resuming by the command line, what stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lmworks.base.errors import InputError
from lmworks.base.files import read_json, sha256
from lmworks.cli import main
from lmworks.verbs.corpus import count_bytes, read_corpus
from lmworks.verbs.settings import SIZES, Settings

KNOBS = (
    "--eval-every 10 --layers 1 --hidden-size 32 --heads 2 --context 32 --batch-size 4 --vocab-size 300 "
    "--dtype fp32 --dropout 0.1"
).split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty small documents of the built-in language."""
    from lmworks.text.sample import make_documents

    folder = tmp_path_factory.mktemp("texts")
    for i, document in enumerate(make_documents(40, seed=3)):
        (folder / f"{i:02}.txt").write_text(document.text * 3, encoding="utf-8")
    return folder


def start(texts: Path, out: Path, *more: str, steps: int = 60) -> subprocess.Popen[str]:
    """Start training in a process of its own."""
    words = [sys.executable, "-m", "lmworks", "train", str(texts), "-o", str(out), "--steps", str(steps), *KNOBS, *more]
    environment = {**os.environ, "LMWORKS_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; return its exit code and what it wrote on standard error."""
    _, message = process.communicate(timeout=200)
    return process.returncode, message


def wait_for_step(out: Path, step: int) -> None:
    """Wait until metrics.jsonl of a running training holds this step."""
    metrics = out.with_name(f"{out.name}.partial") / "training" / "metrics.jsonl"
    for _ in range(3000):
        if metrics.exists() and metrics.read_text().count('"loss"') >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def test_a_killed_run_resumes_to_the_same_bits(texts: Path, tmp_path: Path) -> None:
    """C26: resuming changes results."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert end(start(texts, whole))[0] == 0
    running = start(texts, killed)
    wait_for_step(killed, 15)
    running.kill()
    end(running)
    assert not killed.exists()
    code, message = end(start(texts, killed))
    assert code == 2 and "--resume" in message
    code, message = end(start(texts, killed, "--resume", "--lr", "0.5"))
    assert code == 2 and "lr=0.5" in message
    assert end(start(texts, killed, "--resume"))[0] == 0
    assert sha256(killed / "model.safetensors") == sha256(whole / "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
    assert read_json(killed / "report.json")["perplexity"] == read_json(whole / "report.json")["perplexity"]


def test_ctrl_c_saves_and_says_how_to_go_on(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(texts, out, steps=100_000)
    wait_for_step(out, 5)
    running.send_signal(signal.SIGINT)
    code, message = end(running)
    assert code == 130
    assert "everything is saved" in message and "--resume" in message and "Traceback" not in message
    assert not out.exists() and (tmp_path / "out.partial" / "training").is_dir()


def test_a_diverging_run_ends_in_one_message(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaN stops before the optimizer step, and the message says what to do."""
    assert main(["train", str(texts), "-o", str(tmp_path / "out"), *KNOBS, "--lr", "10", "--max-grad-norm", "1e9"]) in (
        0,
        2,
    )
    message = capsys.readouterr().err
    assert "Traceback" not in message
    if not (tmp_path / "out").exists():
        assert "--lr" in message


def test_settings_follow_the_dial_and_the_flags() -> None:
    full = replace(Settings(), size="small", layers=3).resolve(10_000_000)
    assert full.layers == 3 and full.hidden_size == SIZES["small"]["hidden_size"]
    assert full.vocab_size == SIZES["small"]["largest_vocab"]
    assert Settings().resolve(1_000).vocab_size == 512
    assert {name for name, value in full.to_dict().items() if value is None} == {"embedding_size", "window"}
    assert Settings.from_dict(full.to_dict()) == full
    with pytest.raises(InputError, match="unknown setting"):
        Settings.from_dict({"layer": 2})
    for bad in ({"dropout": 0.99}, {"batch_size": 10, "accumulation": 3}, {"hidden_size": 30, "heads": 4}):
        with pytest.raises(InputError):
            replace(Settings(), **bad).resolve(10**6)


def test_the_split_of_a_corpus_is_seeded_and_disjoint(texts: Path) -> None:
    one, same, other = (read_corpus(texts, seed=seed) for seed in (1, 1, 2))
    assert one == same and one.validation != other.validation
    assert not {d.text for d in one.train} & {d.text for d in one.validation}
    share = one.validation_bytes / (one.train_bytes + one.validation_bytes)
    assert 0.05 < share < 0.2
    assert one.sha256 == other.sha256


def test_the_built_in_language_has_a_floor() -> None:
    corpus = read_corpus(None)
    assert corpus.floor is not None
    assert 0.3 < corpus.floor / corpus.validation_bytes < 1.5
    assert corpus.train_bytes + corpus.validation_bytes == pytest.approx(1_200_000, rel=0.01)
    assert count_bytes(corpus.validation) == corpus.validation_bytes


def test_a_character_tokenizer_that_meets_a_new_character_has_no_bits_per_byte(tmp_path: Path) -> None:
    """C29: an unknown token would make text look easy, so bits per byte is null."""
    (tmp_path / "a.txt").write_text("the same words again and again. " * 100 + "ß" * 200, encoding="utf-8")
    out = tmp_path / "out"
    assert main(["train", str(tmp_path / "a.txt"), "-o", str(out), *KNOBS, "--tokenizer", "char", "--steps", "5"]) == 0
    values = read_json(out / "report.json")
    assert values["bits_per_byte"] is None and values["ngram_bits_per_byte"] is None
    assert values["perplexity"] > 1
