"""A search of the knobs: complete, killed and resumed, shared by processes, repeatable, and reported."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
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
from tuning_models import make_languages

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.report import Report
from lmworks.export.receipt import check_receipt
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetuning import evaluate_task, finetune
from lmworks.verbs.search_report import find_importance, find_noise
from lmworks.verbs.search_space import make_grid, read_space
from lmworks.verbs.search_study import SharedStudy, by_variant
from lmworks.verbs.searching import tune

SCRIPT = Path(__file__).with_name("kill_tune.py")
SPACE = ("lr=1e-3..2e-2:log", "batch_size=4,8", "epochs=1..2")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Train on one thread, and give the threads back."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMWORKS_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a body without a head, and English and German sentences to tell apart."""
    root = tmp_path_factory.mktemp("languages")
    make_languages(root, data_folder, 60)
    return root


def search(root: Path, out: Path, **changes: Any) -> Report:
    """Search on the languages."""
    settings: dict[str, Any] = {
        "validation": root / "validation.jsonl", "storage": out.with_suffix(".jsonl"), "task": "text-classification",
        "trials": 5, "space": SPACE, "dtype": "fp32", **changes,
    }  # fmt: skip
    return tune(root / "body", root / "train.jsonl", out, **settings)


@pytest.fixture(scope="module")
def whole(languages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A search of five trials in one process that nobody killed: OUT, beside its storage, and the report."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, search(languages, out)


@pytest.fixture
def copied(whole: tuple[Path, Report], tmp_path: Path) -> Path:
    """A copy of that search, to do something to."""
    shutil.copytree(whole[0], tmp_path / "out")
    shutil.copy(whole[0].with_suffix(".jsonl"), tmp_path)
    return tmp_path / "out"


def open_storage(storage: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that Optuna itself finds in the file."""
    return optuna.load_study(storage=JournalStorage(JournalFileBackend(str(storage))), study_name="lmworks").trials


def read_trials(storage: Path) -> list[Any]:
    """Return what a trial is, without its times."""
    return [(t.number, t.state.name, t.params, t.value, t.user_attrs["loss"]) for t in open_storage(storage)]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file."""
    with path.open() as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------- the whole search


def test_the_best_trial_is_the_model_that_finetune_makes(
    languages: Path, whole: tuple[Path, Report], tmp_path: Path
) -> None:
    """Same bits as one `finetune` with its knobs; the table, the curves and the report are there."""
    out, values = whole[0], whole[1].values
    best, scores = values["best"], [row["score"] for row in values["trials"]]
    assert [row["trial"] for row in values["trials"]] == list(range(5))
    assert best["score"] == max(scores) > 0.8 > min(scores)
    finetune(
        languages / "body", languages / "train.jsonl", tmp_path / "alone", validation=languages / "validation.jsonl",
        task="text-classification", dtype="fp32", **{name: best[name] for name in ("lr", "batch_size", "epochs")},
    )  # fmt: skip
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "alone")]
    assert weights[0] == weights[1]
    assert evaluate_task(out, languages / "validation.jsonl").values["accuracy"] == best["score"]
    assert check_receipt(out)["passed"] and not out.with_name("out.partial").exists()
    assert [float(row["score"]) for row in read_csv(out / "trials.csv")] == scores
    steps = {int(row["trial"]): int(row["step"]) for row in read_csv(out / "curves.csv")}
    assert steps == {row["trial"]: row["steps"] for row in values["trials"]}
    page = (out / "search.html").read_text()
    assert "Trial " in page and "<circle" in page and "log10 of lr" in page
    assert not [path for path in (out / "training").rglob("*.*") if path.is_dir()]


