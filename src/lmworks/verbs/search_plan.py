"""What a search is asked for, what all of its trials share, and the storage and folder that belong to it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.files import STAGED, read_json, sha256, write_json
from lmworks.base.hub import find_folder
from lmworks.text.labelled import Labelled
from lmworks.training.mixture import Domain
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetune_data import also_files, as_json, choose_task, fingerprint, read_data, read_domains
from lmworks.verbs.search_space import Knob, Value, default_space, make_grid, read_space
from lmworks.verbs.search_study import How, SharedStudy

TRIALS, MARK, LOCKS = "training/trials", "training/search_id.json", "training/locks"  # which no receipt covers
DEFAULT_TRIALS, MOST_TRIALS = 24, 100_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """A search as it was asked for; every process of it has the same one."""

    model: str
    train: Path
    out: Path
    storage: Path
    trials: int | None
    space: tuple[str, ...]
    search: How
    seeds: int
    validation: Path | None
    task: str | None
    tuning: Tuning
    columns: dict[str, Any]
    split: str | None
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every trial of a search shares."""

    request: Request
    folder: Path
    task: str
    data: Labelled
    held_out: Labelled
    domains: list[Domain]
    criterion: str
    knobs: tuple[Knob, ...]
    grid: list[dict[str, Value]]
    count: int

    @property
    def partial(self) -> Path:
        """The folder of the search until it is done."""
        out = self.request.out.absolute()
        return out.with_name(f"{out.name}.partial")


def read_plan(request: Request) -> Plan:
    """Read the data and the space; raise InputError for anything that no trial could use."""
    tuning = request.tuning
    tuning.check()
    if tuning.shots is not None:
        raise InputError("--shots learns without choosing by the held-out examples", fix="leave --shots out")
    if tuning.also_task:
        raise InputError("a search is for one task", found="--also-task", fix="leave it out")
    if not 1 <= request.seeds <= 100:
        raise InputError("--seeds is out of range", found=str(request.seeds), expected="1 to 100")
    if request.seeds > 1 and request.search != "grid":
        raise InputError("--seeds repeats the variants of a grid", fix="add --search grid, or leave --seeds out")
    how = request.search
    knobs = read_space(request.space, tuning) or default_space(tuning, halving=how == "halving", grid=how == "grid")
    if not knobs:
        raise InputError("nothing varies", found="every knob of the usual space is given", fix="add --space NAME=…")
    grid: list[dict[str, Value]] = []
    count = DEFAULT_TRIALS if request.trials is None else request.trials
    if how == "grid":
        grid = make_grid(knobs, [(tuning.seed + i) % 2**32 for i in range(request.seeds)])
        if request.trials not in (None, len(grid)):
            raise InputError("a grid runs all of its combinations", found=f"--trials {request.trials}",
                             expected=str(len(grid)), fix="leave --trials out, or --search random")  # fmt: skip
        count = len(grid)
    if not 1 <= count <= MOST_TRIALS:
        raise InputError("--trials is out of range", found=str(count), expected=f"1 to {MOST_TRIALS:,}")
    epochs = next((knob for knob in knobs if knob.name == "epochs"), None)
    most = tuning.epochs if epochs is None else max(float(str(x)) for x in (epochs.choices or (epochs.high,)))
    if how == "halving" and most < 2:
        raise InputError("halving stops trials between epochs", found=f"{most:g} epoch", fix="--epochs 4, say")
    folder = find_folder(request.model, revision=request.revision)
    task = choose_task(request.task, folder)
    data, held_out = read_data(request.train, request.validation, task, request.split, tuning.seed, request.columns,
                               also_files(tuning))  # fmt: skip
    from lmworks.training.measure import main_metric, problem_type

    criterion = main_metric(task, held_out, problem_type(data))
    domains = read_domains(data, task, tuning, request.columns)
    return Plan(request=request, folder=folder, task=task, data=data, held_out=held_out, domains=domains,
                criterion=criterion, knobs=knobs, grid=grid, count=count)  # fmt: skip


@contextmanager
def open_study(plan: Plan, *, overwrite: bool) -> Iterator[SharedStudy]:
    """Open the storage and the folder of the trials; raise InputError where either belongs to another search.

    Until the block ends no other run can take the folder.
    """
    request, partial = plan.request, plan.partial
    if request.storage.is_dir():
        raise InputError("the storage is a folder", where=str(request.storage), expected="a file: --storage a.jsonl")
    if partial.exists() and not request.storage.exists() and not overwrite:
        raise in_use(partial)
    others = [part for domain in plan.domains for part in (domain.train, domain.held_out)]
    weights = sorted(path for path in plan.folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    facts = {
        "model": hashlib.sha256("".join(sha256(path) for path in weights).encode()).hexdigest(),
        "data": fingerprint(plan.data, plan.held_out, *others),
        "task": plan.task,
        "search": request.search,
        "space": [str(knob) for knob in plan.knobs],
        "seeds": request.seeds,
        **as_json(asdict(request.tuning)),
    }
    study = SharedStudy(
        request.storage, partial / LOCKS, knobs=plan.knobs, how=request.search, seed=request.tuning.seed,
        count=plan.count, maximize=plan.criterion != "loss", grid=plan.grid,
    )  # fmt: skip
    with study.held():
        study.check_same(facts)
        settle_folder(partial, request.out, study.id, overwrite=overwrite)
        handle = os.open(partial, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        yield study
    finally:
        os.close(handle)


def settle_folder(partial: Path, out: Path, mark: str, *, overwrite: bool) -> None:
    """Make sure that the trials in the folder are those of the storage, or begin with none."""
    from lmworks.training.state import hold

    if partial.exists() and not ((partial / MARK).exists() and read_json(partial / MARK).get("id") == mark):
        if not overwrite:
            raise in_use(partial)
        with hold(partial):  # nobody is at work there
            shutil.rmtree(partial)
    (partial / LOCKS).mkdir(parents=True, exist_ok=True)
    write_json(partial / MARK, {"id": mark})
    trials, earlier = partial / TRIALS, out / TRIALS
    if not trials.exists() and earlier.is_dir() and read_json(out / MARK).get("id") == mark:
        staged = trials.with_name(f"{trials.name}{STAGED}")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(earlier, staged).rename(trials)  # more trials for a search that was done
    trials.mkdir(exist_ok=True)


def in_use(partial: Path) -> InputError:
    """Return the error for a folder with another run."""
    return InputError("another run is in this folder", where=str(partial),
                      fix="finish it with its own --storage, add --overwrite, or choose another -o")  # fmt: skip
