"""`lmworks verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.output import Json, Model, Revision, show

Runtimes = Annotated[str, Parameter(help="Which runtimes to check: torch, onnx, node, browser; webgpu where asked.")]


def verify(
    model: Model,
    /,
    *more: Annotated[str, Parameter(help="More folders: one table for all of them.")],
    runtimes: Runtimes = "torch,onnx,node,browser",
    dtype: Annotated[
        str | None, Parameter(help="Which graphs to check, with commas: fp32, int8, q4 …; all if not given.")
    ] = None,
    weights: Annotated[
        str | None, Parameter(help="The checkpoint or adapter that torch runs, where the folder holds graphs alone.")
    ] = None,
    against: Annotated[
        str | None, Parameter(help="Compare with another implementation instead: transformers, or a fixture's file.")
    ] = None,
    head: Annotated[str | None, Parameter(help="Compare this head rather than the one config.json names.")] = None,
    texts: Annotated[Path | None, Parameter(help="A file of texts to compare on, beside the built-in ones.")] = None,
    tolerance: Annotated[
        float | None, Parameter(help="With --against the largest difference that passes; 1e-5 if not given.")
    ] = None,
    save_fixture: Annotated[Path | None, Parameter(help="Keep transformers' answers, to compare without it.")] = None,
    revision: Revision = None,
    json: Json = False,
) -> int:
    """Prove that every runtime gives the tokens, decisions and logits of torch, and that no file was changed.

    Writes certificate.json into the folder, and its verdicts into the receipt. With --against: prove that a checkpoint
    gives the same numbers as there. Exit code 1 if anything differs."""
    from lmworks import api
    from lmworks.base.hub import find_folder

    if against is None:
        given = {
            "--head": head, "--texts": texts, "--save-fixture": save_fixture, "--revision": revision,
            "--tolerance": tolerance,
        }  # fmt: skip
        if any(value is not None for value in given.values()):
            found = ", ".join(name for name, value in given.items() if value is not None)
            raise InputError("this option compares with another implementation", found=found, fix="add --against")
        report = api.verify(
            [model, *more], runtimes=split(runtimes), dtypes=None if dtype is None else split(dtype),
            weights=None if weights is None else find_folder(weights),
        )  # fmt: skip
    else:
        if more or dtype is not None or weights is not None:
            raise InputError(
                "--against compares one checkpoint in fp32", found=" ".join((model, *more)),
                fix="leave --dtype, --weights and other folders out",
            )  # fmt: skip
        from lmworks.cli.inputs import read_lines
        from lmworks.export.parity import verify_against

        lines = None if texts is None else read_lines(texts, None)
        report = verify_against(
            find_folder(model, revision=revision), against, head=head, texts=lines, save_fixture=save_fixture,
            tolerance=1e-5 if tolerance is None else tolerance,
        )  # fmt: skip
    show(report, json=json)
    return 0 if report.values["passed"] else 1


def split(words: str) -> list[str]:
    """Return the words between commas: "fp32, int8" -> ["fp32", "int8"]."""
    return [word.strip() for word in words.split(",") if word.strip()]
