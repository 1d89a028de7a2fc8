"""`lmworks distill`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.columns import Columns, Train, Validation
from lmworks.cli.finetune import Task
from lmworks.cli.output import DryRun, Json, Out, Overwrite, Resume, Revision, show
from lmworks.verbs.distilling import Distilling

Knobs = Annotated[Distilling, Parameter(name="*")]


def distill(
    teacher: Annotated[str, Parameter(help="A fine-tuned model's folder, an adapter's, or a name on the Hub.")],
    train: Train,
    /,
    *,
    out: Out,
    validation: Validation = None,
    task: Task = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    revision: Revision = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
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
        **vars(columns),
        revision=revision,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    return show(report, json=json)
