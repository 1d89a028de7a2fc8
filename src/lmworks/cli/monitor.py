"""`lmworks monitor fit` and `lmworks monitor check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lmworks.cli.columns import Columns, Train
from lmworks.cli.output import Json, Model, Overwrite, Revision, show


def fit(
    model: Model,
    data: Train,
    /,
    *,
    out: Annotated[
        Path | None, Parameter(name=["--out", "-o"], help="Write a copy of the model's folder; none: into the folder.")
    ] = None,
    validation: Annotated[
        Path | None, Parameter(help="Data that the model has not learnt; none: a tenth of DATA, as finetune holds out.")
    ] = None,
    out_of_scope: Annotated[
        Path | None, Parameter(help="Texts that the model cannot answer, FILE or FILE:SPLIT: they choose the score.")
    ] = None,
    false_alarms: Annotated[float, Parameter(help="The share of known texts that may be flagged.")] = 0.05,
    score: Annotated[
        Literal["auto", "softmax", "energy", "mahalanobis", "nearest"],
        Parameter(help="What tells strange texts; auto: the best on --out-of-scope, else nearest."),
    ] = "auto",
    dtype: Annotated[str, Parameter(help="Which of the exported graphs: fp32, int8 …; auto: the most exact.")] = "auto",
    seed: Annotated[int, Parameter(help="That of finetune, so that the same tenth is held out.")] = 0,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Fit confidence, a threshold for strange texts and a reference for drift; they are saved beside the model."""
    from lmworks.verbs.monitoring import fit_monitor

    report = fit_monitor(
        model, data, out, validation=validation, out_of_scope=out_of_scope, false_alarms=false_alarms, score=score,
        dtype=dtype, seed=seed, **vars(columns), revision=revision, overwrite=overwrite,
    )  # fmt: skip
    return show(report, json=json)


def check(
    source: Annotated[str, Parameter(help="A server, such as http://127.0.0.1:8000, or the file of its --drift-log.")],
    /,
    *,
    data: Annotated[
        Path | None, Parameter(help="A labelled sample for the server to answer: has its accuracy fallen?")
    ] = None,
    model: Annotated[str | None, Parameter(help="Which of the server's models; all of them by default.")] = None,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    api_key_file: Annotated[Path | None, Parameter(help="A file whose first line is the key to ask with.")] = None,
    html: Annotated[Path | None, Parameter(help="Write the report with its charts to this file.")] = None,
    json: Json = False,
) -> int:
    """Ask whether traffic has drifted, or accuracy has fallen; exit code 1 where it has."""
    from lmworks.base.files import write_text
    from lmworks.serve.loadtest import read_key
    from lmworks.verbs.monitoring_check import check_monitor

    report = check_monitor(source, data=data, model=model, key=read_key(api_key_file), **vars(columns))
    show(report, json=json)
    if html is not None:
        write_text(html, report.to_html())
    return 1 if report.values["drift"] or report.values.get("fallen") else 0
