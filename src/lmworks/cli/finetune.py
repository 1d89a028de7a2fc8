"""`lmworks finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.columns import Columns, Validation
from lmworks.cli.output import DryRun, Json, Model, Out, Overwrite, Resume, Revision, show
from lmworks.training.tuning import Tuning

Data = Annotated[
    Path | None, Parameter(help="Labelled data: jsonl, csv, tsv, CoNLL, SQuAD, nested JSON; none: --from-feedback.")
]
Knobs = Annotated[Tuning, Parameter(name="*")]
Task = Annotated[str | None, Parameter(help="A task, such as text-classification; none: the checkpoint's own.")]


def finetune(
    model: Model,
    train: Data = None,
    /,
    *,
    out: Out,
    from_feedback: Annotated[
        str | None, Parameter(help="A database of feedback: what is accepted is trained on as well, or alone.")
    ] = None,
    validation: Validation = None,
    task: Task = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    revision: Revision = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    tuning: Knobs = Tuning(),  # noqa: B008 (frozen)
) -> int:
    """Fine-tune a model on labelled data: a model folder, or an adapter (lora, adapter, prefix)."""
    from lmworks import api

    report = api.finetune(
        model,
        train,
        out,
        from_feedback=from_feedback,
        validation=validation,
        task=task,
        tuning=tuning,
        **vars(columns),
        revision=revision,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return show(report, json=json)
