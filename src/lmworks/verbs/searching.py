"""Search the knobs of fine-tuning: many trials, several processes, any of them killed at any time, one best model.

    lmworks tune MODEL TRAIN --trials 24 --storage search.jsonl -o OUT     OUT is the best trial's model folder

Every trial is a run of `lmworks finetune` in OUT.partial/training/trials/N, which resumes exactly. The same command,
started again or beside the first, goes on with the same search; whoever ends last writes OUT.
"""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lmworks.base.errors import FormatError, InputError, Interrupted, LmworksError
from lmworks.base.files import check_output, put_in_place, read_json, write_json, write_text
from lmworks.base.optional import require
from lmworks.base.report import Report
from lmworks.base.threads import thread_count
from lmworks.tasks.base import one_of
from lmworks.training.callbacks import Callback
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetune_folder import BASELINES, find_baselines, publish
from lmworks.verbs.search_plan import LOCKS, TRIALS, Plan, Request, open_study, read_plan
from lmworks.verbs.search_report import describe, make_report, write_curves, write_trials
from lmworks.verbs.search_space import settings_of
from lmworks.verbs.search_study import How, SharedStudy, Trial

if TYPE_CHECKING:
    from lmworks.training.finetune import Setup, Tuned
    from lmworks.training.trainer import Trainer

WAIT = 0.3  # seconds between two looks for a trial to take over
PathLike = str | Path


def tune(
    model: PathLike,
    train: PathLike,
    out: PathLike,
    *,
    storage: PathLike,
    trials: int | None = None,
    space: Sequence[str] = (),
    search: How = "tpe",
    seeds: int = 1,
    jobs: int = 1,
    validation: PathLike | None = None,
    task: str | None = None,
    tuning: Tuning | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **knobs: Any,
) -> Report:
    """Fine-tune with many settings of the knobs in `space`; `out` is the best trial's model folder, with a report.

    `space` holds "lr=1e-5..1e-3:log" (a range) or "batch_size=8,16" (choices); without it lr, batch size and epochs
    vary. `knobs` are those of `Tuning` that stay the same. `storage` is the file of the search: the same call goes on
    with it after a kill, and may run several times at once; `jobs` starts so many processes here. A "grid" runs every
    combination, each with `seeds` seeds. Raises InputError for what cannot be searched; Interrupted after Ctrl-C.
    """
    require("optuna", extra="tune")
    require("torch", extra="torch")
    check_alone()
    one_of(search, get_args(How), "search")
    request = Request(
        model=str(model), train=Path(train), out=Path(out), storage=Path(storage), trials=trials, space=tuple(space),
        search=search, seeds=seeds,
        validation=None if validation is None else Path(validation), task=task,
        tuning=tuning or Tuning.from_dict(knobs), split=split, revision=revision,
        columns={"text_column": text_column, "label_column": label_column, "header": header},
    )  # fmt: skip
    if not 1 <= jobs <= 64:
        raise InputError("--jobs is out of range", found=str(jobs), expected="1 to 64")
    check_output(out, overwrite=overwrite)
    plan = read_plan(request)
    with open_study(plan, overwrite=overwrite) as study:
        with more_processes(request, jobs - 1):
            run_trials(plan, study)
        with study.held():
            return finish(plan, study)


def check_alone() -> None:
    """Raise InputError under torchrun, whose processes would train one trial together."""
    from lmworks.training.distributed import find_ranks

    ranks = find_ranks()
    with ranks.together():
        if ranks.world > 1:
            raise InputError("a search does not run under torchrun", found=f"{ranks.world} processes",
                             fix="start the command without it: --jobs N here, or as often as you like, anywhere, "
                             "with one --storage")  # fmt: skip


