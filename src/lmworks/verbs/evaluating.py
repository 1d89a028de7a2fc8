"""`lmworks evaluate` on texts: language models, and models that fill gaps; document after document, in flat memory.

Plain text of more than four million characters is scored in parts, each with an end of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError
from lmworks.base.report import Cell, Report, Table
from lmworks.evaluation.texts import TextScores, score_texts
from lmworks.text.clean import clean
from lmworks.text.stream import list_files, stream_documents

if TYPE_CHECKING:
    from lmworks.runtime.predictor import Predictor

SHOWN = ("perplexity", "perplexity_per_word", "bits_per_byte", "bits_per_token", "entropy", "next_token_accuracy")
GROUP = 256  # texts of which tokens are hidden at once
PSEUDO = 512  # tokens that are hidden one by one


def read_texts(path: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield the cleaned texts of a file or folder, one at a time; raise InputError where there is none."""
    found = False
    for document in stream_documents(list_files([Path(path)]), column=column):
        text = clean(document.text)
        if text.strip():
            found = True
            yield text
    if not found:
        raise InputError("there is no text here", where=str(path), found="nothing but blanks")


def evaluate_text(model: str | Path, predictor: Predictor, texts: str | Path, column: str | None = None) -> Report:
    """Score a language model: every token once, each with at least half of its context before it."""
    engine = predictor.runtime
    scores = score_texts(engine, predictor.tokenizer, read_texts(texts, column))
    unit, units = scores.units
    values: dict[str, Any] = {
        **scores.values(), "runtime": engine.name, "dtype": engine.dtype,
        "intervals": scores.intervals(), "interval_units": [len(units), unit],
    }  # fmt: skip
    return Report(f"{model} on {texts}", values, tables=(text_table(scores, values),), notes=notes(scores))


def text_table(scores: TextScores, values: dict[str, Any]) -> Table:
    """Return each measure with its interval, and what was measured."""
    rows: list[tuple[Cell, ...]] = [
        (name.replace("_", " "), values[name], *values["intervals"].get(name, (None, None))) for name in SHOWN
    ]
    rows += [(name, values[name], None, None) for name in ("tokens", "words", "bytes", "runtime", "dtype")]
    count, unit = values["interval_units"]
    return Table(f"Scores, 95 % from {count:,} {unit}", ("what", "value", "from", "to"), tuple(rows))


def notes(scores: TextScores) -> tuple[str, ...]:
    """Say what cannot be said."""
    if scores.is_whole:
        return ()
    return ("The tokenizer loses something of this text, so nothing is said per byte or word: it would look easy.",)


def evaluate_masked(model: str | Path, predictor: Predictor, texts: str | Path, column: str | None = None) -> Report:
    """Score a model that fills gaps: every seventh token hidden, and some tokens hidden one by one."""
    from lmworks.evaluation.masked import pseudo_perplexity, score_hidden, summarise

    group: list[str] = []
    found: list[Any] = []
    first: list[str] = []
    for text in read_texts(texts, column):
        group.append(text)
        first += [text] if len(first) < GROUP else []
        if len(group) == GROUP:
            found.append(score_hidden(predictor, group, start=sum(map(len, found))))
            group = []
    if group:
        found.append(score_hidden(predictor, group, start=sum(map(len, found))))
    values: dict[str, Any] = summarise(found)
    values |= pseudo_perplexity(predictor, first, most=PSEUDO)
    values |= {"runtime": predictor.runtime.name, "dtype": predictor.runtime.dtype}
    spans = values["intervals"]
    rows = [(name.replace("_", " "), value, *spans.get(name, (None, None)))
            for name, value in values.items() if name != "intervals"]  # fmt: skip
    table = Table("Hidden tokens, 95 % from windows", ("what", "value", "from", "to"), tuple(rows))
    note = (f"Accuracy and perplexity: every seventh token hidden at once; pseudo-perplexity: "
            f"{values['pseudo_tokens']} tokens, each hidden alone (Salazar et al. 2020).")  # fmt: skip
    return Report(f"{model} on {texts}", values, tables=(table,), notes=(note,))
