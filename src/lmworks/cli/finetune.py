"""`lmworks finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Header, Json, LabelColumn, Model, Out, Overwrite, Revision, show
from lmworks.training.tuning import Tuning

Knobs = Annotated[Tuning, Parameter(name="*")]
Task = Annotated[str | None, Parameter(help="A task, such as text-classification; none: the checkpoint's own.")]
TextColumn = Annotated[
    str | None, Parameter(help='The column of the texts, or its number without a header; "a,b" is a pair.')
]


def finetune(
    model: Model,
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
    tuning: Knobs = Tuning(),  # noqa: B008 (frozen)
) -> int:
    """Fine-tune a model on labelled data: a model folder, or an adapter (lora, adapter, prefix)."""
    from lmworks import api

    report = api.finetune(
        model,
        train,
        out,
        validation=validation,
        task=task,
        tuning=tuning,
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
