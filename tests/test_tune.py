"""A search of the knobs: complete, killed and resumed, shared by processes, repeatable, and reported."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend, JournalStorage

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_body, two_languages, write_rows

from lmworks.base.errors import InputError
from lmworks.base.report import Report
from lmworks.export.receipt import check_receipt
from lmworks.finetuning import evaluate_task, finetune
from lmworks.search_space import make_grid, read_space
from lmworks.searching import tune
from lmworks.training.tuning import Tuning

SCRIPT = Path(__file__).with_name("kill_tune.py")
SPACE = ("lr=3e-4..3e-2:log", "batch_size=8,16", "epochs=1..2")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on one thread, and give the threads back."""
    before = torch.get_num_threads()
    monkeypatch.setenv("LMWORKS_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a body without a head, and English and German sentences to tell apart."""
    root = tmp_path_factory.mktemp("languages")
    train = two_languages(data_folder, skip=0, count=60)
    make_body(root / "body", (text for text, _ in train))
    write_rows(root / "train.jsonl", train)
    write_rows(root / "validation.jsonl", two_languages(data_folder, skip=500, count=30))
    return root


def search(root: Path, out: Path, **changes: Any) -> Report:
    """Search on the languages."""
    settings: dict[str, Any] = {
        "validation": root / "validation.jsonl", "storage": out.with_suffix(".jsonl"), "task": "text-classification",
        "trials": 4, "space": SPACE, "dtype": "fp32", **changes,
    }  # fmt: skip
    return tune(root / "body", root / "train.jsonl", out, **settings)


def read_trials(storage: Path) -> list[Any]:
    """Return the trials that Optuna itself finds in the file, without their times."""
    study = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(storage))), study_name="lmworks")
    return [(t.number, t.state.name, t.params, t.value, t.user_attrs["loss"]) for t in study.trials]


# --------------------------------------------------------------------------------------------------- the whole search


def test_the_best_trial_is_the_model_that_finetune_makes(languages: Path, tmp_path: Path) -> None:
    """Same bits as one `finetune` with its knobs; the table, the curves and the report are there."""
    out = tmp_path / "out"
    values = search(languages, out).values
    best = values["best"]
    assert [row["trial"] for row in values["trials"]] == [0, 1, 2, 3]
    assert best["score"] == max(row["score"] for row in values["trials"])
    finetune(
        languages / "body", languages / "train.jsonl", tmp_path / "alone", validation=languages / "validation.jsonl",
        task="text-classification", dtype="fp32", **{name: best[name] for name in ("lr", "batch_size", "epochs")},
    )  # fmt: skip
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "alone")]
    assert weights[0] == weights[1]
    assert evaluate_task(out, languages / "validation.jsonl").values["accuracy"] == best["score"]
    assert check_receipt(out)["passed"] and not out.with_name("out.partial").exists()
    with (out / "trials.csv").open() as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [row["score"] for row in values["trials"]]
    with (out / "curves.csv").open() as file:
        steps = {int(row["trial"]): int(row["step"]) for row in csv.DictReader(file)}
    assert steps == {row["trial"]: row["steps"] for row in values["trials"]}
    varied = len({row["score"] for row in values["trials"]}) > 1
    assert set(values["importance"]) == ({"lr", "batch_size", "epochs"} if varied else set())
    page = (out / "search.html").read_text()
    assert "Trial " in page and "<circle" in page and "log10 of lr" in page
    assert not [path for path in (out / "training").rglob("*.*") if path.is_dir()]
    with pytest.raises(InputError, match="already holds a model"):
        search(languages, out)
    more = search(languages, out, trials=5, overwrite=True).values
    assert more["trials"][:4] == values["trials"] and len(more["trials"]) == 5


def test_a_search_that_is_killed_and_resumed_is_the_same_search(languages: Path, tmp_path: Path) -> None:
    check_kills(languages, tmp_path, trials=5, kills=4, seed=1)


@pytest.mark.slow
def test_24_trials_with_many_kills(languages: Path, tmp_path: Path) -> None:
    """TPE learns from trial 8 on, and is the same search too."""
    check_kills(languages, tmp_path, trials=24, kills=20, seed=2)


def check_kills(root: Path, tmp_path: Path, *, trials: int, kills: int, seed: int) -> None:
    """Compare trials, curves and weights with those of a search that nobody killed."""
    for name in ("body", "train.jsonl", "validation.jsonl"):
        (tmp_path / name).symlink_to(root / name)
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(trials), str(kills), str(seed)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= kills - 1
    search(root, tmp_path / "whole", trials=trials)
    found, expected = (read_trials(tmp_path / f"{name}.jsonl") for name in ("killed", "whole"))
    assert [row[:2] for row in found] == [(number, "COMPLETE") for number in range(trials)]
    assert found == expected
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1] and (tmp_path / "killed/search.html").exists()


