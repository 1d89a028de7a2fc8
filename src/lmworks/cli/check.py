"""`lmworks verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.output import Json, Model, Revision, show

Runtimes = Annotated[str, Parameter(help="Which runtimes to check: torch, onnx, node, browser.")]


def verify(
    model: Model,
    /,
    *,
    runtimes: Runtimes = "torch,onnx,node,browser",
    against: Annotated[
        str | None, Parameter(help="Compare with another implementation instead: transformers, or a fixture's file.")
    ] = None,
    head: Annotated[str | None, Parameter(help="Compare this head rather than the one config.json names.")] = None,
    texts: Annotated[Path | None, Parameter(help="A file of texts to compare on, beside the built-in ones.")] = None,
    tolerance: Annotated[float, Parameter(help="The largest difference that passes.")] = 1e-5,
    save_fixture: Annotated[Path | None, Parameter(help="Keep transformers' answers, to compare without it.")] = None,
    revision: Revision = None,
    json: Json = False,
) -> int:
    """Prove that every runtime gives the tokens and logits of torch, and that no file was changed.

    Writes certificate.json into the folder. With --against: prove that a checkpoint gives the same numbers as there.
    Exit code 1 if anything differs."""
    from lmworks import api

    if against is None:
        given = {"--head": head, "--texts": texts, "--save-fixture": save_fixture, "--revision": revision}
        if any(value is not None for value in given.values()):
            found = ", ".join(name for name, value in given.items() if value is not None)
            raise InputError("this option compares with another implementation", found=found, fix="add --against")
        report = api.verify(model, runtimes=runtimes.split(","))
    else:
        from lmworks.base.hub import find_folder
        from lmworks.cli.inputs import read_lines
        from lmworks.export.parity import verify_against

        lines = None if texts is None else read_lines(texts, None)
        report = verify_against(
            find_folder(model, revision=revision), against, head=head, texts=lines, save_fixture=save_fixture,
            tolerance=tolerance,
        )  # fmt: skip
    show(report, json=json)
    return 0 if report.values["passed"] else 1
