"""How every verb shows its result, and the options that all verbs spell alike."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lmworks.base.launch import read_launch
from lmworks.base.report import Report

Out = Annotated[Path, Parameter(name=["--out", "-o"], help="The folder to write.")]
Overwrite = Annotated[bool, Parameter(help="Replace a model that is there already.", negative="")]
Json = Annotated[bool, Parameter(help="Print the result as JSON.", negative="")]
Resume = Annotated[bool, Parameter(help="Continue an interrupted run of the same command.", negative="")]
DryRun = Annotated[bool, Parameter(help="Print parameters, memory and time, and do nothing.", negative="")]
Model = Annotated[str, Parameter(help="A model folder, or the name of a model on the Hub.")]
Code = Annotated[
    tuple[str, ...], Parameter(help="FILE.py:Name of layers of its maker's own, which is run; may be repeated.")
]
Revision = Annotated[str | None, Parameter(help="A branch, tag or commit of a model on the Hub.")]


def show(report: Report, *, json: bool) -> int:
    """Print the report on standard output, as JSON or for people; of processes that train together one does."""
    if read_launch().rank:
        return 0
    if json:
        print_json(report.to_dict())
    else:
        report.print()
    return 0


def print_json(value: Any) -> None:
    """Print one JSON document as the last thing on standard output."""
    plain = (sys.stdout.encoding or "").lower().startswith("utf")  # else letters go as \\u escapes
    text = jsonlib.dumps(value, indent=2, ensure_ascii=not plain, allow_nan=False)
    sys.stdout.write(text + "\n")
