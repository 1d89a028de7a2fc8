"""`lmworks classify`, `ner`, `qa`, `fill-mask` and `embed`: a checkpoint's answers, for people or as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.cli.inputs import Column, File, mend, read_lines, read_stdin, read_texts, read_whole
from lmworks.cli.output import Code, Json, Model, Revision, Runtime, Trace, print_json

Dtype = Annotated[
    Literal["auto", "any", "fp32", "bf16", "fp16", "int8", "uint8", "q4", "q4f16", "bnb4"],
    Parameter(help="fp32 or bf16 (faster, less exact) in torch, or that of an exported graph; any: the fastest."),
]
Long = Annotated[
    Literal["error", "truncate", "window"],
    Parameter(help="A text that is longer than the model: refuse it, cut it, or read it in windows."),
]
Pairs = Annotated[Path | None, Parameter(help="Second texts, one for each text: a file as for --file.")]


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
    runtime: Runtime = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    revision: Revision = None,
    code: Code = (),
    json: Json = False,
) -> int:
    """Label texts (or images): every label with its score, the likeliest first."""
    from lmworks.base.hub import find_folder
    from lmworks.models.families import read_config

    folder = find_folder(model, revision=revision)
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
    if read_config(folder).vision:
        task = "image-classification"
    else:
        task, options["long"] = "text-classification", long
    engine = {"code": code, "runtime": runtime, "trace": trace}
    answers = run(folder, task, examples, dtype, {**options, **engine})
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
    runtime: Runtime = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    revision: Revision = None,
    code: Code = (),
    json: Json = False,
) -> int:
    """Find the names in texts: label, score, word, and the characters from start to end."""
    found, single = read_texts(texts, file, column)
    options = {"aggregation": aggregation, "words": words, "long": long}
    engine = {"code": code, "runtime": runtime, "trace": trace}
    answers = run(model, "token-classification", found, dtype, {**options, **engine}, revision)
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
    runtime: Runtime = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    revision: Revision = None,
    code: Code = (),
    json: Json = False,
) -> int:
    """Answer questions from a context of any length: the text, its score, and the characters from start to end."""
    if context is None:
        context = read_stdin() if file is None else read_whole(file)
    options = {"top_k": top_k, "no_answer": no_answer}
    examples = [(mend(one), mend(context)) for one in question]
    engine = {"code": code, "runtime": runtime, "trace": trace}
    answers = run(model, "question-answering", examples, dtype, {**options, **engine}, revision)
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
    runtime: Runtime = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    revision: Revision = None,
    code: Code = (),
    json: Json = False,
) -> int:
    """Fill the masks in texts: the likeliest tokens, their scores, and the text with each."""
    found, single = read_texts(texts, file, column)
    options = {"top_k": top_k, "targets": targets, "long": long}
    engine = {"code": code, "runtime": runtime, "trace": trace}
    answers = run(model, "fill-mask", found, dtype, {**options, **engine}, revision)
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
    runtime: Runtime = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    revision: Revision = None,
    code: Code = (),
    json: Json = False,
) -> int:
    """Turn texts into vectors, one a text; or find the texts of a file that are nearest in meaning."""
    from lmworks.base.hub import find_folder

    folder = find_folder(model, revision=revision)
    found, _ = read_texts(texts, file, column)
    options = {"pooling": pooling, "long": long}
    if search is not None:
        from lmworks import api
        from lmworks.runtime.trace import tracing

        with tracing(trace):
            answers = api.search(
                folder,
                found,
                read_lines(search, column),
                top_k=top_k,
                runtime=runtime,
                dtype=dtype,
                code=code,
                **options,
            )
        if json:
            print_json(to_json(answers))
        else:
            for query, matches in zip(found, answers, strict=True):
                for match in matches:
                    line(f"{match.score:.4f}", match.text, *([query] if len(found) > 1 else []))
        return 0
    engine = {"code": code, "runtime": runtime, "trace": trace}
    vectors = run(folder, "feature-extraction", found, dtype, {**options, **engine})
    rounded = [[float(f"{x:.8g}") for x in vector.tolist()] for vector in vectors]
    if json:
        print_json(rounded)
    else:
        for vector in rounded:
            sys.stdout.write(" ".join(map(str, vector)) + "\n")
    return 0


def run(
    model: str | Path, task: str, examples: list[Any], dtype: str, options: dict[str, Any], revision: str | None = None
) -> Any:
    """Answer examples with a model."""
    from lmworks import api
    from lmworks.runtime.trace import tracing

    with tracing(options.pop("trace")):
        return api.predict(model, examples, task=task, dtype=dtype, revision=revision, **options)


def to_json(answers: Any) -> Any:
    """Return lists of results as lists of dicts."""
    return [to_json(answer) for answer in answers] if isinstance(answers, list) else asdict(answers)


def line(*cells: str) -> None:
    """Print one result: cells between tabs, on one line."""
    sys.stdout.write("\t".join(" ".join(cell.split()) for cell in cells) + "\n")
