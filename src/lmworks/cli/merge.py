"""`lmworks merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Out, Overwrite, show


def merge(
    adapter: Annotated[Path, Parameter(help="The folder of an adapter, as finetune or peft wrote it.")],
    /,
    *,
    out: Out,
    base: Annotated[str | None, Parameter(help="The base model, where the adapter names another place.")] = None,
    limit: Annotated[float, Parameter(help="How far a logit may move at most.")] = 1e-3,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Work an adapter into its base model, in float32, and check that the logits stay; `out` is whole or absent."""
    from lmworks.base.optional import require

    require("torch", extra="torch")
    from lmworks.export.merge import merge as run

    return show(run(adapter, out, base=base, limit=limit, overwrite=overwrite), json=json)
