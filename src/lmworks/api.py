"""The verbs, as Python functions. Their signatures are the command line's.

lmworks.build("texts/", "my_model")            text -> a verified model in a web page
lmworks.train("texts/", "my_model")            text -> a tokenizer and a trained model
lmworks.generate("my_model", "Once upon")      an iterator over pieces of text
lmworks.evaluate("my_model", "held_out.txt")   perplexity and bits per byte
lmworks.verify("my_model")                     the same answers in every runtime
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import write_json, write_text
from lmworks.base.report import Report
from lmworks.settings import Settings

if TYPE_CHECKING:
    from lmworks.base.types import Generation

RUNTIMES = ("torch", "onnx", "node", "browser")
PathLike = str | Path


def build(
    texts: PathLike | None,
    out: PathLike,
    *,
    settings: Settings | None = None,
    column: str | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make a verified model with a web page out of a file or folder of text (None: the built-in language).

    `out` is complete when this returns and absent when it fails. Raises InputError for anything that cannot be used, and
    CheckFailed when a runtime gives other answers than torch.
    """
    check_runtimes(runtimes)
    return run(texts, out, settings, column, resume, overwrite, dry_run, runtimes=runtimes)


def train(
    texts: PathLike | None,
    out: PathLike,
    *,
    settings: Settings | None = None,
    column: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Train a tokenizer and a model on a file or folder of text; `out` is a folder in the Hugging Face layout."""
    return run(texts, out, settings, column, resume, overwrite, dry_run, runtimes=None)


def run(
    texts: PathLike | None,
    out: PathLike,
    settings: Settings | None,
    column: str | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    *,
    runtimes: Sequence[str] | None,
) -> Report:
    """Train, and, when `runtimes` are given, export and verify as well."""
    from lmworks.corpus import read_corpus
    from lmworks.estimate import estimate
    from lmworks.publish import publish
    from lmworks.run import check_same_run, disk_needed, run_folder, train_in
    from lmworks.summary import build_report, train_report

    from lmworks.base.files import check_output

    settings = settings or Settings()
    out = Path(out)
    check_output(out, overwrite=overwrite or resume)
    corpus = read_corpus(
        None if texts is None else Path(texts), column=column, validation=settings.validation, seed=settings.seed
    )
    settings = settings.resolve(corpus.train_bytes)
    if dry_run:
        return estimate(corpus, settings)
    check_output(out, overwrite=overwrite or resume, need_bytes=disk_needed(settings))
    with run_folder(out, resume=resume, overwrite=overwrite) as folder:
        check_same_run(folder, settings, corpus)
        trained = train_in(folder, settings, corpus)
        if runtimes is None:
            report = train_report(trained, out)
        else:
            certificate = publish(folder, trained, runtimes=runtimes)
            report = build_report(trained, certificate, out)
        finish(folder, trained, report)
    return report


def finish(folder: Path, trained: Any, report: Report) -> None:
    """Write the reports and, last of all, the receipt."""
    from lmworks.export.receipt import write_receipt
    from lmworks.summary import facts

    write_json(folder / "report.json", report.to_dict())
    write_text(folder / "report.html", report.to_html())
    write_receipt(folder, facts(trained))
