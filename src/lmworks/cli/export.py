"""`lmworks export`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Model, Out, Overwrite, Revision, show


def export(
    model: Model,
    /,
    *,
    out: Out,
    to: Annotated[str, Parameter(help="hf: a folder in today's Hugging Face layout.")] = "hf",
    dtype: Annotated[str | None, Parameter(help="fp32, fp16 or bf16; as the file has it if not given.")] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    json: Json = False,
) -> int:
    """Write a checkpoint, however old its files, as transformers reads it today; `out` is whole or absent."""
    from lmworks.base.hub import find_folder
    from lmworks.export.hf import export as run

    return show(run(find_folder(model, revision=revision), out, to=to, dtype=dtype, overwrite=overwrite), json=json)
