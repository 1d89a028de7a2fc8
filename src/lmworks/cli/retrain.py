"""`lmworks retrain` and `lmworks challenge`: from feedback to a challenger, and from a challenger to what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.columns import Columns
from lmworks.cli.finetune import Knobs
from lmworks.cli.output import Json, Out, Resume, show
from lmworks.training.tuning import Tuning
from lmworks.verbs.retraining_trigger import Rule

AT_REST = 3  # exit code where nothing was trained
Which = Annotated[str | None, Parameter(help="Which of the server's models, where there are several.")]


def retrain(
    source: Annotated[str, Parameter(help="A server, such as http://127.0.0.1:8000, or the file of its --drift-log.")],
    weights: Annotated[str, Parameter(help="The folder of the weights that are served now: the champion.")],
    train: Annotated[Path | None, Parameter(help="Labelled data that it learnt; none: feedback alone.")] = None,
    /,
    *,
    out: Out,
    feedback: Annotated[str, Parameter(help="The database of feedback: what is accepted is trained on.")],
    held_out: Annotated[Path, Parameter(help="Labelled texts of today that nobody learns: both models answer them.")],
    data: Annotated[
        Path | None, Parameter(help="A labelled sample for the server to answer: has its accuracy fallen?")
    ] = None,
    model: Which = None,
    rule: Annotated[Rule, Parameter(name="*")] = Rule(),  # noqa: B008 (frozen)
    force: Annotated[bool, Parameter(help="Train whatever the check says.", negative="")] = False,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    dtype: Annotated[str, Parameter(help="Of the challenger's graph: that which the server serves.")] = "fp32",
    api_key_file: Annotated[Path | None, Parameter(help="A file whose first line is the key to ask with.")] = None,
    resume: Resume = False,
    json: Json = False,
    tuning: Knobs = Tuning(),  # noqa: B008 (frozen)
) -> int:
    """Check, train, compare. Exit code 0: the challenger wins; 1: it does not; 3: nothing was trained."""
    from lmworks.serve.loadtest import read_key
    from lmworks.verbs.retraining import retrain as run

    report = run(
        source, weights, train, out, feedback=feedback, held_out=held_out, sample=data, model=model,
        key=read_key(api_key_file), rule=rule, force=force, resume=resume, dtype=dtype, tuning=tuning, **vars(columns),
    )  # fmt: skip
    show(report, json=json)
    return AT_REST if not report.values["fired"] else int(not report.values["won"])


def challenge(
    url: Annotated[str, Parameter(help="A server that was started with --challengers.")],
    folder: Annotated[str | None, Parameter(help="The name of a folder there, to be loaded and to shadow.")] = None,
    /,
    *,
    admin_key_file: Annotated[Path, Parameter(help="A file whose first line is the admin's key.")],
    share: Annotated[float, Parameter(help="Of the requests, how many the challenger is asked as well.")] = 0.1,
    switch: Annotated[bool, Parameter(help="Let the challenger answer.", negative="")] = False,
    back: Annotated[bool, Parameter(help="Let the version before answer again.", negative="")] = False,
    stop: Annotated[bool, Parameter(help="Let go of the version that does not answer.", negative="")] = False,
    model: Which = None,
    json: Json = False,
) -> int:
    """Tell how a served model and its challenger do, load a challenger, switch to it, go back, or stop."""
    from lmworks.serve.loadtest import read_key
    from lmworks.verbs.challenging import challenge as run

    wanted = [name for name, asked in (("switch", switch), ("back", back), ("stop", stop)) if asked]
    if len(wanted) > 1:
        raise InputError("one thing at a time", found=" ".join(f"--{name}" for name in wanted))
    action = wanted[0] if wanted else None
    return show(run(url, folder, action=action, share=share, model=model, key=read_key(admin_key_file)), json=json)
