"""`lmworks generate` and `lmworks evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.base.errors import InputError
from lmworks.base.report import counted
from lmworks.cli.columns import Header, LabelColumn
from lmworks.cli.engine import Engine
from lmworks.cli.inputs import mend, read_stdin, read_whole
from lmworks.cli.output import Json, Model, print_json, show
from lmworks.evaluation.prompting import Prompting
from lmworks.tasks.base import Long

Prompt = Annotated[Prompting, Parameter(name="*")]


def generate(
    model: Model,
    prompt: Annotated[str | None, Parameter(help="The text to continue; none: --file, or standard input.")] = None,
    /,
    *,
    file: Annotated[Path | None, Parameter(help="Read the text to continue from a file.")] = None,
    max_tokens: Annotated[int, Parameter(help="Stop after so many tokens.")] = 100,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, Parameter(help="Choose among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, Parameter(help="Choose among the likeliest with this total probability.")] = 1.0,
    repeat_penalty: Annotated[float, Parameter(help="Above 1 makes recent tokens less likely.")] = 1.0,
    repeat_last_n: Annotated[int, Parameter(help="How many recent tokens the penalty looks at.")] = 64,
    seed: Annotated[int | None, Parameter(help="Makes sampling repeatable.")] = None,
    json: Json = False,
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Continue a prompt; the text appears as it is made."""
    from lmworks import api

    if prompt is not None and file is not None:
        raise InputError("the prompt was given twice", found="an argument and --file", fix="leave one of them out")
    if prompt is None:
        prompt = (read_stdin() if file is None else read_whole(file)).rstrip("\n")
    prompt = mend(prompt)
    with engine.tracing():
        pieces = api.generate(
            model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            **engine.settings,
        )
        if not json:
            sys.stdout.write(prompt)
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
        else:
            for _ in pieces:
                pass
    done = pieces.result
    if json:
        print_json(
            {
                "text": done.text,
                "tokens": done.tokens,
                "tokens_per_second": done.tokens_per_second,
                "finish_reason": done.finish_reason,
            }
        )
    elif done.tokens_per_second:
        sys.stderr.write(
            f"{counted(len(done.tokens), 'token')}, {done.tokens_per_second:.0f} tokens/s after the first\n"
        )
    return 0


def evaluate(
    model: Model,
    texts: Annotated[Path, Parameter(help="A file or folder of text, or labelled data for a model with labels.")],
    /,
    *,
    column: Annotated[
        str | None,
        Parameter(name=["--text-column", "--column"], help="The column of a table that holds the text."),
    ] = None,
    label_column: LabelColumn = None,
    header: Header = True,
    split: Annotated[str | None, Parameter(help="The part of a nested file to score on.")] = None,
    long: Annotated[
        Long | None,
        Parameter(
            help="A labelled text that is longer than the model: refuse it, cut it, or read it in windows; "
            "none: as the model was fine-tuned."
        ),
    ] = None,
    write: Annotated[
        int | None,
        Parameter(help="Of prompts with completions: answer each in at most so many tokens; BLEU, chrF, exact match."),
    ] = None,
    json: Json = False,
    prompt: Prompt = Prompting(),  # noqa: B008 (frozen)
    engine: Engine = Engine(),  # noqa: B008 (frozen)
) -> int:
    """Score a language model on a text, or any other model, or an adapter, on labelled data."""
    from lmworks import api

    with engine.tracing():
        report = api.evaluate(
            model,
            texts,
            column=column,
            label_column=label_column,
            header=header,
            split=split,
            long=long,
            write=write,
            prompt=prompt,
            **engine.settings,
        )
    return show(report, json=json)
