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
from lmworks.verbs.compress_knobs import Pruning, Quantizing


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a smaller model is judged by, and whether many are measured against a budget."""

    data: Annotated[
        Path | None, Parameter(help="Examples of the model's task, for calibration, fine-tuning and scores.")
    ] = None
    validation: Annotated[
        Path | None, Parameter(help="Examples to judge by; none: a tenth of --data, which nothing else sees.")
    ] = None
    budget: Annotated[
        str | None,
        Parameter(help='Measure every way and keep the best that has these: "accuracy>=-1%, speed>=2x, size<=0.3x".'),
    ] = None
    candidates: Annotated[
        str, Parameter(help="Beside a --budget the ways to measure, such as int8,int4,onnx-int8.")
    ] = ""
    also: Annotated[
        tuple[str, ...],
        Parameter(help="Beside a --budget another model's folder, such as a distilled one.", negative=""),
    ] = ()
    revision: Revision = None
    overwrite: Overwrite = False

    def settings(self, columns: Columns) -> dict[str, Any]:
        """Return all of these as the functions of `api` take them; raise InputError for those that do not fit."""
        every = {**vars(self), **vars(columns)}
        if self.budget is None:
            if self.candidates or self.also:
                fix = "add --budget, or leave them out"
                raise InputError("--candidates and --also are measured against a budget", fix=fix)
            left_out = {"budget", "candidates", "also"}
            return {name: value for name, value in every.items() if name not in left_out}
        if self.data is None:
            raise InputError("a budget is measured on examples", found="no --data", fix="give --data FILE")
        return every


def quantize(
    model: Model,
    /,
    *,
    out: Out,
    judged: Judged = Judged(),
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    json: Json = False,
    how: Annotated[Quantizing, Parameter(name="*")] = Quantizing(),  # noqa: B008 (frozen)
) -> int:
    """Round a model's matrices to whole numbers; `out` is whole or absent. A budget that nothing keeps exits with 1."""
    from lmworks import api

    if judged.budget is None:
        return show(api.quantize(model, out, how=how, **judged.settings(columns)), json=json)
    if how != Quantizing():
        raise InputError("a budget chooses the bits itself", fix="leave --budget out, or name --candidates")
    return finish(api.compress(model, out, **judged.settings(columns)), json=json)


def prune(
    model: Model,
    /,
    *,
    out: Out,
    judged: Judged = Judged(),
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    json: Json = False,
    how: Annotated[Pruning, Parameter(name="*")] = Pruning(),  # noqa: B008 (frozen)
) -> int:
    """Take weights, neurons or ranks away; `out` is whole or absent. A budget that nothing keeps exits with 1.

    With a budget --epochs, --lr, --batch-size and --seed say how candidates with fewer weights are fine-tuned.
    """
    from lmworks import api

    if judged.budget is None:
        return show(api.prune(model, out, how=how, **judged.settings(columns)), json=json)
    return finish(api.compress(model, out, how=how, **judged.settings(columns)), json=json)


def finish(report: Report, *, json: bool) -> int:
    """Print the report; 1 says that nothing keeps the budget."""
    show(report, json=json)
    return 0 if report.values["met"] else 1
