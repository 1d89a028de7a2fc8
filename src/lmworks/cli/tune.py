"""`lmworks tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.columns import Columns, Train
from lmworks.cli.finetune import Knobs, Task
from lmworks.cli.output import Json, Model, Out, Overwrite, Revision, show
from lmworks.training.tuning import Tuning
from lmworks.verbs.search_study import How


def tune(
    model: Model,
    train: Train,
    /,
    *,
    out: Out,
    storage: Annotated[
        Path, Parameter(help="The file of the search: the same command goes on with it, or joins it from elsewhere.")
    ],
    trials: Annotated[int | None, Parameter(help="Runs in all, 24 by default; a grid runs all combinations.")] = None,
    space: Annotated[
        tuple[str, ...],
        Parameter(help="NAME=LOW..HIGH, with :log by its order of magnitude, or NAME=A,B,C.", consume_multiple=True),
    ] = (),
    search: Annotated[
        How, Parameter(help="tpe learns from earlier trials; halving is tpe that stops the weaker two thirds early.")
    ] = "tpe",
    seeds: Annotated[int, Parameter(help="Repeat each variant of a grid with so many seeds.")] = 1,
    jobs: Annotated[int, Parameter(help="Processes that run trials at the same time.")] = 1,
    validation: Annotated[
        Path | None, Parameter(help="Data to score the trials by; none: a tenth of the training data.")
    ] = None,
    task: Task = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
    tuning: Knobs = Tuning(),  # noqa: B008 (frozen)
) -> int:
    """Search the knobs of finetune: many runs, and the best one's model with a report of all."""
    from lmworks import api

    report = api.tune(
        model,
        train,
        out,
        storage=storage,
        trials=trials,
        space=space,
        search=search,
        seeds=seeds,
        jobs=jobs,
        validation=validation,
        task=task,
        tuning=tuning,
        **vars(columns),
        revision=revision,
        overwrite=overwrite,
    )
    return show(report, json=json)
