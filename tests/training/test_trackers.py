"""Trackers read back with their own libraries: every row once, also in a run that was interrupted or killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import make_trainer

from lmworks.base.errors import InputError, Interrupted, MissingExtra
from lmworks.training import trackers
from lmworks.training.callbacks import Callback
from lmworks.training.trackers import Tracker, check_names, make_trackers, run_name
from lmworks.training.trainer import Trainer

SETTINGS = {"lr": 0.003, "freeze": ["head"], "size": None}
Curve = list[tuple[int, float]]


class Interrupt(Callback):
    """Asks for an end after one step, by Ctrl-C or by SIGKILL."""

    def __init__(self, step: int, signal: int = 2) -> None:
        self.step, self.signal = step, signal

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), self.signal)


def sit(folder: Path, names: str, *, until: int | None = None) -> None:
    """Train, or go on, in this folder."""
    trainer = make_trainer(folder)
    trainer.callbacks = [*make_trackers(names, folder, SETTINGS), *([Interrupt(until)] if until else [])]
    if until is None:
        trainer.fit()
    else:
        with pytest.raises(Interrupted):
            trainer.fit()


def logged(folder: Path, name: str) -> Curve:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


def read_tensorboard(folder: Path, name: str) -> Curve:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def read_mlflow(folder: Path, name: str) -> Curve:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("lmworks").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith(run_name(folder))
    assert run.data.params == {"lr": "0.003", "freeze": "['head']", "size": "None"}
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a tracker sets for its library is undone."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", *trackers.DEFAULTS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_an_interrupted_run_is_one_run_with_every_row_once(tmp_path: Path) -> None:
    names = "tensorboard, mlflow"
    sit(tmp_path, names, until=5)
    sit(tmp_path, names, until=8)
    sit(tmp_path, names)
    for name in ("loss", "val_loss", "grad_norm", "lr", "tokens"):
        assert len(logged(tmp_path, name)) == (4 if name == "val_loss" else 12)
        assert read_mlflow(tmp_path, name) == logged(tmp_path, name)
        for ours, theirs in zip(logged(tmp_path, name), read_tensorboard(tmp_path, name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


KILLED = """
import sys
from pathlib import Path
from small import make_trainer
from test_trackers import Interrupt, SETTINGS
from lmworks.training.trackers import make_trackers
folder = Path(sys.argv[1])
trainer = make_trainer(folder)
trainer.callbacks = [*make_trackers(sys.argv[2], folder, SETTINGS), Interrupt(int(sys.argv[3]), 9)]
trainer.fit()
"""


def sit_apart(folder: Path, names: str, step: int, **environment: str) -> int:
    """Train in another process, which is killed after this step."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "default", "-c", KILLED, str(folder), names, str(step)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )
    assert done.stdout == "", done.stdout  # which belongs to results
    assert "left out" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.slow
def test_a_killed_run_repeats_and_misses_nothing(tmp_path: Path) -> None:
    """The steps after the last checkpoint are made again, and are not logged twice."""
    names = "tensorboard,mlflow"
    assert sit_apart(tmp_path, names, 8) == -9
    sit(tmp_path, names)
    for name in ("loss", "val_loss"):
        assert read_mlflow(tmp_path, name) == logged(tmp_path, name)
        assert [step for step, _ in read_tensorboard(tmp_path, name)] == [step for step, _ in logged(tmp_path, name)]


@pytest.mark.live  # the package wants an older pillow than dev has: install it apart
def test_trackio_has_every_row_once(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="pip install trackio", exc_type=ImportError)
    for step in (5, 8, 99):
        assert sit_apart(tmp_path, "trackio", step, TRACKIO_DIR=str(tmp_path / "trackio")) == (0 if step == 99 else -9)
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([[r['step'], 'val_loss' in r] for r in S.get_logs('lmworks', sys.argv[1])]))"
    )
    run = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    found = subprocess.check_output([sys.executable, "-W", "ignore", "-c", script, run], env=environment, text=True)
    rows = json.loads(found.splitlines()[-1])
    assert len({tuple(row) for row in rows}) == len(rows)  # none twice
    assert rows[-2:] == [[12, False], [12, True]]


@pytest.mark.live  # not installed by dev
def test_wandb_offline_has_every_row_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb", exc_type=ImportError)
    for step in (5, 8, 99):
        assert sit_apart(tmp_path, "wandb", step, WANDB_MODE="offline") == (0 if step == 99 else -9)
    run = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    sittings = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}"))
    assert len(sittings) == 3
    assert (tmp_path / "wandb.sent").read_text().split() == ["12", "12"]


class Failing(Tracker):
    """Cannot be reached after three rows."""

    name, module = "failing", "json"

    def open(self, run: str, *, resumed: bool) -> str:
        self.left = 3
        return run

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("no route to host\nand more")

    def close(self, *, done: bool) -> None:
        pytest.fail("closed after a failure")


def test_a_tracker_that_fails_warns_once_and_never_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "failing", Failing)
    stream, trainer = io.StringIO(), make_trainer(tmp_path)
    trainer.callbacks = make_trackers("failing", tmp_path, {}, stream=stream)
    assert trainer.fit().steps == 12
    assert stream.getvalue() == (
        "failing failed and is left out (ConnectionError: no route to host); metrics.jsonl has all numbers\n"
    )


def test_a_server_that_is_down_does_not_hold_up_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    stream, trainer = io.StringIO(), make_trainer(tmp_path)
    trainer.callbacks = make_trackers("mlflow", tmp_path, {}, stream=stream)
    assert trainer.fit().steps == 12
    assert stream.getvalue().startswith("mlflow failed and is left out")
    assert stream.getvalue().count("\n") == 1


def test_unknown_names_and_missing_libraries_are_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_names(" mlflow,tensorboard,,mlflow") == ["mlflow", "tensorboard"]
    assert check_names("") == []
    with pytest.raises(InputError, match="there is no tracker 'tensorbord'") as caught:
        check_names("tensorbord")
    assert "tensorboard" in caught.value.fix
    monkeypatch.setattr(trackers.WandB, "module", "wandb_that_nobody_has")
    with pytest.raises(MissingExtra) as missing:
        make_trackers("wandb", tmp_path, {})
    assert missing.value.fix == 'pip install "lmworks[wandb]"'


def test_a_run_is_called_after_its_folder() -> None:
    assert run_name(Path("runs/pets.partial/training")) == "pets"
    assert run_name(Path("runs/plain")) == "plain"
