"""`lmworks compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.columns import Header, LabelColumn
from lmworks.cli.output import Json, show


def compare(
    *models: Annotated[str, Parameter(help="Folders of models, runs or n-gram models; the first is the yardstick.")],
    data: Annotated[
        tuple[Path, ...],
        Parameter(
            help="Texts, or labelled data; of several files the first is the domain.",
            negative="",
            consume_multiple=True,
        ),
    ] = (),
    column: Annotated[
        str | None, Parameter(name=["--text-column", "--column"], help="The column of a table that holds the text.")
    ] = None,
    label_column: LabelColumn = None,
    header: Header = True,
    split: Annotated[str | None, Parameter(help="The part of a nested file to score on.")] = None,
    reach: Annotated[
        float | None, Parameter(help="The held-out loss to time; none: the best that all runs reach.")
    ] = None,
    seed: Annotated[int, Parameter(help="Of the draws for intervals and p-values.")] = 0,
    html: Annotated[Path | None, Parameter(help="Write the report as a page, too.")] = None,
    json: Json = False,
) -> int:
    """Put runs and models side by side: size, time, convergence, scores, and whether differences are chance."""
    from lmworks.base.files import write_text
    from lmworks.verbs.comparing import compare as run

    report = run(
        models, data, column=column, label_column=label_column, header=header, split=split, reach=reach, seed=seed
    )
    if html is not None:
        write_text(html, report.to_html())
    return show(report, json=json)
