"""`lmworks new` and `lmworks add playground`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.output import Json, show

Docker = Annotated[bool, Parameter(help="The commands run in a container.", negative="")]
Native = Annotated[bool, Parameter(help="The commands run in an environment of the folder's own.", negative="")]


def new(
    name: Annotated[Path, Parameter(help="The folder to make.")], /, *, docker: Docker = False, native: Native = False,
    json: Json = False,
) -> int:  # fmt: skip
    """Make a playground: examples for each task, one file each, pinned to this version."""
    from lmworks.scaffold.playground import make_playground

    if docker and native:
        raise InputError("a playground is native or in Docker", fix="leave one of --native and --docker out")
    return show(make_playground(name, docker=docker if docker or native else None), json=json)


def add(*, docker: Docker = False, native: Native = False, json: Json = False) -> int:
    """Make a playground in the project that this folder is; none of its files change."""
    return new(Path("playground"), docker=docker, native=native, json=json)
