"""`lmworks tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.finetune import Knobs, Task, TextColumn
from lmworks.cli.output import Header, Json, LabelColumn, Model, Out, Overwrite, Revision, show
from lmworks.search_study import How
from lmworks.training.tuning import Tuning


def tune(
    model: Model,
    train: Annotated[Path, Parameter(help="Labelled data: jsonl, csv, tsv, CoNLL, SQuAD, or nested JSON.")],
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
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    header: Header = True,
    split: Annotated[
        str | None, Parameter(help='The part of a nested file to train on; "train,val" also names the other.')
    ] = None,
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
        text_column=text_column,
        label_column=label_column,
        header=header,
        split=split,
        revision=revision,
        overwrite=overwrite,
    )
    return show(report, json=json)
