"""`lmworks predict`, `classify`, `ner`, `qa`, `fill-mask` and `embed`: its answers, for people or JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lmworks.base.errors import InputError, printable
from lmworks.cli.engine import Engine
from lmworks.cli.inputs import Column, File, mend, read_lines, read_stdin, read_texts, read_whole
from lmworks.cli.output import Json, Model, print_json

Long = Annotated[
    Literal["error", "truncate", "window"],
    Parameter(help="A text that is longer than the model: refuse it, cut it, or read it in windows."),
]
Pairs = Annotated[Path | None, Parameter(help="Second texts, one for each text: a file as for --file.")]


def predict(
    model: Model,
    /,
    *texts: Annotated[
        str, Parameter(help="Texts; for a model that answers questions: a question and its context. None: as below.")
    ],
    file: File = None,
    column: Column = None,
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Answer by whatever the model was made for, as the verb of its task does; texts go on greedily."""
    from lmworks.base.hub import find_folder
    from lmworks.cli.predict import generate
    from lmworks.models.families import read_config, read_kind
    from lmworks.tasks.registry import find_task

    task = find_task(read_kind(read_config(find_folder(model, revision=engine.revision))))
    same: dict[str, Any] = {"file": file, "json": json, "engine": engine}
    if task in ("question-answering", "text-generation"):
        verb, fewest = ("qa", 1) if task == "question-answering" else ("generate", 0)
        if column is not None or not fewest <= len(texts) <= fewest + 1:
            found = "--column" if column is not None else f"{len(texts)} texts"
            raise InputError(f"this model answers as lmworks {verb} does", found=found, fix=f"lmworks {verb} --help")
        if verb == "generate":
            return generate(model, *texts, max_tokens=128, temperature=0.0, **same)  # as the server
        return qa(model, question=[texts[0]], context=texts[1] if len(texts) == 2 else None, **same)
    verbs: dict[str, Callable[..., int]] = {
        "token-classification": ner,
        "fill-mask": fill_mask,
        "feature-extraction": embed,
    }
    return verbs.get(task, classify)(model, *texts, column=column, **same)