def test_importance_finds_the_knob_that_decides(tmp_path: Path) -> None:
    """The score follows the rate alone: the report says what Optuna itself does. Of equals it says nothing."""
    knobs = read_space(SPACE, Tuning())
    for name, score_of in {"one": lambda params: -abs(math.log(params["lr"] / 1e-2)), "same": lambda _: 0.5}.items():
        study = SharedStudy(tmp_path / name, tmp_path, knobs=knobs, how="random", seed=0, count=20, maximize=True)
        while (trial := study.claim()) is not None:
            study.tell(trial, score_of(trial.params), {})
            os.close(trial.handle)
        found = find_importance(study, [knob.name for knob in knobs])
        if name == "same":
            assert found == {}
        else:
            assert found == pytest.approx(optuna.importance.get_param_importances(study.study), abs=1e-4)
            assert next(iter(found)) == "lr" and found["lr"] > 0.5


def test_the_noise_of_one_accuracy_and_of_seeds(tmp_path: Path) -> None:
    """The standard error of 80 examples, and, where variants are repeated, the seeds' standard deviation."""
    study = make_repeated(tmp_path, (0.9, 0.1, 0.6, 0.7))
    best, groups = study.best(), by_variant(study.finished())
    assert best is not None
    pooled = math.sqrt((np.var([0.9, 0.1], ddof=1) + np.var([0.6, 0.7], ddof=1)) / 2)
    assert find_noise(groups, best, "accuracy", 80)[0] == pytest.approx(pooled)
    dull = make_repeated(tmp_path / "dull", (0.5, 0.5, 0.9, 0.7))  # sgd learned nothing: its spread says nothing
    chosen = dull.best()
    assert chosen is not None
    assert find_noise(by_variant(dull.finished()), chosen, "accuracy", 80)[0] == pytest.approx(
        np.std([0.9, 0.7], ddof=1)
    )
    once = {key: trials[1:] for key, trials in groups.items()}  # the best is adam, 0.7
    assert find_noise(once, best, "accuracy", 80)[0] == pytest.approx(math.sqrt(57 / 82 * 25 / 82 / 80))
    assert find_noise(once, best, "loss", 80)[0] is None


def test_more_trials_go_on_with_a_search_that_is_done(
    languages: Path, whole: tuple[Path, Report], copied: Path
) -> None:
    with pytest.raises(InputError, match="already holds a model"):
        search(languages, copied)
    more = search(languages, copied, trials=6, overwrite=True).values
    assert more["trials"][:5] == whole[1].values["trials"] and len(more["trials"]) == 6
    assert (copied / "model.safetensors").exists() and not list(copied.parent.glob("*partial*"))


def test_a_search_that_is_killed_and_resumed_is_the_same_search(
    languages: Path, whole: tuple[Path, Report], tmp_path: Path
) -> None:
    killed = kill_search(languages, tmp_path, trials=5, kills=3, seed=1)
    check_same_search(killed, whole[0])


@pytest.mark.slow
def test_24_trials_with_many_kills(languages: Path, tmp_path: Path) -> None:
    """TPE learns from trial 8 on, and is the same search too."""
    killed = kill_search(languages, tmp_path, trials=24, kills=20, seed=2)
    search(languages, tmp_path / "whole", trials=24)
    check_same_search(killed, tmp_path / "whole")


@pytest.mark.slow
def test_24_trials_of_two_processes_with_many_kills(languages: Path, tmp_path: Path) -> None:
    """Which trials TPE learns from follows from who is faster; that each is run once does not."""
    killed = kill_search(languages, tmp_path, trials=24, kills=20, seed=3, workers=2)
    found = open_storage(killed.with_suffix(".jsonl"))
    assert [(t.number, t.state.name) for t in found] == [(number, "COMPLETE") for number in range(24)]
    assert [int(row["trial"]) for row in read_csv(killed / "trials.csv")] == list(range(24))
    curves = read_csv(killed / "curves.csv")
    assert len({(row["trial"], row["step"]) for row in curves}) == len(curves)


