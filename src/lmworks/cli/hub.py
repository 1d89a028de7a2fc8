"""`lmworks pull`, `lmworks inspect` and `lmworks doctor`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Model, Revision, show


def pull(
    model: Annotated[str, Parameter(help="org/name on the Hub.")],
    /,
    *,
    revision: Revision = None,
    files: Annotated[
        list[str] | None, Parameter(help="Patterns of the files to fetch, instead of what a model needs.", negative="")
    ] = None,
    json: Json = False,
) -> int:
    """Fetch a model from the Hub into the shared cache; only what is missing or new is fetched."""
    from lmworks.base.hub import pull_report

    return show(pull_report(model, revision=revision, files=files), json=json)


def inspect(model: Model, /, *, revision: Revision = None, json: Json = False) -> int:
    """Describe a model folder: structure, parameters, files, tokenizer, labels, and what is wrong with it."""
    from lmworks.base.hub import find_folder
    from lmworks.verbs.inspection import inspect_folder

    return show(inspect_folder(find_folder(model, revision=revision)), json=json)


def doctor(*, json: Json = False) -> int:
    """Look at the installation and the machine; exit code 1 if something is broken."""
    from lmworks.verbs.doctor import examine

    report = examine()
    show(report, json=json)
    return 0 if report.values["passed"] else 1
