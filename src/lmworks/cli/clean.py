"""`lmworks clean`, `split`, `stats` and `augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lmworks.cli.output import Json, Out, show

Paths = Annotated[
    list[Path], Parameter(help="Files and folders; - is standard input.", negative="", allow_leading_hyphen=True)
]
OutFile = Annotated[
    Path, Parameter(name=["--out", "-o"], help="The file to write: .jsonl or .txt, packed with .zst or .gz after it.")
]
Column = Annotated[str | None, Parameter(help="The column of csv, tsv, jsonl or parquet that holds the text.")]
UnitOption = Annotated[Literal["file", "paragraph", "line"], Parameter(help="What is a document in plain text.")]
Encoding = Annotated[str | None, Parameter(help="The encoding of all files; by default it is told by their bytes.")]
Stdin = Annotated[Literal["txt", "md", "html", "csv", "tsv", "jsonl"], Parameter(help="What standard input holds.")]
Threshold = Annotated[float, Parameter(help="How alike near duplicates are, by Jaccard's measure.")]
Workers = Annotated[int | None, Parameter(help="Processes that work at the same time; by default one a processor.")]
Page = Annotated[Path | None, Parameter(help="Write the report as a page of HTML, too.")]
Replace = Annotated[bool, Parameter(help="Replace what is there already.", negative="")]


def clean(
    paths: Paths,
    /,
    *,
    out: OutFile,
    steps: Annotated[
        str,
        Parameter(
            help="What to do, in this order: mojibake, controls, nfc, nfkc, blanks, markup, markdown, boilerplate, "
            "lower, punctuation, symbols, digits, mask-email, mask-url, mask-id, mask-phone."
        ),
    ] = "mojibake,controls,nfc,boilerplate,blanks",
    dedup: Annotated[Literal["exact", "near"] | None, Parameter(help="Keep only the first of equal documents.")] = None,
    threshold: Threshold = 0.8,
    language: Annotated[str, Parameter(help="Keep documents in these languages: en,eo.")] = "",
    among: Annotated[str, Parameter(help="The languages that there can be; all that are known by default.")] = "",
    min_chars: Annotated[int, Parameter(help="Leave shorter documents out.")] = 1,
    column: Column = None,
    unit: UnitOption = "file",
    encoding: Encoding = None,
    stdin: Stdin = "txt",
    workers: Workers = None,
    report: Page = None,
    overwrite: Replace = False,
    json: Json = False,
) -> int:
    """Clean a corpus of any size into one file, in flat memory; it is whole or absent."""
    from lmworks.base.threads import cpu_count
    from lmworks.verbs.cleaning import clean as run

    found = run(
        paths, out, steps=steps, dedup=dedup, threshold=threshold, language=language, among=among, min_chars=min_chars,
        column=column, unit=unit, encoding=encoding, stdin=stdin, workers=workers or cpu_count(), report=report,
        overwrite=overwrite,
    )  # fmt: skip
    return show(found, json=json)


def split(
    paths: Paths,
    /,
    *,
    out: Out,
    shares: Annotated[
        str, Parameter(help="Parts for train, validation and (if there is a third) test.")
    ] = "0.8,0.1,0.1",
    seed: Annotated[int, Parameter(help="Another seed shares out otherwise.")] = 0,
    stratify: Annotated[
        str | None, Parameter(help="A column whose values are shared out alike, such as label.")
    ] = None,
    threshold: Threshold = 0.8,
    column: Column = None,
    unit: UnitOption = "file",
    encoding: Encoding = None,
    workers: Workers = None,
    overwrite: Replace = False,
    json: Json = False,
) -> int:
    """Share documents out into train, validation and test files; near duplicates stay on one side."""
    from lmworks.base.threads import cpu_count
    from lmworks.verbs.cleaning_split import split as run

    found = run(
        paths, out, shares=shares, seed=seed, stratify=stratify, threshold=threshold, column=column, unit=unit,
        encoding=encoding, workers=workers or cpu_count(), overwrite=overwrite,
    )  # fmt: skip
    return show(found, json=json)


def stats(
    paths: Paths,
    /,
    *,
    sample: Annotated[
        Path | None, Parameter(help="A text to compare with the corpus: could it be a random part of it?")
    ] = None,
    languages: Annotated[bool, Parameter(help="Count the languages of documents.", negative="")] = False,
    column: Column = None,
    unit: UnitOption = "file",
    encoding: Encoding = None,
    stdin: Stdin = "txt",
    seed: Annotated[int, Parameter(help="Of the random samples that --sample is compared with.")] = 0,
    workers: Workers = None,
    report: Page = None,
    json: Json = False,
) -> int:
    """Measure a corpus of any size: words, Zipf's law, lengths, quality, diversity, representativeness."""
    from lmworks.base.threads import cpu_count
    from lmworks.verbs.cleaning_stats import stats as run

    found = run(
        paths, sample=sample, languages=languages, column=column, unit=unit, encoding=encoding, stdin=stdin, seed=seed,
        workers=workers or cpu_count(), report=report,
    )  # fmt: skip
    return show(found, json=json)


def augment(
    paths: Paths,
    /,
    *,
    out: OutFile,
    copies: Annotated[int, Parameter(help="Changed copies of each document.")] = 1,
    ways: Annotated[str, Parameter(help="What the copies take turns in.")] = "swap,drop,typo",
    share: Annotated[float, Parameter(help="The share of words that are changed.")] = 0.1,
    seed: Annotated[int, Parameter(help="Another seed changes other words.")] = 0,
    column: Column = None,
    workers: Workers = None,
    overwrite: Replace = False,
    json: Json = False,
) -> int:
    """Add changed copies of texts to train on: words swapped, left out or mistyped; columns such as labels stay."""
    from lmworks.base.threads import cpu_count
    from lmworks.verbs.cleaning_augment import augment_corpus

    found = augment_corpus(
        paths, out, copies=copies, ways=ways, share=share, seed=seed, column=column, workers=workers or cpu_count(),
        overwrite=overwrite,
    )  # fmt: skip
    return show(found, json=json)