def kill_search(root: Path, folder: Path, *, trials: int, kills: int, seed: int, workers: int = 1) -> Path:
    """Run a search that is killed so often; return its folder."""
    for name in ("body", "train.jsonl", "validation.jsonl"):
        (folder / name).symlink_to(root / name)
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *map(str, (trials, kills, seed, workers)), *SPACE],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= min(kills, 15) and counts["begun_again"] >= kills // 4, counts
    assert (folder / "killed/search.html").exists() and check_receipt(folder / "killed")["passed"]
    return folder / "killed"


def check_same_search(out: Path, other: Path) -> None:
    """Compare trials, curves and weights."""
    found, expected = (read_trials(folder.with_suffix(".jsonl")) for folder in (out, other))
    assert [row[:2] for row in found] == [(number, "COMPLETE") for number in range(len(expected))]
    assert found == expected
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    times = ("seconds", "tokens_per_second")
    curves = [[{k: v for k, v in row.items() if k not in times} for row in read_csv(folder / "curves.csv")]
              for folder in (out, other)]  # fmt: skip
    assert curves[0] == curves[1]


def test_two_processes_share_a_search(languages: Path, whole: tuple[Path, Report], tmp_path: Path) -> None:
    """Each trial runs once, whoever takes it; trials which learn from none, are those of one process."""
    search(languages, tmp_path / "two", jobs=2)
    check_same_search(tmp_path / "two", whole[0])


