"""`lmworks export`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from lmworks.cli.output import Json, Model, Out, Overwrite, Revision, show

DTYPES = (
    "hf: fp32, fp16 or bf16; as the file has it if not given. onnx and web: one or several of fp32, fp16, int8 (which "
    "is q8), uint8, q4, q4f16, bnb4, with commas; fp32,int8 if not given."
)


def export(
    model: Model,
    /,
    *,
    out: Out,
    to: Annotated[
        Literal["hf", "onnx", "web"],
        Parameter(help="hf: today's Hugging Face layout. onnx: graphs that run without torch. web: those and a page."),
    ] = "hf",
    dtype: Annotated[str | None, Parameter(help=DTYPES)] = None,
    external: Annotated[
        bool,
        Parameter(help="onnx: put the weights beside the graph, as models above 2 GB do by themselves.", negative=""),
    ] = False,
    overwrite: Overwrite = False,
    revision: Revision = None,
    json: Json = False,
) -> int:
    """Write a checkpoint as another program reads it; `out` is whole or absent.

    An adapter is merged before it becomes a graph.
    """
    from lmworks.base.errors import InputError
    from lmworks.base.hub import find_folder

    folder = find_folder(model, revision=revision)
    if to == "hf":
        from lmworks.export.hf import export as rewrite

        if external:
            raise InputError("--external is for graphs", fix="add --to onnx")
        return show(rewrite(folder, out, to=to, dtype=dtype, overwrite=overwrite), json=json)
    from lmworks.export.onnx_folder import export_graphs

    dtypes = [name.strip() for name in (dtype or "fp32,int8").split(",")]
    report = export_graphs(folder, out, to=to, dtypes=dtypes, external=external or None, overwrite=overwrite)
    return show(report, json=json)
