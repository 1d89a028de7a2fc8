"""Experiment trackers that listen to a run: TensorBoard, MLflow, Weights & Biases, trackio.

metrics.jsonl is always written; a tracker gets the same rows under the same names. When a run is resumed, the tracker
goes on with the same run and is first told the rows that it lacks, so it neither repeats a step nor misses one. A
tracker that fails says so once and is left alone: training goes on. Torch-free until TensorBoard is asked for.

    tensorboard   FOLDER/tensorboard
    mlflow        MLFLOW_TRACKING_URI, or FOLDER/mlruns; the experiment "lmworks"
    wandb         FOLDER/wandb, offline (`wandb sync` uploads it); WANDB_MODE=online sends at once
    trackio       its own local database; the project "lmworks"
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import read_json, write_json
from lmworks.base.optional import require
from lmworks.training.callbacks import Callback
from lmworks.training.log import METRICS
from lmworks.training.train_config import TrainResult

if TYPE_CHECKING:
    from lmworks.training.trainer import Trainer

PROJECT = "lmworks"
RUNS = "trackers.json"  # in the run folder: the name of this run in each tracker
WIDTH = 16  # digits of a step in the note of what was sent
DEFAULTS = {  # a server that is down costs seconds, not minutes; nothing but the run is reported to anybody
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


class Tracker(Callback):
    """Sends every row to one library; a subclass says how to open a run, send numbers, and close it."""

    name = module = extra = ""

    def __init__(self, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self.library = require(self.module, extra=self.extra)
        self.folder, self.settings, self.say = folder, settings, say
        self.broken = False
        self.sent = {"loss": 0, "val_loss": 0}  # the last step of each kind of row that the tracker has

    def open(self, run: str, *, resumed: bool) -> str:
        """Begin the run of this name, or go on with it; return the name to go on with later."""
        raise NotImplementedError

    def send(self, numbers: dict[str, float], step: int) -> None:
        """Send numbers by name."""
        raise NotImplementedError

    def close(self, *, done: bool) -> None:
        """Send what is left; the run is done, or may be resumed."""

    def on_start(self, trainer: Trainer) -> None:
        """Open the run and send the rows of metrics.jsonl that it lacks."""
        self.guard(self.begin)

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Send the row of a step."""
        self.guard(self.pass_on, row)

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Send the row of a validation."""
        self.guard(self.pass_on, row)

    def on_end(self, trainer: Trainer, result: TrainResult | None) -> None:
        """Close the run."""
        self.guard(self.close, done=result is not None)

    def begin(self) -> None:
        """Open the run that this folder names, or a new one."""
        path = self.folder / RUNS
        runs: dict[str, str] = read_json(path) if path.exists() else {}
        run = self.open(
            runs.get(self.name) or f"{run_name(self.folder)}-{secrets.token_hex(4)}", resumed=self.name in runs
        )
        if runs.get(self.name) != run:
            write_json(path, {**runs, self.name: run})
        for line in (self.folder / METRICS).read_text().splitlines():
            self.pass_on(json.loads(line))

    def pass_on(self, row: dict[str, Any]) -> None:
        """Send a row unless the tracker has it."""
        kind = "val_loss" if "val_loss" in row else "loss"
        if kind not in row or row["step"] <= self.sent[kind]:
            return
        numbers = {name: float(v) for name, v in row.items() if name != "step" and isinstance(v, int | float)}
        self.send(numbers, row["step"])
        self.sent[kind] = row["step"]

    def guard(self, call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Make a call; if it fails, say so and make no other."""
        if self.broken:
            return
        try:
            with redirect_stdout(sys.stderr):  # ours is for results
                call(*arguments, **options)
        except Exception as error:  # whatever a library or a server comes up with must not cost the run
            self.broken = True
            first = (str(error).splitlines() or [""])[0]
            self.say(
                f"{self.name} failed and is left out ({type(error).__name__}: {first}); metrics.jsonl has all numbers"
            )