@contextmanager
def more_processes(request: Request, count: int) -> Iterator[None]:
    """Run so many more processes on the same search; they share the processors with this one, and end before it.

    One that fails has said why, and its trial is taken over.
    """
    if not count:
        yield
        return
    before = os.environ.get("LMWORKS_THREADS")
    os.environ["LMWORKS_THREADS"] = str(max(1, thread_count() // (count + 1)))
    code = "from lmworks.verbs.searching import join; join()"
    started = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # it is over already
                process.stdin.write(pickle.dumps((request, os.getpid())))
        yield
    except BaseException:
        for process in started:
            process.terminate()  # it saves its trial
        raise
    finally:
        for process in started:
            process.wait()
        os.environ.pop("LMWORKS_THREADS")
        os.environ.update({} if before is None else {"LMWORKS_THREADS": before})


def join() -> None:
    """Take part in the search that standard input describes: the body of a process that `more_processes` starts."""
    request, parent = pickle.load(sys.stdin.buffer)
    try:
        plan = read_plan(request)
        with open_study(plan, overwrite=False) as study:
            run_trials(plan, study, parent=parent)
    except LmworksError as error:
        say(f"lmworks: {error}")
        sys.exit(error.exit_code)


def run_trials(plan: Plan, study: SharedStudy, *, parent: int | None = None) -> None:
    """Run trials until none is left, those of killed processes too."""
    while plan.partial.is_dir() and (parent is None or os.getppid() == parent):
        trial = study.claim()
        if trial is None:
            if study.all_done():
                return
            time.sleep(WAIT)
            continue
        try:
            run_trial(plan, study, trial, parent)
            sweep(plan, study)
        except Interrupted as error:
            raise Interrupted("the search stopped; everything is saved", where=str(plan.partial), found=error.what,
                              fix="run the same command again to go on") from None  # fmt: skip
        finally:
            os.close(trial.handle)


@dataclass(frozen=True)
class Watch(Callback):
    """Listens to a trial: successive halving may end it, and a process whose parent is gone stops."""

    plan: Plan
    study: SharedStudy
    trial: Trial
    parent: int | None

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Record the score, and end a trial that is not among the best third at its rung."""
        if self.parent is not None and os.getppid() != self.parent:
            raise Interrupted("the process that began the search is gone")
        if self.plan.request.search != "halving" or trainer.finished:
            return
        rung = math.ceil(trainer.state.step / trainer.config.eval_every)
        score = row["val_loss" if self.plan.criterion == "loss" else self.plan.criterion]
        if not self.study.goes_on(self.trial, rung, score):
            trainer.stop(f"halving: not among the best at validation {rung}")


def prepare(plan: Plan, tuning: Tuning) -> Setup:
    """Open the model for a trial."""
    from lmworks.training.finetune import set_up

    return set_up(plan.folder, plan.data, plan.held_out, task=plan.task, tuning=tuning, domains=plan.domains)


def train(plan: Plan, setup: Setup, place: Path, tuning: Tuning, *callbacks: Callback) -> Tuned:
    """Run a trial to its end, or read it if it is at its end."""
    from lmworks.training.finetune import tune as fit

    place.mkdir(parents=True, exist_ok=True)
    return fit(setup, plan.held_out, place, task=plan.task, tuning=tuning, callbacks=callbacks)


def run_trial(plan: Plan, study: SharedStudy, trial: Trial, parent: int | None) -> None:
    """Run one trial and tell its score: the main metric of the weights that scored best."""
    from lmworks.training.measure import measure

    name, place = f"trial {trial.number} of {plan.count}", plan.partial / TRIALS / str(trial.number)
    say(f"{name}: {describe(trial.params)}")
    try:
        tuning = settings_of(plan.request.tuning, trial.params)
        setup = prepare(plan, tuning)
        result = train(plan, setup, place, tuning, Watch(plan, study, trial, parent)).result
    except LmworksError as error:
        if is_for_all(error, study):
            raise
        study.tell(trial, None, {"failed": error.what})
        say(f"{name} failed: {error.what}")
        return
    value = result.best_loss
    if plan.criterion != "loss":
        value = measure(setup.predictor, plan.held_out, problem=setup.problem)[plan.criterion]
    facts = {"seconds": round(result.seconds, 2), "steps": result.steps, "planned": setup.data.steps,
             "best_step": result.best_step, "loss": result.best_loss, "stopped": result.stopped}  # fmt: skip
    study.tell(trial, value, facts, pruned=bool(result.stopped))
    ended = f" ({result.stopped})" if result.stopped else ""
    say(f"{name}: {plan.criterion} {value:.4f} after {result.seconds:.0f} s{ended}")


def is_for_all(error: LmworksError, study: SharedStudy) -> bool:
    """Tell whether an error ends the search: Ctrl-C, a full disk, or data that no trial has got through so far."""
    unusable = isinstance(error, InputError | FormatError) and not study.finished()
    return isinstance(error, Interrupted) or isinstance(error.__cause__, OSError) or unusable


def sweep(plan: Plan, study: SharedStudy) -> None:
    """Remove the weights of every trial that is over, but for the best one's; the curves stay."""
    trials = study.trials()
    best = study.best()
    for trial in trials:
        if trial.state.is_finished() and (best is None or trial.number != best.number):
            drop_weights(plan.partial / TRIALS / str(trial.number))


def drop_weights(place: Path) -> None:
    """Remove the checkpoints of a run folder."""
    for path in place.glob("*.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another process may do the same


def finish(plan: Plan, study: SharedStudy) -> Report:
    """Write OUT: the best trial's model and the report; of several processes the first does."""
    request, partial, out = plan.request, plan.partial, plan.request.out
    trials, best = study.trials(), study.best()
    failures = [trial.user_attrs["failed"] for trial in trials if trial.state.name == "FAIL"]
    if best is None:
        raise LmworksError(f"all {len(trials)} trials failed", where=str(request.storage), found=failures[0],
                           fix="search lower rates, --space lr=1e-6..1e-4:log, with another --storage and -o"
                           )  # fmt: skip
    facts: dict[str, Any] = {"criterion": plan.criterion, "held_out": len(plan.held_out), "out": str(out)}
    if is_published(out, study):  # another process was faster
        shutil.rmtree(partial, ignore_errors=True)
        return make_report(study, plan.knobs, out / TRIALS, **facts)
    tuning, place = settings_of(request.tuning, best.params), partial / TRIALS / str(best.number)
    setup = prepare(plan, tuning)
    place.mkdir(parents=True, exist_ok=True)
    baselines = find_baselines(place / BASELINES, setup, plan.data, plan.held_out)
    tuned = train(plan, setup, place, tuning)
    report = make_report(study, plan.knobs, partial / TRIALS, **facts)
    write_trials(study, partial)
    write_curves(study, partial, partial / TRIALS)
    write_json(partial / "search.json", report.to_dict())
    write_text(partial / "search.html", report.to_html())
    for path in place.glob("*.json*"):
        shutil.copy(path, partial / "training")  # as finetune leaves them
    publish(partial, plan.folder, request.model, tuned, setup, plan.data, plan.held_out, baselines, tuning, plan.task,
            out)  # fmt: skip
    drop_weights(place)
    shutil.rmtree(partial / LOCKS)
    put_in_place(partial, out.absolute())
    if failures:
        say(f"{len(failures)} of {len(trials)} trials failed: {failures[0]}")
    return report


def is_published(out: Path, study: SharedStudy) -> bool:
    """Tell whether the folder holds the result of this search with all of its trials."""
    path = out / "search.json"
    found = read_json(path) if path.is_file() else {}
    return (found.get("id"), len(found.get("trials", ()))) == (study.id, len(study.trials()))


def say(text: str) -> None:
    """Print one line of progress."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
