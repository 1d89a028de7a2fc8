"""`lmworks export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lmworks.cli.output import Code, Json, Model, Out, Overwrite, Revision, show

DTYPES = (
    "hf: fp32, fp16 or bf16; as the file has it if not given. onnx and web: one or several of fp32, fp16, int8 (which "
    "is q8), uint8, q4, q4f16, bnb4, with commas; fp32,int8 if not given. gguf: f32, f16, q8_0, q4_0, likewise; "
    "f16,q8_0 if not given."
)


def export(
    model: Model,
    /,
    *,
    out: Out,
    to: Annotated[
        Literal["hf", "onnx", "web", "gguf"],
        Parameter(
            help="hf: today's Hugging Face layout. onnx: graphs that run without torch. web: those and a page. gguf: "
            "for llama.cpp and Ollama."
        ),
    ] = "hf",
    dtype: Annotated[str | None, Parameter(help=DTYPES)] = None,
    external: Annotated[
        bool,
        Parameter(help="onnx: put the weights beside the graph, as those above 64 MB lie by themselves.", negative=""),
    ] = False,
    data: Annotated[
        Path | None,
        Parameter(
            help="onnx and web: real texts, questions or pictures that torch answers for the self-test, in place of "
            "the built-in ones."
        ),
    ] = None,
    single_file: Annotated[
        bool, Parameter(help="web: also write page.html, the whole page in one file that opens from disk.", negative="")
    ] = False,
    attentions: Annotated[
        bool,
        Parameter(
            help="onnx and web: the graphs of an encoder also give out where each layer looks (attentions.0 and so "
            "on), and the page shows it.",
            negative="",
        ),
    ] = False,
    code: Code = (),
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
    if to in ("hf", "gguf"):
        given = {
            "--external": external, "--data": data is not None, "--single-file": single_file,
            "--attentions": attentions, "--code": bool(code),
        }  # fmt: skip
        if any(given.values()):
            found = " ".join(name for name, value in given.items() if value)
            raise InputError("this option is for graphs and pages", found=found, fix="add --to onnx or --to web")
    if to == "gguf":
        from lmworks.export.gguf import DEFAULT, export_gguf

        dtypes = [name.strip() for name in dtype.split(",")] if dtype else list(DEFAULT)
        return show(export_gguf(folder, out, dtypes=dtypes, overwrite=overwrite), json=json)
    if to == "hf":
        from lmworks.export.hf import export as rewrite

        return show(rewrite(folder, out, to=to, dtype=dtype, overwrite=overwrite), json=json)
    from lmworks.export.onnx_folder import export_graphs

    dtypes = [name.strip() for name in (dtype or "fp32,int8").split(",")]
    report = export_graphs(
        folder, out, to=to, dtypes=dtypes, external=external or None, data=data, single_file=single_file,
        attentions=attentions, code=code, overwrite=overwrite,
    )  # fmt: skip
    return show(report, json=json)