def test_two_processes_share_a_search(languages: Path, tmp_path: Path) -> None:
    """Each trial runs once, whoever takes it; random trials are those of one process alone."""
    search(languages, tmp_path / "two", jobs=2, search="random", trials=6)
    found = read_trials(tmp_path / "two.jsonl")
    assert [row[:2] for row in found] == [(number, "COMPLETE") for number in range(6)]
    search(languages, tmp_path / "one", search="random", trials=6)
    assert found == read_trials(tmp_path / "one.jsonl")


def test_a_grid_is_complete_and_its_curves_can_be_compared(languages: Path, tmp_path: Path) -> None:
    """The variants of a study: every optimizer with the same two seeds; mean and spread are NumPy's."""
    out = tmp_path / "grid"
    report = search(
        languages, out, search="grid", space=("optimizer=sgd,adam",), seeds=2, trials=None, epochs=1, lr=3e-3
    )
    values = report.values
    seen = {(row["optimizer"], row["seed"]): row["score"] for row in values["trials"]}
    assert list(seen) == [("sgd", 0), ("sgd", 1), ("adam", 0), ("adam", 1)]
    for row in values["variants"]:
        scores = [seen[row["optimizer"], seed] for seed in (0, 1)]
        assert (row["mean"], row["sd"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = {row["variant"]: float(row["loss"]) for row in rows if row["step"] == "1" and row["seed"] == "0"}
    assert set(first) == {"optimizer sgd", "optimizer adam"} and len(set(first.values())) == 1  # same start
    assert {name for chart in report.charts for name, _ in chart.series} >= {"sgd", "adam"}


def test_halving_stops_the_weaker_trials_early(languages: Path, tmp_path: Path) -> None:
    values = search(
        languages, tmp_path / "out", search="halving", trials=6, epochs=3, space=("lr=1e-6..2e-2:log",)
    ).values
    states = [row["state"] for row in values["trials"]]
    stopped = [row for row in values["trials"] if row["state"] == "stopped"]
    assert states[0] == "done" and len(stopped) == values["stopped_early"] >= 1
    assert all(row["steps"] < values["best"]["steps"] for row in stopped)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("space", "what"),
    [
        ("learning_rat=1..2", "no knob"),
        ("lr=", "no values"),
        ("lr=1e-3..1e-5", "empty"),
        ("lr=0..1:log", "log range"),
        ("lr=1e-3..99", "out of range"),
        ("epochs=1.5..3", "cannot be"),
        ("optimizer=adm,sgd", "cannot be"),
        ("optimizer=a..b", "no such range"),
        ("batch_size=8,8", "twice"),
        ("seed=1,2", "cannot be searched"),
        ("epochs=1..3", "both fixed and searched"),
    ],
)
def test_a_space_that_cannot_be_searched(space: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        read_space([space], Tuning(epochs=2) if "both" in what else Tuning())


def test_values_have_their_knob_s_type() -> None:
    knobs = read_space(["pack=true,false", "max_length=none,64", "epochs=1..3", "weight-decay=0,0.1"], Tuning())
    grid = make_grid(knobs, [0])
    assert len(grid) == 2 * 2 * 3 * 2
    assert grid[0] == {"pack": True, "max_length": None, "epochs": 1, "weight_decay": 0.0}


def test_a_storage_belongs_to_one_search(languages: Path, tmp_path: Path) -> None:
    """Other data, other knobs, a file that is something else: refused, and nothing is left."""
    search(languages, tmp_path / "out", trials=1)
    storage = tmp_path / "out.jsonl"
    before = storage.read_bytes()
    for changes in ({"space": SPACE[:2]}, {"validation": None}, {"seed": 3}):
        with pytest.raises(InputError, match="another search"):
            search(languages, tmp_path / "other", storage=storage, trials=1, **changes)
    assert storage.read_bytes() == before and not list(tmp_path.glob("other*"))
    (tmp_path / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="no storage"):
        search(languages, tmp_path / "notes", trials=1)
    assert (tmp_path / "notes.jsonl").read_text() == "my notes\n"
    with pytest.raises(InputError, match="trials"):
        search(languages, tmp_path / "none", trials=0)
    with pytest.raises(InputError, match="all of its combinations"):
        search(languages, tmp_path / "none", search="grid", space=("epochs=1,2",), trials=3)
    assert not list(tmp_path.glob("none*"))
