"""Several tasks learned by one body: each step is a step of one task, with its own head and loss (Caruana 1997).

The tasks take turns as evenly as their weights allow, so that the task of a step follows from its number. An epoch is
one of the first task. Each task's model stays an ordinary one, which can be saved alone with the body it shares.

    joined = join([first, second], [0.5])
    Trainer(joined.model, objective=joined.objective, data=joined.data, config=…, folder=…).fit()
    save_model(first.model, folder)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.training.data import DataSource
from lmworks.training.measure import main_metric, measure
from lmworks.training.mixture import check_weights, share
from lmworks.training.objectives import Objective

if TYPE_CHECKING:
    from lmworks.text.labelled import Labelled
    from lmworks.training.finetune import Setup

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
        check_weights(weights, "the other tasks")
        self.sources, counts = sources, [steps, *share(steps, weights)]
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
    data = TaskMixture([setup.data for setup in setups], weights, steps=setups[0].data.steps)
    objective = MixedObjective([setup.objective for setup in setups])
    return Joined(SharedBody([setup.model for setup in setups]), objective, data)


def measure_tasks(setups: Sequence[Setup], held_out: Sequence[Labelled], names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of every task, as `NAME_accuracy`, and `mean`: that of their main ones.

    The loss of all says little about which weights are the best: a tag is a term of it just as a whole text is.
    """
    found: dict[str, float] = {}
    mains = []
    for setup, data, name in zip(setups, held_out, names, strict=True):
        scores = measure(setup.predictor, data, problem=setup.problem)
        found |= {f"{name}_{metric}": value for metric, value in scores.items()}
        mains.append(scores[main_metric(data.task, data, setup.problem)])
    return {**found, "mean": sum(mains) / len(mains)}


def mark(batch: Batch, task: int) -> Batch:
    """Add the number of its task to every row of a batch."""
    return {**batch, TASK: np.full(len(next(iter(batch.values()))), task, np.int64)}