class TensorBoard(Tracker):
    """Event files. A sitting writes the run anew and marks what was there before as void, for it may lack some rows."""

    name = module = extra = "tensorboard"

    def open(self, run: str, *, resumed: bool) -> str:
        from torch.utils.tensorboard import SummaryWriter

        void = {"purge_step": 0} if resumed else {}
        place = self.folder / "tensorboard"
        while any(place.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)  # readers order files by the second in their names: this one must come last
        self.writer = SummaryWriter(str(place), flush_secs=10, **void)
        return run

    def send(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self, *, done: bool) -> None:
        self.writer.close()


class MLflow(Tracker):
    """A run of an MLflow server or folder, which is asked what it has."""

    name = module = extra = "mlflow"

    def open(self, run: str, *, resumed: bool) -> str:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database and no server
            uri = (self.folder / "mlruns").absolute().as_uri()
        self.client = self.library.MlflowClient(tracking_uri=uri)
        if resumed:
            self.run = run
            self.client.update_run(run, status="RUNNING")
            for kind in self.sent:
                history = self.client.get_metric_history(run, kind)
                self.sent[kind] = max((metric.step for metric in history), default=0)
            return run
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        self.run = str(self.client.create_run(experiment, run_name=run).info.run_id)
        for name, value in self.settings.items():
            self.client.log_param(self.run, name, str(value)[:500])
        return self.run

    def send(self, numbers: dict[str, float], step: int) -> None:
        make, now = self.library.entities.Metric, int(time.time() * 1000)
        self.client.log_batch(self.run, [make(name, value, now, step) for name, value in numbers.items()])

    def close(self, *, done: bool) -> None:
        self.client.set_terminated(self.run, status="FINISHED" if done else "KILLED")


class Noted(Tracker):
    """A tracker that cannot be asked what it has: a file beside the run says what was sent."""

    def begin(self) -> None:
        path = self.folder / f"{self.name}.sent"
        self.note = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        found = os.pread(self.note, 2 * WIDTH, 0)
        if len(found) == 2 * WIDTH:
            self.sent = {"loss": int(found[:WIDTH]), "val_loss": int(found[WIDTH:])}
        super().begin()

    def pass_on(self, row: dict[str, Any]) -> None:
        super().pass_on(row)
        os.pwrite(self.note, "".join(f"{step:{WIDTH}}" for step in self.sent.values()).encode(), 0)

    def close(self, *, done: bool) -> None:
        os.close(self.note)


class WandB(Noted):
    """A run of Weights & Biases; offline unless WANDB_MODE says otherwise."""

    name = module = extra = "wandb"

    def open(self, run: str, *, resumed: bool) -> str:
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run,
            name=run,
            dir=str(self.folder),
            config=dict(self.settings),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow" if os.environ.get("WANDB_MODE", "offline") == "online" else None,
            settings=self.library.Settings(silent=True, console="off"),
        )
        return run

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self, *, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)
        super().close(done=done)


class Trackio(Noted):
    """A run in trackio's local database."""

    name = module = extra = "trackio"

    def open(self, run: str, *, resumed: bool) -> str:
        self.run = self.library.init(
            project=PROJECT,
            name=run,
            config=dict(self.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return run

    def send(self, numbers: dict[str, float], step: int) -> None:
        self.library.log(numbers, step=step)

    def close(self, *, done: bool) -> None:
        self.library.finish()
        super().close(done=done)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_names(names: str) -> list[str]:
    """Return the trackers of a list such as "tensorboard,mlflow"; an unknown one is an InputError."""
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found:
        if name not in TRACKERS:
            near = did_you_mean(name, list(TRACKERS)).strip()
            raise InputError(f"there is no tracker {name!r}", expected=", ".join(TRACKERS), fix=near)
    return found


def make_trackers(
    names: str, folder: Path, settings: Mapping[str, Any], *, stream: TextIO | None = sys.stderr
) -> list[Tracker]:
    """Return the trackers of a list such as "tensorboard,mlflow"; raise MissingExtra where one is not installed.

    `settings` are shown beside the curves. Failures are told to `stream` (None: silent).
    """

    def say(text: str) -> None:
        if stream is not None:
            print(text, file=stream, flush=True)

    return [TRACKERS[name](folder, settings, say) for name in check_names(names)]


def run_name(folder: Path) -> str:
    """Return what a run is called: runs/pets.partial/training -> "pets"."""
    folder = folder.absolute()
    return (folder.parent if folder.name == "training" else folder).name.removesuffix(".partial")