def test_a_grid_is_complete_and_its_curves_can_be_compared(languages: Path, tmp_path: Path) -> None:
    """The variants of a study: every optimizer with the same two seeds; mean and spread are NumPy's."""
    out = tmp_path / "grid"
    report = search(
        languages,
        out,
        search="grid",
        space=("optimizer=sgd,adamw",),
        seeds=2,
        trials=None,
        epochs=2,
        lr=6e-3,
        batch_size=4,
    )
    values = report.values
    seen = {(row["optimizer"], row["seed"]): row["score"] for row in values["trials"]}
    assert list(seen) == [("sgd", 0), ("sgd", 1), ("adamw", 0), ("adamw", 1)]
    for row in values["variants"]:
        scores = [seen[row["optimizer"], seed] for seed in (0, 1)]
        assert (row["mean"], row["sd"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    assert [row["optimizer"] for row in values["variants"]] == ["adamw", "sgd"]
    rows = read_csv(out / "curves.csv")
    assert {(row["variant"], row["seed"], row["step"]) for row in rows} == {
        (f"optimizer {name}", str(seed), str(step)) for name, seed in seen for step in range(1, 61)
    }
    assert all(float(row["lr"]) >= 0 < float(row["grad_norm"]) for row in rows)
    assert [row["step"] for row in rows if row["accuracy"]] == ["30", "60"] * 4
    first = {row["variant"]: float(row["loss"]) for row in rows if row["step"] == "1" and row["seed"] == "0"}
    assert set(first) == {"optimizer sgd", "optimizer adamw"} and len(set(first.values())) == 1  # same start
    labels = {f"{row['optimizer']} {row['mean']:.3f}" for row in values["variants"]}
    (chart,) = (chart for chart in report.charts if chart.title.startswith("Accuracy"))
    assert {name for name, _ in chart.series} == labels
    for name, line in chart.series:
        scores = [
            float(row["accuracy"])
            for row in rows
            if row["step"] == "60" and row["variant"].split()[-1] == name.split()[0]
        ]
        assert line[-1] == (60.0, pytest.approx(np.mean(scores)))


def test_halving_stops_the_weaker_trials_early(languages: Path, tmp_path: Path) -> None:
    """Who goes on is worked out again: at validations 1 and 3, the best third of those that came so far."""
    values = search(
        languages, tmp_path / "out", search="halving", trials=4, epochs=4, batch_size=8, space=("lr=1e-4..2e-2:log",)
    ).values
    trials = open_storage(tmp_path / "out.jsonl")
    seen: dict[int, list[float]] = {1: [], 3: []}
    for trial in trials:
        ended = None
        for rung, score in trial.intermediate_values.items():
            if rung in seen and ended is None:
                better = sum(other > score for other in seen[rung])
                seen[rung].append(score)
                ended = None if better < max(1, len(seen[rung]) // 3) else rung
        assert (trial.state.name == "PRUNED") == (ended is not None)
        assert trial.user_attrs["steps"] == (trial.user_attrs["planned"] if ended is None else 15 * ended)
    stopped = [row for row in values["trials"] if row["state"] == "stopped"]
    assert len(stopped) == values["stopped_early"] >= 2 and values["steps"] < values["planned_steps"] == 4 * 60


def test_trials_that_diverge_count_and_are_told(
    languages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decay that multiplies the weights ends in a loss that is no number; where all end so there is one error."""
    wild = {"search": "grid", "trials": None, "weight_decay": 10, "schedule": "constant", "warmup": 0, "batch_size": 4}
    report = search(languages, tmp_path / "one", space=("lr=1e-2,10",), **wild)
    assert (report.values["completed"], report.values["failed"]) == (1, 1)
    assert any("1 of 2 trials failed and count among them" in note for note in report.notes)
    assert "1 of 2 trials failed: training diverged" in capsys.readouterr().err
    with pytest.raises(LmworksError, match="all 2 trials failed"):
        search(languages, tmp_path / "all", space=("lr=9,10",), **wild)
    assert not (tmp_path / "all").exists()


def make_repeated(folder: Path, found: tuple[float, ...]) -> SharedStudy:
    """Return a finished grid of two optimizers with two seeds each and these scores."""
    folder.mkdir(exist_ok=True)
    grid = [{"optimizer": name, "seed": seed} for name in ("sgd", "adam") for seed in (0, 1)]
    study = SharedStudy(folder / "s", folder, knobs=(), how="grid", seed=0, count=4, maximize=True, grid=grid)
    for score in found:
        trial = study.claim()
        assert trial is not None
        study.tell(trial, score, {})
        os.close(trial.handle)
    return study


def test_the_best_variant_is_that_with_the_best_mean(tmp_path: Path) -> None:
    """One lucky seed does not decide; of the chosen variant the better seed's model is kept."""
    best = make_repeated(tmp_path, (0.9, 0.1, 0.6, 0.7)).best()
    assert best is not None and best.params == {"optimizer": "adam", "seed": 1}


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


def test_a_storage_belongs_to_one_search(languages: Path, copied: Path) -> None:
    """Other data, other knobs, a file that is something else: refused, and nothing is left."""
    root, storage = copied.parent, copied.with_suffix(".jsonl")
    before = storage.read_bytes()
    for changes, what in (
        ({"space": SPACE[:2]}, "space"), ({"validation": None}, "data"), ({"warmup": 0.3}, "warmup: 0.3"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="another search") as caught:
            search(languages, root / "other", storage=storage, **changes)
        assert caught.value.found.startswith(what)
    assert storage.read_bytes() == before and not list(root.glob("other*"))
    (root / "notes.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="no storage"):
        search(languages, root / "notes")
    assert (root / "notes.jsonl").read_text() == "my notes\n"
    (root / "busy.partial").mkdir()
    for changes, what in (
        ({"trials": 0}, "trials"),
        ({"search": "grid", "space": ("epochs=1,2",), "trials": 3}, "all of its combinations"),
        ({"space": ("method=full,lora", "alpha=8,32")}, "belongs to lora"),
        ({"seeds": 2}, "variants of a grid"),
        ({"search": "halving", "space": SPACE[:1], "epochs": 1}, "between epochs"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            search(languages, root / "none", **changes)
    with pytest.raises(InputError, match="another run is in this folder"):
        search(languages, root / "busy")
    assert not list(root.glob("none*")) and not (root / "busy.jsonl").exists()
