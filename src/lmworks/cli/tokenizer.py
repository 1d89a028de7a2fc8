"""`lmworks tokenizer train`, `compare`, `extend` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.inputs import Column, mend
from lmworks.cli.output import DryRun, Json, Model, Out, Overwrite, Revision, show
from lmworks.tokens.train import Recipe

Source = Annotated[
    str, Parameter(help="A tokenizer's folder or file, a model folder, or the name of a model on the Hub.")
]
Sample = Annotated[
    float | None,
    Parameter(help="Train on a part: a share below 1, or a number of documents (rows, pages, lines of plain text)."),
]


def train(
    *files: Annotated[
        Path,
        Parameter(
            help="Files and folders of text, in any usual format; - is standard input.", allow_leading_hyphen=True
        ),
    ],
    out: Out,
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 (frozen)
    column: Column = None,
    sample: Sample = None,
    seed: Annotated[int, Parameter(help="Decides the documents of --sample.")] = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> int:
    """Train a tokenizer; `out` is whole or absent, and holds one tokenizer.json for every library."""
    from lmworks.verbs.tokenizing import train as run

    if not files:
        raise InputError("no texts to train on", fix="name a file or folder, or - for standard input")
    report = run(
        files, out, recipe=recipe, column=column, sample=sample, seed=seed, overwrite=overwrite, dry_run=dry_run
    )
    return show(report, json=json)


def compare(
    *tokenizers: Source,
    data: Annotated[
        tuple[Path, ...],
        Parameter(help="A file or folder of text; of several files each is a language.", negative=""),
    ],
    column: Column = None,
    train_models: Annotated[
        int | None, Parameter(help="Train a small model on each for so many steps, and score it on the last tenth.")
    ] = None,
    seed: Annotated[int, Parameter(help="Of the models' weights and batches.")] = 0,
    html: Annotated[Path | None, Parameter(help="Write the report as a page, too.")] = None,
    json: Json = False,
) -> int:
    """Compare tokenizers on the same texts."""
    from lmworks.base.files import write_text
    from lmworks.verbs.tokenizing_compare import compare as run

    report = run(tokenizers, data, column=column, steps=train_models, seed=seed)
    if html is not None:
        write_text(html, report.to_html())
    return show(report, json=json)


def extend(
    model: Model,
    texts: Annotated[
        str, Parameter(help="Tokens with commas, a file with one a line, or with --count a text to find them in.")
    ],
    /,
    *,
    out: Out,
    count: Annotated[
        int | None, Parameter(help="Find so many tokens in the text: the words that save the most tokens.")
    ] = None,
    column: Column = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Give a model, or a tokenizer alone, more tokens; exit code 1 if an old text does not stay as it was."""
    from lmworks.verbs.tokenizing_extend import extend as run

    report = run(model, mend(texts), out, count=count, column=column, revision=revision, overwrite=overwrite)
    show(report, json=json)
    return 0 if report.values["proved"] else 1


def inspect(
    tokenizer: Source,
    text: Annotated[str | None, Parameter(help="A text to cut.")] = None,
    /,
    *,
    json: Json = False,
) -> int:
    """Look into a tokenizer, and warn of the traps that it sets."""
    from lmworks.verbs.tokenizing import inspect as run

    return show(run(tokenizer, None if text is None else mend(text)), json=json)
