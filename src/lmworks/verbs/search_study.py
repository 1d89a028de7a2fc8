"""The trials of a search in one file that several processes share: each is claimed, run and told exactly once.

The file is Optuna's journal. Everything that reads and then writes it holds an flock, and so does whoever runs a trial
for as long as it lives: a trial that is running in the file but whose lock is free was killed, and is claimed again.
What a trial tries follows from (seed, its number, the trials before it).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmworks.base.errors import InputError
from lmworks.verbs.search_space import Knob, Value

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

How = Literal["tpe", "random", "grid", "halving"]
Variant = tuple[tuple[str, Any], ...]
NAME = "lmworks"  # of the one study in the file
FIRST_RANDOM = 8  # trials before TPE learns from them
KEEP_ONE_OF = 3  # halving: the share that goes on at each rung


class FileLock:
    """An flock that a killed process leaves free, and that its holder may take again."""

    def __init__(self, path: Path) -> None:
        self.path, self.depth, self.handle = path, 0, -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        if not self.depth:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self.handle, fcntl.LOCK_EX)
        self.depth += 1
        return True

    def release(self) -> None:
        """Give it back."""
        self.depth -= 1
        if not self.depth:
            os.close(self.handle)


@dataclass(frozen=True)
class Trial:
    """A trial that this process has claimed: nobody else runs it until `handle` is closed."""

    number: int
    id: int
    params: dict[str, Value]
    handle: int


class SharedStudy:
    """The study at `path`; `locks` is a folder that all its workers see."""

    def __init__(
        self, path: Path, locks: Path, *, knobs: Sequence[Knob], how: How, seed: int, count: int, maximize: bool,
        grid: Sequence[Mapping[str, Value]] = (),
    ) -> None:  # fmt: skip
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path, self.locks, self.knobs, self.how, self.seed = path, locks, tuple(knobs), how, seed
        self.count, self.grid, self.maximize = count, grid, maximize
        self.lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.held():
                mend(path)
                storage = JournalStorage(JournalFileBackend(str(path), lock_obj=self.lock))  # type: ignore[arg-type]
                direction: Literal["maximize", "minimize"] = "maximize" if maximize else "minimize"
                known = NAME in optuna.get_all_study_names(storage)  # only then is nothing written
                self.study = (
                    optuna.load_study(storage=storage, study_name=NAME)
                    if known
                    else optuna.create_study(storage=storage, study_name=NAME, direction=direction)
                )
        except OSError as error:
            raise InputError("the storage cannot be written", where=str(path), found=error.strerror or str(error),
                             fix="choose another --storage") from None  # fmt: skip
        except (ValueError, KeyError, TypeError, AssertionError):
            raise InputError("this file is no storage of a search", where=str(path),
                             fix="choose another --storage") from None  # fmt: skip

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the other processes from the file."""
        self.lock.acquire()
        try:
            yield
        finally:
            self.lock.release()

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Record what is searched, or raise InputError where the file holds the search of something else."""
        with self.held():
            before = self.study.user_attrs.get("search")
            if before is None:
                self.study.set_user_attr("search", {**facts, "id": uuid.uuid4().hex})
                return
        changed = [name for name, value in facts.items() if before.get(name) != value]
        if changed:
            raise InputError(
                "the storage holds another search",
                where=str(self.path),
                found=", ".join(f"{name}: {short(facts[name])}" for name in changed),
                expected=", ".join(f"{name}: {short(before.get(name))}" for name in changed),
                fix="repeat the first command, or choose another --storage",
            )

    @property
    def id(self) -> str:
        """What tells this search from any other."""
        with self.held():
            return str(self.study.user_attrs["search"]["id"])

    def trials(self) -> list[FrozenTrial]:
        """Return all trials in the order of their numbers."""
        with self.held():
            return self.study.get_trials(deepcopy=True)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials with a score."""
        return [trial for trial in self.trials() if trial.state.name == "COMPLETE"]

    def best(self) -> FrozenTrial | None:
        """Return the finished trial with the best score; of equal ones that with the lowest loss, then the first.

        Where variants are repeated with other seeds, the variant with the best mean is chosen first.
        """
        groups = list(by_variant(self.finished()).values())
        if any(is_repeated(group) for group in groups):
            most = max(map(len, groups))
            means = [(-1 if self.maximize else 1) * mean_score(group) for group in groups]
            groups = [min(zip(means, groups, strict=True), key=lambda row: (len(row[1]) < most, row[0]))[1]]
        return min((trial for group in groups for trial in group), key=self.order, default=None)

    def order(self, trial: FrozenTrial) -> tuple[bool, float, float, int]:
        """Return by what trials are sorted, the best first."""
        sign, loss = -1 if self.maximize else 1, trial.user_attrs.get("loss")
        score = math.inf if trial.value is None else sign * trial.value
        return trial.state.name != "COMPLETE", score, math.inf if loss is None else loss, trial.number

    def claim(self) -> Trial | None:
        """Return a killed trial, or a new one; None where there is nothing to do now."""
        with self.held():
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if not trial.state.is_finished() and (handle := try_lock(self.locks / str(trial.number))) is not None:
                    return Trial(trial.number, trial._trial_id, self.sample(trial.number, trial), handle)
            if len(trials) >= self.count:
                return None
            number = len(trials)
            handle = try_lock(self.locks / str(number))
            if handle is None:
                return None
            params = self.sample(number, None)
            return Trial(number, self.study.get_trials(deepcopy=False)[number]._trial_id, params, handle)

    def all_done(self) -> bool:
        """Tell whether no trial is running or still to come."""
        trials = self.trials()
        return len(trials) >= self.count and all(trial.state.is_finished() for trial in trials)

    def sample(self, number: int, started: FrozenTrial | None) -> dict[str, Value]:
        """Return the values of a trial, which is put into the file unless it was started before."""
        import optuna
        from optuna.distributions import BaseDistribution, CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        if self.how == "grid":
            if started is None:
                params = dict(self.grid[number])
                distributions: dict[str, BaseDistribution] = {
                    name: CategoricalDistribution(tuple(dict.fromkeys(row[name] for row in self.grid)))
                    for name in params
                }
                self.study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=distributions))
            return dict(self.grid[number])
        self.study.sampler = self.make_sampler(number, 0)
        trial = self.study.ask() if started is None else optuna.trial.Trial(self.study, started._trial_id)
        _ = trial.relative_params  # before the sampler changes: what TPE draws jointly
        values: dict[str, Value] = {}
        for i, knob in enumerate(self.knobs):
            self.study.sampler = self.make_sampler(number, 1 + i)
            if knob.choices:
                values[knob.name] = trial.suggest_categorical(knob.name, knob.choices)
            elif knob.whole:
                values[knob.name] = trial.suggest_int(knob.name, int(knob.low), int(knob.high), log=knob.log)
            else:
                values[knob.name] = trial.suggest_float(knob.name, knob.low, knob.high, log=knob.log)
        return values

    def make_sampler(self, number: int, stream: int) -> BaseSampler:
        """Return a sampler whose numbers follow from the seed, the trial and the knob."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = int(np.random.SeedSequence([self.seed, number, stream]).generate_state(1)[0])
        if self.how == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=FIRST_RANDOM, multivariate=True)

    def goes_on(self, trial: Trial, rung: int, score: float) -> bool:
        """Record the score of a validation; say whether the trial is among the best third that came so far.

        Asynchronous successive halving (Li et al. 2020): the rungs are validations 1, 3, 9 …
        """
        with self.held():
            storage = self.study._storage
            mine = storage.get_trial(trial.id).intermediate_values
            if rung not in mine:
                storage.set_trial_intermediate_value(trial.id, rung, score)
            if not is_power(rung, KEEP_ONE_OF):
                return True
            others = [one.intermediate_values for one in self.study.get_trials(deepcopy=False)]
        scores = sorted((one[rung] for one in others if rung in one), reverse=self.maximize)
        last = scores[max(1, len(scores) // KEEP_ONE_OF) - 1]
        return score >= last if self.maximize else score <= last

    def tell(self, trial: Trial, value: float | None, facts: Mapping[str, Any], *, pruned: bool = False) -> None:
        """Finish a trial: with its score, stopped early, or failed (no value)."""
        from optuna.trial import TrialState

        state = TrialState.PRUNED if pruned else TrialState.FAIL if value is None else TrialState.COMPLETE
        with self.held():
            for name, fact in facts.items():
                self.study._storage.set_trial_user_attr(trial.id, name, fact)
            self.study._storage.set_trial_state_values(trial.id, state, None if value is None else [value])


def by_variant(trials: Sequence[FrozenTrial]) -> dict[Variant, list[FrozenTrial]]:
    """Return the trials of each variant: what was varied, without the seed."""
    groups: dict[Variant, list[FrozenTrial]] = {}
    for trial in trials:
        key = tuple((name, value) for name, value in trial.params.items() if name != "seed")
        groups.setdefault(key, []).append(trial)
    return groups


def is_repeated(trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether the trials of a variant have several seeds."""
    return len({trial.params.get("seed") for trial in trials}) > 1


def scores(trials: Sequence[FrozenTrial]) -> list[float]:
    """Return the scores of finished trials."""
    return [trial.value for trial in trials if trial.value is not None]


def mean_score(trials: Sequence[FrozenTrial]) -> float:
    """Return the mean score of finished trials."""
    return float(np.mean(scores(trials)))


def mend(path: Path) -> None:
    """Cut off a last line that was written in part, as after a loss of power; raise ValueError for no journal."""
    data = path.read_bytes() if path.is_file() else b""
    first = json.loads(data.partition(b"\n")[0]) if data else {"op_code": 0}
    if not isinstance(first, dict) or "op_code" not in first:
        raise ValueError("no journal")
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def try_lock(path: Path) -> int | None:
    """Return an open file with an flock, or None where another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_power(number: int, base: int) -> bool:
    """Tell whether a number is 1, base, base² …"""
    while number > 1 and number % base == 0:
        number //= base
    return number == 1


def short(value: Any) -> str:
    """Return a value in at most 60 letters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
