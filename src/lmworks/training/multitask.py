"""Several tasks learned by one body: each step is a step of one task, with its own head and loss (Caruana 1997).

The tasks take turns as evenly as their weights allow, so that the task of a step follows from its number. An epoch is
one of the first task. Each task's model stays an ordinary one, which can be saved alone with the body it shares.

    tune_tasks([first, second], held_out, names, [0.5], folder, tuning=tuning)
    save_model(first.model, out)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.training.callbacks import Callback
from lmworks.training.data import DataSource
from lmworks.training.distributed import find_ranks
from lmworks.training.finetune import Setup, Tuned, fit, train_config
from lmworks.training.measure import main_metric, measure
from lmworks.training.mixture import check_weights, share
from lmworks.training.objectives import Objective
from lmworks.training.trackers import make_trackers
from lmworks.training.trainer import Trainer
from lmworks.training.tuning import Tuning
from lmworks.training.validation import held_out_loss

if TYPE_CHECKING:
    from lmworks.text.labelled import Labelled

TASK = "task"  # (B,): the number of the task that a batch's rows belong to


class SharedBody(nn.Module):
    """Models of several tasks over one Transformer, the first one's; the others give theirs up."""

    def __init__(self, models: Sequence[Any]) -> None:
        super().__init__()
        first = models[0].transformer
        shapes = [[(name, p.shape) for name, p in model.transformer.named_parameters()] for model in models]
        if any(shape != shapes[0] for shape in shapes):
            raise InputError("the tasks have different bodies", fix="start them all from one model and one method")
        for model in models:
            model.transformer = first
            model.tie()
        self.models = nn.ModuleList(models)


class TaskMixture:
    """Batches of several sources in turn: those of the first once, those of the others as often as they come up."""

    def __init__(self, sources: Sequence[DataSource], weights: Sequence[float], *, steps: int) -> None:
        """Take turns for `steps` batches of the first source; `weights` are the shares of the others."""
        check_weights(weights, "--also-task")
        self.sources, self.counts = sources, (counts := [steps, *share(steps, weights)])
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        order = np.argsort(places, kind="stable")
        self.tasks = np.repeat(np.arange(len(counts)), counts)[order]  # (steps of all,)
        self.turns = np.concatenate([np.arange(count) for count in counts])[order]  # the step of that source

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return len(self.tasks)

    def batch(self, step: int) -> Batch:
        """Return the batch of the source whose turn it is."""
        task = int(self.tasks[step % self.steps])
        return mark(self.sources[task].batch(int(self.turns[step % self.steps])), task)

    def validation(self, tokens: int | None = None) -> Iterator[Batch]:
        """Yield the held-out batches of each source."""
        for task, source in enumerate(self.sources):
            for batch in source.validation(tokens):
                yield mark(batch, task)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the sources and their turns."""
        digest = hashlib.sha256(self.tasks.astype(np.int64).tobytes())
        for source in self.sources:
            digest.update(source.fingerprint().encode())
        return digest.hexdigest()


class MixedObjective:
    """The loss of the task that a batch belongs to, over that task's model."""

    unit = "terms"

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = objectives

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of one task."""
        shared: Any = model
        task = int(batch[TASK][0])
        return self.objectives[task](
            shared.models[task], {name: value for name, value in batch.items() if name != TASK}
        )

    def count(self, batch: Batch) -> int:
        """Return the number of its terms."""
        return self.objectives[int(batch[TASK][0])].count(batch)


class Joined(NamedTuple):
    """What a Trainer needs to learn several tasks at once."""

    model: SharedBody
    objective: MixedObjective
    data: TaskMixture


def join(setups: Sequence[Setup], weights: Sequence[float]) -> Joined:
    """Let tasks that were set up from one model share its body; `weights` are the steps' shares of all but the first.

    Raises InputError where the bodies differ or the weights leave nothing for the first task.
    """
    first, *others = (setup.data for setup in setups)
    data = TaskMixture([first, *others], weights, steps=first.steps)
    for source, count in zip(others, data.counts[1:], strict=True):
        source.plan_for(count)
    objective = MixedObjective([setup.objective for setup in setups])
    return Joined(SharedBody([setup.model for setup in setups]), objective, data)


def measure_tasks(setups: Sequence[Setup], held_out: Sequence[Labelled], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of every task, as `NAME_accuracy`, and `mean`: that of their main ones, each at most 1.

    The loss of all says little about which weights are the best: a tag is a term of it just as a whole text is.
    """
    found: dict[str, float] = {}
    mains = []
    for setup, data, name in zip(setups, held_out, names, strict=True):
        main = main_metric(data.task, data, setup.problem)
        scores = (
            {"perplexity": math.exp(own_loss(setup) or 0.0)}
            if data.references[0] is None
            else measure(setup.predictor, data, problem=setup.problem)
        )
        found |= {f"{name}_{metric}": value for metric, value in scores.items()}
        if main in scores:
            mains.append(scores[main])
        else:
            mains.append(1 / scores["perplexity"] if "perplexity" in scores else 1 / (1 + scores["mse"]))
    return {**found, "mean": sum(mains) / len(mains)}


def own_loss(setup: Setup) -> float | None:
    """Return the held-out loss of one task."""
    training = setup.model.training
    loss = held_out_loss(setup.model, setup.objective, setup.data.validation(), dtype="fp32")
    setup.model.train(training)
    return loss


def tune_tasks(
    setups: Sequence[Setup], held_out: Sequence[Labelled], names: Sequence[str], weights: Sequence[float],
    folder: Path, *, tuning: Tuning, stream: TextIO | None = None, callbacks: Sequence[Callback] = (),
) -> list[Tuned]:  # fmt: skip
    """Train (or resume) in `folder`; the models end with the weights that scored best on average.

    Each Tuned has the held-out loss of its own task and the curves of the whole run.
    """
    joined = join(setups, weights)
    trainer = Trainer(
        joined.model,
        objective=joined.objective,
        data=joined.data,
        config=train_config(joined.data.steps, tuning, "mean"),
        folder=folder,
        stream=stream,
        measure=partial(measure_tasks, setups, held_out, names),
        callbacks=[*make_trackers(tuning.track, folder, asdict(tuning), stream=stream), *callbacks],
        workers=tuning.workers,
    )
    result = fit(trainer, tuning)
    losses = find_ranks().once(lambda: [own_loss(setup) for setup in setups])
    return [
        Tuned(
            model=setup.model,
            predictor=setup.predictor,
            result=replace(result, best_loss=loss),
            new_head=setup.new_head,
        )
        for setup, loss in zip(setups, losses, strict=True)
    ]


def mark(batch: Batch, task: int) -> Batch:
    """Add the number of its task to every row of a batch."""
    return {**batch, TASK: np.full(len(next(iter(batch.values()))), task, np.int64)}
