"""`lmworks tokenizer compare`: tokenizers side by side on the same texts, and small models trained on each.

Models see the first nine tenths of every file and are scored on the rest. Perplexity a token is lower for shorter
tokens, so it compares nothing; bits per byte do, and are null where the tokenizer loses something.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.base.report import Cell, Report, Table
from lmworks.text.read import Document
from lmworks.tokens.look import open_tokenizer
from lmworks.tokens.measure import compare_speed, find_words, measure
from lmworks.tokens.stream import Texts
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.verbs.corpus import LEAST_BYTES, Corpus, count_bytes
from lmworks.verbs.settings import Settings

TIMED = 2_000_000  # characters that the clock sees
HELD_OUT = 0.1  # of each file, its end
Values = dict[str, Any]


def compare(
    sources: Sequence[str | Path],
    data: Sequence[str | Path],
    *,
    column: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Report:
    """Measure tokenizers, or those of models, on files of text; each file is a language where there are several.

    `steps`: also train a small model on each, for so many steps. Raises InputError for what is no tokenizer or no text.
    """
    if not sources:
        raise InputError("no tokenizers to compare", fix="name their folders")
    tokenizers = {str(source): open_tokenizer(source)[0] for source in sources}
    texts = {
        file: ("" if is_plain(file) else "\n").join(Texts([file], column=column))
        for file in Texts(data, column=column).files
    }
    names = short_names(list(texts))
    lines = {names[file]: [line for line in text.split("\n") if line.strip()] for file, text in texts.items()}
    every = [line for part in lines.values() for line in part]
    words = {part: find_words(some) for part, some in lines.items()}
    all_words = sum(words.values(), Counter[str]())
    rows: Values = {
        name: {"vocab_size": tokenizer.vocab_size, "lossless": tokenizer.is_lossless}
        | measure(tokenizer, every, all_words).to_dict()
        for name, tokenizer in tokenizers.items()
    }
    timed = first_lines(every, TIMED)
    for name, speed in zip(rows, compare_speed(list(tokenizers.values()), timed), strict=True):
        rows[name]["speed_against_the_first"] = speed
    values: Values = {"data": [str(path) for path in data], "tokenizers": rows}
    if len(lines) > 1:
        values["languages"] = {
            part: {name: measure(tokenizer, some, words[part]).to_dict() for name, tokenizer in tokenizers.items()}
            for part, some in lines.items()
        }
    if steps is not None:
        parts = {names[file]: text for file, text in texts.items()}
        values |= {"steps": steps, "seed": seed, "models": train_models(tokenizers, parts, steps, seed)}
    return describe(values)


def is_plain(file: Path) -> bool:
    """Say whether a file is plain text, which was read in pieces that belong together."""
    from lmworks.text.open import plain_ending
    from lmworks.text.read import READERS, read_plain

    return READERS.get(plain_ending(file), read_plain) is read_plain


def short_names(files: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each file: what is before the first point, its name, or its path where two would be alike."""
    stems = [file.name.split(".")[0] for file in files]
    choices = (stems, [file.name for file in files], [str(file) for file in files])
    chosen = next((names for names in choices if len(set(names)) == len(files)), choices[-1])
    return dict(zip(files, chosen, strict=True))


def first_lines(lines: Sequence[str], characters: int) -> list[str]:
    """Return the first lines, of so many characters together."""
    kept: list[str] = []
    for line in lines:
        if characters <= 0:
            break
        kept.append(line)
        characters -= len(line)
    return kept