def classify(
    model: Model,
    /,
    *texts: Annotated[str, Parameter(help="Texts, or images for an image model; none: --file, or standard input.")],
    pairs: Pairs = None,
    file: File = None,
    column: Column = None,
    top_k: Annotated[int | None, Parameter(help="How many labels to show; all by default.")] = None,
    scores: Annotated[
        Literal["auto", "softmax", "sigmoid", "none"], Parameter(help="How numbers become scores.")
    ] = "auto",
    long: Long = "error",
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Label texts (or images): every label with its score, the likeliest first."""
    from lmworks.base.hub import find_folder
    from lmworks.models.families import read_config

    vision = read_config(find_folder(model, revision=engine.revision)).vision
    if pairs is not None and file is not None:
        found = read_lines(file, column, blank=True)  # lines belong together by their numbers
    else:
        found, _ = read_texts(texts, file, column)
    examples: list[Any] = list(found)
    if pairs is not None:
        seconds = read_lines(pairs, column, blank=True)
        if len(seconds) != len(found):
            raise InputError(
                "--pairs does not fit the texts", found=f"{len(seconds)} second texts", expected=f"{len(found)}"
            )
        examples = list(zip(found, seconds, strict=True))
    options: dict[str, Any] = {"top_k": top_k, "scores": scores}
    if vision:
        task = "image-classification"
    else:
        task, options["long"] = "text-classification", long
    answers = engine.predict(model, task, examples, **options)
    if json:
        print_json([[asdict(label) for label in labels] for labels in answers])
    else:
        for text, labels in zip(found, answers, strict=True):
            for label in labels:
                line(f"{label.score:.4f}", label.label, *([text] if len(found) > 1 else []))
    return 0


def ner(
    model: Model,
    /,
    *texts: Annotated[str, Parameter(help="Texts; none: --file, or standard input, one text a line.")],
    file: File = None,
    column: Column = None,
    aggregation: Annotated[
        Literal["none", "simple", "first", "average", "max"],
        Parameter(help="How tokens become entities; `first`, `average` and `max` never split a word."),
    ] = "first",
    words: Annotated[
        Literal["auto", "tokenizer", "spaces"],
        Parameter(help="What a word is: the tokenizer's, or all between spaces; auto: as transformers' pipeline."),
    ] = "auto",
    long: Long = "error",
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Find the names in texts: label, score, word, and the characters from start to end."""
    found, single = read_texts(texts, file, column)
    options = {"aggregation": aggregation, "words": words, "long": long}
    answers = engine.predict(model, "token-classification", found, **options)
    if json:
        shown = [[asdict(entity) for entity in entities] for entities in answers]
        print_json(shown[0] if single else shown)
    else:
        for i, entities in enumerate(answers):
            for entity in entities:
                place = f"{entity.start}-{entity.end}"
                line(f"{entity.score:.4f}", entity.label, entity.word, place, *([str(i + 1)] if len(found) > 1 else []))
    return 0


def qa(
    model: Model,
    /,
    *,
    question: Annotated[list[str], Parameter(help="A question; may be repeated.", negative="")],
    context: Annotated[
        str | None, Parameter(help="The text that holds the answer; none: --file, or standard input.")
    ] = None,
    file: Annotated[Path | None, Parameter(help="Read the context from a file.")] = None,
    top_k: Annotated[int, Parameter(help="How many answers to show.")] = 1,
    no_answer: Annotated[bool, Parameter(help="The answer may be that there is none.", negative="")] = False,
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Answer questions from a context of any length: the text, its score, and the characters from start to end."""
    if context is None:
        context = read_stdin() if file is None else read_whole(file)
    options = {"top_k": top_k, "no_answer": no_answer}
    examples = [(mend(one), mend(context)) for one in question]
    answers = engine.predict(model, "question-answering", examples, **options)
    shown = [[asdict(one) for one in answer] if isinstance(answer, list) else asdict(answer) for answer in answers]
    if json:
        print_json(shown[0] if len(shown) == 1 else shown)
    else:
        for answer in shown:
            for one in answer if isinstance(answer, list) else [answer]:
                line(f"{one['score']:.4f}", one["text"], f"{one['start']}-{one['end']}")
    return 0


def fill_mask(
    model: Model,
    /,
    *texts: Annotated[str, Parameter(help="Texts with the model's mask token; none: --file, or standard input.")],
    file: File = None,
    column: Column = None,
    top_k: Annotated[int, Parameter(help="How many tokens to show for each mask.")] = 5,
    targets: Annotated[list[str] | None, Parameter(help="Choose among these words only.", negative="")] = None,
    long: Long = "error",
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Fill the masks in texts: the likeliest tokens, their scores, and the text with each."""
    found, single = read_texts(texts, file, column)
    options = {"top_k": top_k, "targets": targets, "long": long}
    answers = engine.predict(model, "fill-mask", found, **options)
    if json:
        shown = to_json(answers)
        print_json(shown[0] if single else shown)
    else:
        for answer in answers:
            for fills in answer if isinstance(answer[0], list) else [answer]:
                for fill in fills:
                    line(f"{fill.score:.4f}", fill.token_str.strip(), fill.sequence)
    return 0


def embed(
    model: Model,
    /,
    *texts: Annotated[str, Parameter(help="Texts, or what to search for; none: --file, or standard input.")],
    file: File = None,
    column: Column = None,
    search: Annotated[Path | None, Parameter(help="Show the nearest texts of this file: a line or a row each.")] = None,
    top_k: Annotated[int, Parameter(help="How many texts to show for each query.")] = 5,
    pooling: Annotated[
        Literal["auto", "mean", "cls", "max", "last"], Parameter(help="How tokens become one vector; auto: as trained.")
    ] = "auto",
    long: Long = "error",
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Turn texts into vectors, one a text; or find the texts of a file that are nearest in meaning."""
    found, _ = read_texts(texts, file, column)
    options = {"pooling": pooling, "long": long}
    if search is not None:
        from lmworks import api

        with engine.tracing():
            answers = api.search(model, found, read_lines(search, column), top_k=top_k, **engine.settings, **options)
        if json:
            print_json(to_json(answers))
        else:
            for query, matches in zip(found, answers, strict=True):
                for match in matches:
                    line(f"{match.score:.4f}", match.text, *([query] if len(found) > 1 else []))
        return 0
    vectors = engine.predict(model, "feature-extraction", found, **options)
    rounded = [[float(f"{x:.8g}") for x in vector.tolist()] for vector in vectors]
    if json:
        print_json(rounded)
    else:
        for vector in rounded:
            sys.stdout.write(" ".join(map(str, vector)) + "\n")
    return 0


def to_json(answers: Any) -> Any:
    """Return lists of results as lists of dicts."""
    return [to_json(answer) for answer in answers] if isinstance(answers, list) else asdict(answers)


def line(*cells: str) -> None:
    """Print one result: cells between tabs, on one line."""
    sys.stdout.write("\t".join(printable(" ".join(cell.split())) for cell in cells) + "\n")
