"""Measure a corpus: sizes, words, Zipf's law, lengths, quality, diversity, and whether a sample represents it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.errors import InputError
from lmworks.base.files import write_text
from lmworks.base.pool import map_batches, show_progress
from lmworks.base.report import Report, Table
from lmworks.text.frequencies import Fit, Zipf, compare, fit_zipf
from lmworks.text.open import is_once
from lmworks.text.statistics import RULES, Measures, measure, to_words
from lmworks.text.stream import Record, Unit, cut, list_files, make_batches, stream_documents, total_bytes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
POINTS = 80  # of the chart
MOST_COMMON = 20


def stats(
    paths: Sequence[str | Path],
    *,
    sample: str | Path | None = None,
    languages: bool = False,
    column: str | None = None,
    unit: Unit = "file",
    encoding: str | None = None,
    stdin: str = "txt",
    seed: int = 0,
    workers: int = 1,
    report: str | Path | None = None,
) -> Report:
    """Measure files, folders and standard input ("-") in flat memory; `report` is an HTML page to write.

    `sample` is a text that is compared with the corpus: could it be a random part of it? `languages` says in which
    language each document is. Raises InputError where there is no text.
    """
    files = list_files([Path(path) for path in paths])
    read = partial(stream_documents, column=column, encoding=encoding, stdin_ending=f".{stdin.lstrip('.')}")
    if sample is not None and any(is_once(path) for path, _ in files):
        raise InputError("standard input and pipes can be read only once", fix="write a file, which is read twice")
    with show_progress("measuring", total_bytes(files)) as tell:
        found = add_up(read(files, tell=tell), unit, languages, workers)
    if not found.sizes["words"]:
        raise InputError("there is no text here", where=", ".join(name for _, name in files)[:200])
    fit = None
    if sample is not None:
        part = add_up(read(list_files([Path(sample)])), unit, False, 1)
        if not part.sizes["words"]:
            raise InputError("there is no text here", where=str(sample))
        with show_progress("comparing", total_bytes(files)) as tell:
            texts = (to_words(one.text) for one in cut_all(read(files, tell=tell), unit))
            fit = compare(part.words, found.words, texts, seed=seed)
    page = make_report(found, fit_zipf(found.words.values()), fit, [name for _, name in files])
    if report is not None:
        write_text(report, page.to_html())
    return page


def add_up(documents: Iterator[Record], unit: Unit, languages: bool, workers: int) -> Measures:
    """Measure all documents."""
    total = Measures()
    batches = map_batches(partial(measure_batch, unit, languages), make_batches(documents), workers=workers)
    with closing(batches):
        for found in batches:
            total.add(found)
    return total


def cut_all(documents: Iterator[Record], unit: Unit) -> Iterator[Record]:
    """Yield all documents of all files."""
    for document in documents:
        yield from cut(document, unit)


def measure_batch(unit: Unit, languages: bool, batch: Sequence[Record]) -> Measures:
    """Measure some documents."""
    return measure(list(cut_all(iter(batch), unit)), languages=languages)


def make_report(found: Measures, zipf: Zipf | None, fit: Fit | None, names: Sequence[str]) -> Report:
    """Say what was found, for programs and for people."""
    sizes, words = found.sizes, found.words
    distinct = {n: one.share for n, one in found.ngrams.items()}
    types = found.ngrams[1].count if found.forgot else len(words)
    once = sum(1 for count in words.values() if count == 1)
    values: dict[str, Any] = {
        **{name: sizes[name] for name in ("documents", "characters", "bytes", "words", "lines")},
        "types": types,
        "type_token_ratio": types / sizes["words"],
        "type_token_ratio_1000": found.segment_types / 1000 / sizes["segments"] if sizes["segments"] else None,
        "seen_once": None if found.forgot else once / types,
        "mean_word": sum(len(word) * count for word, count in words.items()) / words.total(),
        "zipf": None if zipf is None else {"exponent": zipf.exponent, "r_squared": zipf.r_squared},
        "document_words": quantiles(found.lengths),
        "distinct": {f"{n}": share for n, share in distinct.items()},
        "duplicate_lines": None if found.lines.share is None else 1 - found.lines.share,
        "quality": {name: found.failed[name] for name in RULES},
        "languages": dict(found.languages.most_common()),
        "encodings": dict(found.encodings.most_common()),
        "common": dict(words.most_common(MOST_COMMON)),
        "sample": None if fit is None else to_values(fit),
    }
    tables = [
        Table("Size", ("", "number"), tuple((name, values[name]) for name in
              ("documents", "characters", "bytes", "words", "types", "lines"))),
        Table("Words of a document", ("", "words"), tuple(values["document_words"].items())),
        Table("Diversity", ("", "value"), (
            ("types / words", values["type_token_ratio"]),
            ("types / words, in segments of 1,000 words", values["type_token_ratio_1000"]),
            ("share of types seen once", values["seen_once"]),
            *((f"distinct-{n}: different / all", share) for n, share in distinct.items()),
            ("share of lines that repeat an earlier one", values["duplicate_lines"]),
            ("Zipf's exponent, by maximum likelihood", None if zipf is None else zipf.exponent),
            ("R² of Zipf's law in logarithms", None if zipf is None else zipf.r_squared),
        )),
        Table("Quality: documents that break a rule (Rae et al. 2021)", ("rule", "documents", "share"),
              tuple((name, found.failed[name], found.failed[name] / sizes["documents"]) for name in RULES)),
        Table("Most frequent words", ("word", "times", "share"),
              tuple((word, n, n / words.total()) for word, n in words.most_common(MOST_COMMON))),
    ]  # fmt: skip
    for title, counts in (("Languages", found.languages), ("Encodings", found.encodings)):
        if counts:
            tables.append(Table(title, (title[:-1].lower(), "documents"), tuple(counts.most_common())))
    notes = ["Words seen once were forgotten on the way, to save memory; types are estimated."] if found.forgot else []
    if fit is not None:
        tables += fit_tables(fit)
        verdict = "could be" if fit.is_representative else "is not"
        notes.append(
            f"The sample {verdict} a random part of the corpus by its words: its distance is {fit.jsd:.4f} bits, of "
            f"random samples of its size {fit.jsd_band[0]:.4f} to {fit.jsd_band[1]:.4f} (p = {fit.jsd_p:.3f})."
        )
    title = f"Statistics of {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
    return Report(title, values, tuple(tables), charts(found, zipf), notes=tuple(notes))


def to_values(fit: Fit) -> dict[str, Any]:
    """Return the comparison for programs."""
    return {
        "words": fit.words,
        "representative": fit.is_representative,
        "jsd": {"value": fit.jsd, "band": list(fit.jsd_band), "p": fit.jsd_p},
        "chi2": {"value": fit.chi2, "band": list(fit.chi2_band), "p": fit.chi2_p},
        "unlike": [{"word": word, "sample": a, "corpus": b} for word, a, b in fit.unlike],
    }


def fit_tables(fit: Fit) -> list[Table]:
    """Return the comparison for people."""
    rows = (
        ("Jensen-Shannon divergence, bits", fit.jsd, *fit.jsd_band, fit.jsd_p),
        ("χ² a degree of freedom", fit.chi2, *fit.chi2_band, fit.chi2_p),
    )
    return [
        Table("The sample against random samples", ("distance", "sample", "2.5 %", "97.5 %", "p"), rows),
        Table("Words that differ most, times in a million", ("word", "sample", "corpus"), fit.unlike),
    ]


def quantiles(lengths: Counter[int]) -> dict[str, float]:
    """Return the mean and some quantiles of counted lengths."""
    total = lengths.total()
    ordered = sorted(lengths.items())
    below = list(accumulate(count for _, count in ordered))
    found = {"mean": sum(length * count for length, count in ordered) / total}
    for share in QUANTILES:
        at = next(i for i, count in enumerate(below) if count >= share * total)
        found["median" if share == 0.5 else f"{share:.0%}"] = float(ordered[at][0])
    return found | {"longest": float(ordered[-1][0])}


def charts(found: Measures, zipf: Zipf | None) -> tuple[Chart, ...]:
    """Return the words by rank with Zipf's law, and how long documents are."""
    counts = sorted(found.words.values(), reverse=True)
    ranks = sorted({round(len(counts) ** (i / (POINTS - 1))) for i in range(POINTS)})
    lines = [("words", tuple((math.log10(r), math.log10(counts[r - 1])) for r in ranks))]
    if zipf is not None:
        scale = sum(counts) / sum(r**-zipf.exponent for r in range(1, len(counts) + 1))
        law = tuple((math.log10(r), math.log10(scale * r**-zipf.exponent)) for r in ranks)
        lines.append((f"Zipf, s = {zipf.exponent:.2f}", law))
    ordered = sorted(found.lengths.items())
    total = found.lengths.total()
    longer = list(accumulate(count for _, count in ordered))
    step = max(1, len(ordered) // (4 * POINTS))
    points = [(math.log10(max(1, n)), 100 * below / total) for (n, _), below in zip(ordered, longer, strict=True)]
    shown = (*points[:-1:step], points[-1])
    return (
        Chart("How often words occur, by rank (logarithms to base 10)", "log rank", "log times", tuple(lines)),
        Chart("How long documents are (logarithm to base 10)", "log words", "% at most", (("documents", shown),)),
    )
