"""`lmworks feedback list|review|export|copy|forget`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, show

Url = Annotated[str, Parameter(help="Where feedback is kept: FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE.")]
Only = Annotated[str | None, Parameter(help="Of this model only.")]
Ids = tuple[str, ...]


def list_(url: Url, /, *, model: Only = None, json: Json = False) -> int:
    """Count feedback by model, label and state, and show what waits for a decision."""
    from lmworks.verbs.feedback import list_feedback

    return show(list_feedback(url, model=model), json=json)


def review(
    url: Url,
    /,
    *,
    accept: Annotated[Ids, Parameter(help="Ids, or all that is new.", negative="", consume_multiple=True)] = (),
    reject: Annotated[Ids, Parameter(help="Ids, or all that is new.", negative="", consume_multiple=True)] = (),
    model: Only = None,
    json: Json = False,
) -> int:
    """Accept or reject feedback by its ids, or one by one on a terminal."""
    from lmworks.verbs.feedback import ask_person, review_feedback

    here = sys.stdin is not None and sys.stdin.isatty()
    ask = ask_person if here else None
    return show(review_feedback(url, accept=accept, reject=reject, model=model, ask=ask), json=json)


def export(
    url: Url,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"], help="The jsonl file to write.")],
    all: Annotated[bool, Parameter(help="Take what nobody has looked at as well.", negative="")] = False,
    model: Only = None,
    json: Json = False,
) -> int:
    """Write accepted feedback as labelled examples; a text with labels that contradict is left out and told."""
    from lmworks.verbs.feedback import export_feedback

    return show(export_feedback(url, out, model=model, new=all), json=json)


def copy(source: Url, target: Url, /, *, json: Json = False) -> int:
    """Copy a database of feedback to another one; it may be stopped and run again."""
    from lmworks.verbs.feedback import copy_feedback

    return show(copy_feedback(source, target), json=json)


def forget(
    url: Url,
    /,
    *,
    before: Annotated[str, Parameter(help="The day or time (UTC), as 2026-10-31; what is younger stays.")],
    all: Annotated[
        bool, Parameter(help="Accepted and rejected feedback as well; what nobody decided stays.", negative="")
    ] = False,
    json: Json = False,
) -> int:
    """Delete old answers that nobody spoke of."""
    from lmworks.verbs.feedback import forget_feedback

    return show(forget_feedback(url, before, decided=all), json=json)
