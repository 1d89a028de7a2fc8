"""`lmworks quantize` and `lmworks prune`, each with a `--budget` that measures every way and picks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.base.report import Report
from lmworks.cli.columns import Columns
from lmworks.cli.output import Json, Model, Out, Overwrite, Revision, show
from lmworks.compress_knobs import Pruning, Quantizing

Data = Annotated[Path | None, Parameter(help="Examples of the model's task, for calibration, fine-tuning and scores.")]
Validation = Annotated[
    Path | None, Parameter(help="Examples to judge by; none: a tenth of --data, which nothing else sees.")
]
Budget = Annotated[
    str | None,
    Parameter(help='Measure every way and keep the best that has these: "accuracy>=-1%, speed>=2x, size<=0.3x".'),
]
Candidates = Annotated[str, Parameter(help="Beside a --budget the ways to measure, such as int8,int4,onnx-int8.")]
Also = Annotated[
    tuple[str, ...], Parameter(help="Beside a --budget another model's folder, such as a distilled one.", negative="")
]


@dataclass(frozen=True, kw_only=True)
class Where(Columns):
    """The columns of --data."""

    split: Annotated[
        str | None, Parameter(help='The part of a nested file; "train,val" also names the one to judge by.')
    ] = None


def quantize(
    model: Model,
    /,
    *,
    out: Out,
    data: Data = None,
    validation: Validation = None,
    budget: Budget = None,
    candidates: Candidates = "",
    also: Also = (),
    columns: Where = Where(),
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
    how: Annotated[Quantizing, Parameter(name="*")] = Quantizing(),  # noqa: B008 (frozen)
) -> int:
    """Round a model's matrices to whole numbers; `out` is whole or absent. A budget that nothing keeps exits with 1."""
    from lmworks import api

    where: dict[str, Any] = {"validation": validation, "revision": revision, "overwrite": overwrite, **vars(columns)}
    if budget is not None:
        if how != Quantizing():
            raise InputError("a budget chooses the bits itself", fix="leave --budget out, or name --candidates")
        report = api.compress(model, out, budget=budget, data=need(data), candidates=candidates, also=also, **where)
        return finish(report, json=json)
    check_alone(candidates, also)
    return show(api.quantize(model, out, how=how, data=data, **where), json=json)


def prune(
    model: Model,
    /,
    *,
    out: Out,
    data: Data = None,
    validation: Validation = None,
    budget: Budget = None,
    candidates: Candidates = "",
    also: Also = (),
    columns: Where = Where(),
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
    how: Annotated[Pruning, Parameter(name="*")] = Pruning(),  # noqa: B008 (frozen)
) -> int:
    """Take weights, neurons or ranks away; `out` is whole or absent. A budget that nothing keeps exits with 1.

    With a budget --epochs, --lr, --batch-size and --seed say how candidates with fewer weights are fine-tuned.
    """
    from lmworks import api

    where: dict[str, Any] = {"validation": validation, "revision": revision, "overwrite": overwrite, **vars(columns)}
    if budget is not None:
        report = api.compress(model, out, budget=budget, data=need(data), candidates=candidates, also=also, how=how,
                              **where)  # fmt: skip
        return finish(report, json=json)
    check_alone(candidates, also)
    return show(api.prune(model, out, how=how, data=data, **where), json=json)


def need(data: Path | None) -> Path:
    """Return the data; raise InputError where a budget has nothing to measure on."""
    if data is None:
        raise InputError("a budget is measured on examples", found="no --data", fix="give --data FILE")
    return data


def check_alone(candidates: str, also: tuple[str, ...]) -> None:
    """Raise InputError for what means something only beside a budget."""
    if candidates or also:
        raise InputError("--candidates and --also are measured against a budget", fix="add --budget, or leave them out")


def finish(report: Report, *, json: bool) -> int:
    """Print the report; 1 says that nothing keeps the budget."""
    show(report, json=json)
    return 0 if report.values["met"] else 1
