"""`lmworks ngram`: train, eval, sample, table and score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Out, Overwrite, show

Texts = Annotated[Path, Parameter(help="A file or folder of text; each line is a sentence.")]
Column = Annotated[str | None, Parameter(help="The column of csv, tsv or jsonl that holds the text.")]
Folder = Annotated[Path, Parameter(help="A folder that train wrote, or an ARPA file.")]


def train(
    texts: Texts,
    /,
    *,
    out: Out,
    order: Annotated[int, Parameter(help="Tokens of the longest n-gram.")] = 3,
    smoothing: Annotated[
        str, Parameter(help="mle, laplace, good-turing, kneser-ney or modified-kneser-ney.")
    ] = "modified-kneser-ney",
    kind: Annotated[
        str, Parameter(help="What a token is: a word between blanks, or bpe, char … of a tokenizer.")
    ] = "word",
    vocab_size: Annotated[int | None, Parameter(help="Tokens kept; none: every word, 4096 of a tokenizer.")] = None,
    discount: Annotated[
        float | None,
        Parameter(help="Of kneser-ney, for every count, single tokens left as they are; none: estimated."),
    ] = None,
    min_count: Annotated[int, Parameter(help="Leave out n-grams of two tokens or more that occur less often.")] = 1,
    prune: Annotated[
        float, Parameter(help="Leave out n-grams that change perplexity by less than this, as 1e-7.")
    ] = 0.0,
    column: Column = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Count and smooth a text; writes model.arpa among its files."""
    from lmworks.verbs import ngrams

    report = ngrams.train(
        texts, out, order=order, smoothing=smoothing, kind=kind, vocab_size=vocab_size, discount=discount,
        min_count=min_count, prune=prune, column=column, overwrite=overwrite,
    )  # fmt: skip
    return show(report, json=json)


def evaluate(model: Folder, texts: Texts, /, *, column: Column = None, json: Json = False) -> int:
    """Perplexity, bits per byte and unknown words; every line's end is counted, blank lines are skipped."""
    from lmworks.verbs import ngrams

    return show(ngrams.evaluate(model, texts, column=column), json=json)


def sample(
    model: Folder,
    /,
    *,
    prompt: Annotated[str, Parameter(help="How each text begins.")] = "",
    count: Annotated[int, Parameter(help="How many texts.")] = 5,
    max_tokens: Annotated[int, Parameter(help="Tokens of a text at most.")] = 50,
    seed: Annotated[int, Parameter(help="Decides what is drawn.")] = 0,
    json: Json = False,
) -> int:
    """Draw texts from the model."""
    from lmworks.verbs import ngrams

    return show(ngrams.sample(model, prompt=prompt, count=count, max_tokens=max_tokens, seed=seed), json=json)


def table(
    model: Folder,
    context: Annotated[str, Parameter(help='What comes before: "fox", "<s> the"; none: nothing.')] = "",
    /,
    *,
    top: Annotated[int, Parameter(help="Rows at most.")] = 20,
    json: Json = False,
) -> int:
    """Conditional probabilities: P(jumps | fox) = 1.0000."""
    from lmworks.verbs import ngrams

    return show(ngrams.table(model, context, top=top), json=json)


def score(model: Folder, text: Annotated[str, Parameter(help="One sentence.")], /, *, json: Json = False) -> int:
    """The log-probability of a sentence, token by token."""
    from lmworks.verbs import ngrams

    return show(ngrams.score(model, text), json=json)
