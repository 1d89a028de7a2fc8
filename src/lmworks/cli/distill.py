"""`lmworks distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.finetune import Task, TextColumn
from lmworks.cli.output import Header, Json, LabelColumn, Out, Overwrite, Revision, show
from lmworks.distilling import Distilling

Knobs = Annotated[Distilling, Parameter(name="*")]


def distill(
    teacher: Annotated[str, Parameter(help="A fine-tuned model's folder, an adapter's, or a name on the Hub.")],
    train: Annotated[Path, Parameter(help="Labelled data: jsonl, csv, tsv, CoNLL, SQuAD, or nested JSON.")],
    /,
    *,
    out: Out,
    validation: Annotated[
        Path | None, Parameter(help="Data to choose the best weights by; none: a tenth of the training data.")
    ] = None,
    task: Task = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    header: Header = True,
    split: Annotated[
        str | None, Parameter(help='The part of a nested file to train on; "train,val" also names the other.')
    ] = None,
    revision: Revision = None,
    resume: Annotated[bool, Parameter(help="Continue an interrupted run of the same command.", negative="")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, Parameter(help="Print parameters, memory and time, and do nothing.", negative="")] = False,
    json: Json = False,
    knobs: Knobs = Distilling(),  # noqa: B008 (frozen)
) -> int:
    """Teach a smaller model what a larger one says; the report shows both side by side."""
    from lmworks import api

    report = api.distill(
        teacher,
        train,
        out,
        validation=validation,
        task=task,
        knobs=knobs,
        text_column=text_column,
        label_column=label_column,
        header=header,
        split=split,
        revision=revision,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return show(report, json=json)
