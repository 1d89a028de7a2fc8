"""`lmworks verify`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Model, show

Runtimes = Annotated[str, Parameter(help="Which runtimes to check: torch, onnx, node, browser.")]


def verify(model: Model, /, *, runtimes: Runtimes = "torch,onnx,node,browser", json: Json = False) -> int:
    """Prove that every runtime gives the tokens and logits of torch, and that no file was changed.

    Writes certificate.json into the folder. Exit code 1 if anything differs."""
    from lmworks import api

    report = api.verify(model, runtimes=runtimes.split(","))
    show(report, json=json)
    return 0 if report.values["passed"] else 1