def train_models(tokenizers: Mapping[str, Tokenizer], parts: Mapping[str, str], steps: int, seed: int) -> Values:
    """Train the same small network on each tokenizer's tokens; return scores by tokenizer, and by language."""
    require("torch", extra="torch")
    from lmworks.evaluation.perplexity import bits_per_byte, token_logprobs
    from lmworks.runtime.torch_runtime import TorchRuntime
    from lmworks.tokens.batch import make_stream
    from lmworks.verbs.run import train_in

    corpus = make_corpus(parts)
    settings = replace(Settings(), steps=steps, seed=seed).resolve(corpus.train_bytes)
    found: Values = {}
    for name, tokenizer in tokenizers.items():
        with TemporaryDirectory(prefix="lmworks-") as place:
            tokenizer.save(place, max_length=settings.context)
            trained = train_in(Path(place), settings, corpus)
            scores = trained.scores
            found[name] = {
                "perplexity_per_token": scores.perplexity,
                "bits_per_byte": scores.bits_per_byte,
                "next_token_accuracy": scores.next_token_accuracy,
                "ngram_perplexity_per_token": scores.ngram_perplexity,
                "ngram_bits_per_byte": scores.ngram_bits_per_byte,
                "validation_tokens": scores.validation_tokens,
                "parameters": trained.parameters,
            }
            if len(parts) > 1:
                runtime = TorchRuntime(trained.model)
                found[name]["languages"] = {}
                for document in corpus.validation:
                    stream = make_stream(tokenizer, [document.text])
                    logs = token_logprobs(runtime, stream, context=settings.context or 0).logprobs
                    size = count_bytes([document]) if tokenizer.knows(document.text) else None
                    found[name]["languages"][document.name] = bits_per_byte(logs, size)
    return found


def make_corpus(parts: Mapping[str, str]) -> Corpus:
    """Cut the last tenth off each text, at a line end, for validation."""
    train, held_out = [], []
    for name, text in parts.items():
        at = 1 + text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) or int(len(text) * (1 - HELD_OUT))
        train.append(Document(name, text[:at]))
        held_out.append(Document(name, text[at:]))
    size = count_bytes([*train, *held_out])
    if size < LEAST_BYTES:
        raise InputError("too little text to train on", found=f"{size:,} bytes", expected=f"at least {LEAST_BYTES:,}")
    digest = hashlib.sha256("\0".join(parts.values()).encode("utf-8"))
    return Corpus("compared", train, held_out, digest.hexdigest())


COLUMNS = {  # of the first table: the key, and what it is called
    "vocab_size": "tokens",
    "tokens_per_word": "tokens a word",
    "bytes_per_token": "bytes a token",
    "oov_rate": "unknown words",
    "unknown_token_rate": "unknown tokens",
    "failures": "lines lost",
    "speed_against_the_first": "speed",
}
MODEL_COLUMNS = {
    "perplexity_per_token": "perplexity a token",
    "bits_per_byte": "bits per byte",
    "next_token_accuracy": "next token right",
    "ngram_bits_per_byte": "bits per byte, 5-gram",
    "parameters": "parameters",
}


def describe(values: Values) -> Report:
    """Return the report."""
    rows, names = values["tokenizers"], list(values["tokenizers"])
    lines: list[tuple[Cell, ...]] = [(name, *(row[key] for key in COLUMNS)) for name, row in rows.items()]
    tables = [Table("Tokenizers", ("tokenizer", *COLUMNS.values()), tuple(lines))]
    count = next(iter(rows.values()))
    notes = [
        f"{count['lines']:,} lines, {count['words']:,} words and {count['bytes']:,} bytes. Speed is against the first.",
        *(f"{name} does not give back: {row['failure'][:80]!r}" for name, row in rows.items() if row["failure"]),
    ]
    languages: Values = values.get("languages", {})
    for key in ("tokens_per_word", "bytes_per_token", "oov_rate") if languages else ():
        cells = [(part, *(row[name][key] for name in names)) for part, row in languages.items()]
        tables.append(Table(f"{COLUMNS[key].capitalize()}, by language", ("language", *names), tuple(cells)))
    if "models" in values:
        models = values["models"]
        cells = [(name, *(row[key] for key in MODEL_COLUMNS)) for name, row in models.items()]
        title = f"Models trained on each for {values['steps']:,} steps, on the last tenth"
        tables.append(Table(title, ("tokenizer", *MODEL_COLUMNS.values()), tuple(cells)))
        if languages:
            cells = [(part, *(models[name]["languages"][part] for name in names)) for part in languages]
            tables.append(Table("Bits per byte, by language", ("language", *names), tuple(cells)))
        notes.append("Bits per byte compare tokenizers, perplexity does not; they are left out where text was lost.")
    return Report(f"{len(rows)} tokenizers on {', '.join(values['data'])}", values, tuple(tables), notes=tuple(notes))
