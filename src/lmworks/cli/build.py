"""`lmworks build` and `lmworks train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Out, Overwrite, Resume, show
from lmworks.verbs.settings import Settings

Knobs = Annotated[Settings, Parameter(name="*")]
Texts = Annotated[
    Path | None, Parameter(help="A file or folder of txt, md, html, csv, tsv or jsonl; none: a built-in language.")
]
Column = Annotated[str | None, Parameter(help="The column of csv, tsv or jsonl that holds the text.")]
DryRun = Annotated[bool, Parameter(help="Print parameters, memory, time and disk, and do nothing.", negative="")]
Runtimes = Annotated[str, Parameter(help="Where to prove equality: torch, onnx, node, browser.")]


def build(
    texts: Texts = None,
    /,
    *,
    out: Out,
    column: Column = None,
    runtimes: Runtimes = "torch,onnx,node,browser",
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Knobs = Settings(),  # noqa: B008 (frozen)
) -> int:
    """Text to a verified model in a web page, in one command."""
    from lmworks import api

    report = api.build(
        texts,
        out,
        settings=settings,
        column=column,
        runtimes=runtimes.split(","),
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    show(report, json=json)
    return 0 if report.values.get("verified", True) else 1


def train(
    texts: Texts = None,
    /,
    *,
    out: Out,
    column: Column = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    settings: Knobs = Settings(),  # noqa: B008 (frozen)
) -> int:
    """Text to a tokenizer and a trained model, in the Hugging Face layout."""
    from lmworks import api

    report = api.train(
        texts, out, settings=settings, column=column, resume=resume, overwrite=overwrite, dry_run=dry_run
    )
    return show(report, json=json)
