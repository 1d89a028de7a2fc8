"""`lmworks compare`: every number against `evaluate`, `ngram eval`, metrics.jsonl or scikit-learn; what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

import lmworks
from lmworks.base.errors import FormatError
from lmworks.cli import main
from lmworks.evaluation.curves import read_curve
from lmworks.evaluation.significance import mcnemar
from lmworks.text.sample import make_documents
from lmworks.verbs import ngrams
from lmworks.verbs.settings import Settings

SMALL: dict[str, Any] = {
    "hidden_size": 24, "context": 48, "batch_size": 4, "vocab_size": 300, "steps": 40, "eval_every": 10, "lr": 1e-2
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks and two n-gram models of one text, two held-out texts, two classifiers and their test data."""
    root = tmp_path_factory.mktemp("compared")
    text = "".join(document.text for document in make_documents(40, seed=1))
    (root / "text.txt").write_text(text, encoding="utf-8")
    (root / "held.txt").write_text("".join(d.text for d in make_documents(6, seed=2)), encoding="utf-8")
    (root / "other.txt").write_text("It was the best of times, it was the worst of times.\n" * 40, encoding="utf-8")
    lmworks.train(root / "text.txt", root / "gpt", settings=Settings(layers=1, heads=2, dtype="fp32", **SMALL))
    lmworks.train(root / "text.txt", root / "lstm", settings=Settings(arch="lstm", layers=1, **SMALL))
    ngrams.train(root / "text.txt", root / "bpe", kind="bpe", vocab_size=300, order=3)
    ngrams.train(root / "text.txt", root / "words", order=3)
    rng = np.random.default_rng(0)
    for name, n, share in (("rare", 40, 0.1), ("often", 40, 0.9), ("test", 80, 0.3)):
        labels = ["pos" if rng.random() < share else "neg" for _ in range(n)]
        rows = [
            {"text": " ".join(rng.choice("the film was a long one".split(), 4)), "label": label} for label in labels
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lmworks.train(root / "text.txt", root / "bert", settings=Settings(
        objective="masked-lm", layers=1, heads=2, dtype="fp32", **{**SMALL, "steps": 4, "eval_every": 2}))  # fmt: skip
    for name, data in (("one", "often"), ("two", "rare")):  # each learns which label is the usual one
        lmworks.finetune(root / "bert", root / f"{data}.jsonl", root / name, task="text-classification", epochs=4,
                         lr=3e-3, batch_size=8)  # fmt: skip
    return root


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Return what a command prints as JSON."""
    code = main([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


def test_language_models_and_counts_on_the_same_texts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(root / name) for name in ("gpt", "lstm", "bpe", "words")]
    page = tmp_path / "page.html"
    values = run(capsys, "compare", *names, "--data", root / "held.txt", root / "other.txt", "--html", page)
    held = values["data"][str(root / "held.txt")]
    for name in names[:2]:
        alone = lmworks.evaluate(name, root / "held.txt").values
        for key in ("bits_per_byte", "perplexity", "perplexity_per_word", "entropy", "next_token_accuracy"):
            assert held["models"][name][key] == pytest.approx(alone[key], rel=1e-5), key
        low, high = alone["intervals"]["bits_per_byte"]
        assert low < alone["bits_per_byte"] < high
        report = json.loads((Path(name) / "report.json").read_text())
        runs = values["runs"][name]
        assert runs["parameters"] == report["parameters"]
        assert runs["validation_bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=0.05)
    alone = ngrams.evaluate(names[2], root / "held.txt").values
    size = len((root / "held.txt").read_bytes())
    assert held["models"][names[2]]["perplexity"] == pytest.approx(alone["perplexity_with_blank_lines"], rel=1e-9)
    bits = -alone["tokens_with_blank_lines"] * math.log2(1 / alone["perplexity_with_blank_lines"])
    assert held["models"][names[2]]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-9)
    assert values["runs"][names[2]]["parameters"] == json.loads(
        (Path(names[2]) / "lmworks.json").read_text())["ngram"]["parameters"]  # fmt: skip
    away = values["data"][str(root / "other.txt")]
    assert away["models"][names[3]]["bits_per_byte"] is None  # unknown words
    assert names[3] not in away["differences"]
    assert any("cannot be compared" in line for line in main_output(capsys, names, root))
    found = held["differences"][names[1]]["bits_per_byte"]
    gap = held["models"][names[1]]["bits_per_byte"] - held["models"][names[0]]["bits_per_byte"]
    assert found["value"] == pytest.approx(gap, rel=1e-9)
    assert found["low"] <= gap <= found["high"]
    assert found["p"] >= found["p_randomization"]
    across = values["across"]["models"][names[0]]["domain_gap"][str(root / "other.txt")]
    first = [values["data"][str(root / file)]["models"][names[0]] for file in ("held.txt", "other.txt")]
    assert across == pytest.approx(first[1]["bits_per_byte"] - first[0]["bits_per_byte"])
    assert across > 0.3
    assert "<svg" in page.read_text()
    assert "Against" in page.read_text()


def main_output(capsys: pytest.CaptureFixture[str], names: list[str], root: Path) -> list[str]:
    """Return the lines of the report for people."""
    assert main(["compare", names[0], names[3], "--data", str(root / "other.txt")]) == 0
    return capsys.readouterr().out.splitlines()


def test_models_whose_scores_mean_different_things_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmworks.verbs import ngrams

    lines = [f"the cat {name} saw the dog {name}\n" for name in "abcdefgh"]
    (tmp_path / "train.txt").write_text("".join(lines) * 30)
    (tmp_path / "new.txt").write_text("".join(reversed(lines)) * 30 + "the zebra saw the dog\n" + "the cat\n" * 200)
    for name, more in (("kn", {}), ("few", {"vocab_size": 5}), ("mle", {"smoothing": "mle"})):
        ngrams.train(tmp_path / "train.txt", tmp_path / name, order=2, **more)
    paths = [tmp_path / name for name in ("kn", "few", "mle", "kn/model.arpa")]
    found = run(capsys, "compare", *paths, "--data", tmp_path / "new.txt")["data"][str(tmp_path / "new.txt")]
    (same,) = found["differences"]  # few takes half of the words for one, and mle needs infinitely many bits
    assert same == str(tmp_path / "kn/model.arpa")
    assert abs(found["differences"][same]["bits_per_token"]["value"]) < 1e-6
    files = [tmp_path / name for name in ("new.txt", "train.txt")]
    (tmp_path / "train.txt").write_text("".join(lines) * 30 + "an emu\n")
    values = run(capsys, "compare", paths[0], paths[3], "--data", *files)  # both lose words, by the same tokens
    new, old = (values["data"][str(file)]["models"][str(paths[0])]["bits_per_token"] for file in files)
    assert values["across"]["score"] == "bits_per_token"
    assert values["across"]["models"][str(paths[0])]["domain_gap"][str(files[1])] == pytest.approx(old - new)
    assert found["models"][str(tmp_path / "mle")]["perplexity"] is None


def test_how_runs_learned_is_read_from_their_logs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(root / name) for name in ("gpt", "lstm")]
    values = run(capsys, "compare", *names)
    assert values["convergence"]["unit"] == "bits per byte"
    for name in names:
        rows = [json.loads(line) for line in (Path(name) / "training" / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        report = json.loads((Path(name) / "report.json").read_text())
        scale = report["validation_tokens"] / report["validation_bytes"] / math.log(2)
        best = min(loss for _, loss in losses)
        facts = values["runs"][name]
        assert facts["validation_loss"] == best
        assert facts["near_best_step"] == next(step for step, loss in losses if loss <= 1.05 * best)
        step = next(step for step, loss in losses if loss == best)
        train = [row["loss"] for row in rows if "loss" in row and step - 10 < row["step"] <= step]
        assert facts["gap"] == pytest.approx(best - np.mean(train))
        level = values["convergence"]["level"]
        reached = next(step for step, loss in losses if loss * scale <= level + 1e-9)
        assert values["convergence"]["reached"][name]["step"] == reached
    worst = max(values["runs"][name]["validation_bits_per_byte"] for name in names)
    assert values["convergence"]["level"] == pytest.approx(worst)
    easy = run(capsys, "compare", *names, "--reach", "99")["convergence"]
    assert all(row["step"] == 10 for row in easy["reached"].values())
    never = run(capsys, "compare", *names, "--reach", "0.01")["convergence"]
    assert all(row is None for row in never["reached"].values())


def test_an_interrupted_run_is_read_from_where_it_stands(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        partial = tmp_path / f"{name}.partial"
        (partial / "training").mkdir(parents=True)
        shutil.copy(root / "gpt" / "training" / "metrics.jsonl", partial / "training")
        shutil.copy(root / "gpt" / "tokenizer.json", partial)
        (partial / "run.json").write_text(json.dumps({"settings": {}, "data_sha256": "1"}))
    values = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert values["runs"][str(tmp_path / "a")]["task"] == "unfinished run"
    assert values["convergence"]["unit"] == "nats"
    (tmp_path / "b.partial" / "run.json").write_text(json.dumps({"settings": {}, "data_sha256": "2"}))
    assert "convergence" not in run(capsys, "compare", tmp_path / "a", tmp_path / "b")  # other data


def test_classifiers_by_a_paired_test(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(root / name) for name in ("one", "two")]
    found = run(capsys, "compare", *names, "--data", root / "test.jsonl")["data"][str(root / "test.jsonl")]
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    true = [row["label"] for row in rows]
    said = [[answer[0].label for answer in lmworks.predict(name, [row["text"] for row in rows])] for name in names]
    for name, guesses in zip(names, said, strict=True):
        scores = found["models"][name]
        assert scores["accuracy"] == pytest.approx(accuracy_score(true, guesses))
        assert scores["f1"] == pytest.approx(f1_score(true, guesses, average="macro", zero_division=0))
        assert scores["intervals"]["accuracy"][0] <= scores["accuracy"] <= scores["intervals"]["accuracy"][1]
    only = [sum(a == t != b for a, b, t in zip(*pair, true, strict=True)) for pair in (said, said[::-1])]
    difference = found["differences"][names[1]]["accuracy"]
    assert [difference["only_the_first_right"], difference["only_this_right"]] == only
    assert difference["p"] == pytest.approx(mcnemar(*only))
    assert difference["value"] == pytest.approx((only[1] - only[0]) / len(true))
    assert only[1] - only[0] > 10, found["models"]  # the better one is better
    assert difference["p"] < 0.01


@pytest.mark.parametrize(("words", "said"), [
    ((), "nothing to compare"),
    (("gpt", "gpt"), "named twice"),
    (("gone",), "gone"),
    (("text.txt",), "text.txt"),
    (("gpt", "one", "--data", "held.txt"), "made for different things"),
    (("bert", "--data", "held.txt"), "fills gaps"),
    (("gpt", "--data", "gone.txt"), "gone.txt"),
])  # fmt: skip
def test_what_cannot_be_compared(
    root: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    paths = [str(root / word) if not word.startswith("--") else word for word in words]
    assert main(["compare", *paths]) == 2
    assert said in capsys.readouterr().err


def test_a_level_is_reached_by_meeting_it(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 5.0 - i, "tokens": 10 * i, "seconds": 0.5 * i} for i in range(1, 5)]
    judged = [{"step": row["step"], "val_loss": row["loss"] + 0.5, "seconds": 9.0} for row in rows]
    lines = [line for pair in zip(rows, judged, strict=True) for line in pair]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(tmp_path / "metrics.jsonl")
    assert curve is not None
    met, never = curve.reached(2.5), curve.reached(1.49)
    assert met is not None
    assert (met.step, met.tokens, never) == (3, 30, None)
    assert (curve.best.step, curve.gap, curve.steps) == (4, 0.5, 4)


def test_a_damaged_log_is_said(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0, "tokens": 5, "seconds": 0.1}\n')
    assert read_curve(log) is None
    log.write_text('{"step": 1, "val_loss": 2.0, "seconds": 0.1}\n{"step": 2, "lo')  # killed while it wrote
    curve = read_curve(log)
    assert curve is not None
    assert (curve.best.loss, curve.gap) == (2.0, None)
    log.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(FormatError, match="damaged"):
        read_curve(log)


def test_a_model_that_writes_is_scored_by_bleu(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sacrebleu

    data = tmp_path / "pairs.jsonl"
    lines = [line for line in (root / "held.txt").read_text().splitlines() if len(line.split()) > 6][:6]
    pairs = [{"prompt": " ".join(line.split()[:3]), "completion": " " + " ".join(line.split()[3:6])} for line in lines]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = run(capsys, "evaluate", root / "gpt", data, "--write", "12")
    said = [lmworks.generate(root / "gpt", pair["prompt"], temperature=0.0, max_tokens=12) for pair in pairs]
    texts = ["".join(stream) for stream in said]
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [[p["completion"] for p in pairs]]).score)
    assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [[p["completion"] for p in pairs]]).score)
    assert values["chrf"] > 0
    assert values["perplexity"] > 1
    assert main(["evaluate", str(root / "gpt"), str(root / "held.txt"), "--write", "5"]) == 2
    assert "--write answers prompts" in capsys.readouterr().err
