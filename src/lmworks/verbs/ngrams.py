"""`lmworks ngram`: train, evaluate, sample and look into n-gram models, in a folder that KenLM can read.

A line is a sentence: `<s>` before it gives context, `</s>` after it is predicted. A blank line is a sentence without
words in training, as for KenLM's lmplz; the perplexity skips it, and `perplexity_with_blank_lines` does not, which is
what KenLM's `query` prints.

Bits per byte count the words, one blank between two, and the line's end; they are None where a token was unknown, or a
tokenizer lost something.

Shapes: N tokens of a stream, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lmworks import __version__
from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import check_output, new_folder
from lmworks.base.report import Report, Table
from lmworks.base.types import Ints
from lmworks.evaluation.perplexity import bits_per_byte, perplexity
from lmworks.export.receipt import write_receipt
from lmworks.models.ngram import NgramModel
from lmworks.models.ngram_arpa import BEGIN, END
from lmworks.models.ngram_smoothing import Smoothing
from lmworks.tokens.batch import make_stream
from lmworks.tokens.train import KINDS, train_tokenizer
from lmworks.verbs.ngram_folder import WORD, Opened, count_words, load, read_lines, save, split

LOG10 = math.log(10)


def train(
    texts: str | Path, out: str | Path, *, order: int = 3, smoothing: str = "modified-kneser-ney", kind: str = WORD,
    vocab_size: int | None = None, discount: float | None = None, min_count: int = 1, prune: float = 0.0,
    column: str | None = None, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Train an n-gram model on the lines of a file or folder; `out` is whole or absent.

    `vocab_size` None keeps every word, and 4096 tokens of a tokenizer. `min_count` and `prune` (relative entropy) make
    the model smaller. Raises InputError for too little text and for choices that do not go together.
    """
    check_choices(order, smoothing, kind, min_count, prune)
    check_output(out, overwrite=overwrite)
    lines = read_lines(texts, column)
    tokenizer = None
    stream: Ints
    if kind == WORD:
        stream, names = count_words(lines, vocab_size)
    else:
        decoded = [line.decode() for line in lines]
        texts_of = (f"{line}\n" for line in decoded)
        tokenizer = train_tokenizer(texts_of, kind=kind, vocab_size=4096 if vocab_size is None else vocab_size)
        stream = make_stream(tokenizer, decoded)
        names = [tokenizer.token(i) or f"<{i}>" for i in range(tokenizer.vocab_size)]
    eos = 0 if tokenizer is None else tokenizer.eos_id
    model = NgramModel.train(
        stream, order=order, vocab_size=len(names), eos_id=eos, smoothing=smoothing, discount=discount,  # type: ignore[arg-type]
        min_count=min_count,
    )  # fmt: skip
    if model.order < order and min_count == 1:
        raise InputError(f"no line is long enough for --order {order}", where=str(texts),
                         found=f"at most {model.order} tokens, the line's end and <s> included",
                         fix=f"--order {model.order}")  # fmt: skip
    if prune:
        from lmworks.models.ngram_prune import prune as take_out

        model = take_out(model, prune)
    opened = Opened(model, names, kind, tokenizer)
    settings = {
        "order": order, "smoothing": smoothing, "kind": kind, "vocab_size": len(names), "discount": discount,
        "min_count": min_count, "prune": prune,
    }  # fmt: skip
    tokens = len(stream) - 1
    with new_folder(out) as staged:
        save(opened, staged, settings)
        values: dict[str, Any] = {
            "out": str(out), **settings, "lines": len(lines), "tokens": tokens, "parameters": count_parameters(model),
            "orders": growth(model, stream), "discounts": [list(cuts) for cuts in model.discounts],
        }  # fmt: skip
        write_receipt(staged, {"made_by": f"lmworks {__version__}", "task": "text-generation", "ngram": values})
    notes = []
    if model.degenerate:
        which = ", ".join(map(str, model.degenerate))
        notes.append(f"The counts of order {which} give no discounts (too little text): KenLM's fallback 0.5, 1, 1.5 "
                     "stands in. More text, a lower --order or --smoothing laplace avoids it.")  # fmt: skip
    rows = tuple(
        (*list(row.values())[:2], f"{row['possible']:.3g}", *list(row.values())[3:]) for row in values["orders"]
    )
    columns = ("order", "n-grams", "possible", "share seen", "parameters so far")
    title = f"{out}: {smoothing}, order {model.order}, {len(names):,} {kind} tokens, {tokens:,} tokens of text"
    return Report(title, values, tables=(Table("How an n-gram model grows", columns, rows),), notes=tuple(notes))


def check_choices(order: int, smoothing: str, kind: str, min_count: int, prune: float) -> None:
    """Raise InputError for a choice that does not exist."""
    kinds = (WORD, *(name for name in KINDS if name != WORD))
    for name, found, known in (("smoothing", smoothing, get_args(Smoothing)), ("kind", kind, kinds)):
        if found not in known:
            near = did_you_mean(found, known).strip()
            raise InputError(f"there is no {name} {found!r}", expected=", ".join(known), fix=near)
    for option, value, low, high in (("order", order, 1, 20), ("min-count", min_count, 1, 10**9)):
        if not low <= value <= high:
            raise InputError(f"--{option} is out of range", found=str(value), expected=f"{low} to {high}")
    if not 0 <= prune < 1:
        raise InputError("--prune is out of range", found=str(prune), expected="0 to 1, such as 1e-7")


def check_least(option: str, value: int, least: int) -> None:
    """Raise InputError for a number that is too small."""
    if value < least:
        raise InputError(f"--{option} is out of range", found=str(value), expected=f"{least} or more")


def growth(model: NgramModel, stream: Ints) -> list[dict[str, Any]]:
    """Return, for each order, the n-grams held, how many there could be, and the share of those that the text has."""
    rows, total = [], 0
    for k, count in enumerate(model.counts, 1):
        seen = len(np.unique(stream)) if k == 1 else count
        total += count * (1 if k == model.order else 2)
        possible = float(model.vocab_size) ** k
        rows.append({"order": k, "ngrams": count, "possible": possible, "share": seen / possible, "parameters": total})
    return rows


def count_parameters(model: NgramModel) -> int:
    """Return how many numbers the model holds: a probability an n-gram, and a weight where it can be a context."""
    counts = model.counts
    return sum(counts) + sum(counts[:-1])


def evaluate(model: str | Path, texts: str | Path, *, column: str | None = None) -> Report:
    """Score the lines of a file or folder; a perplexity is None where something has no probability at all."""
    opened = load(model)
    lines = read_lines(texts, column)
    words = [split(line) for line in lines] if opened.tokenizer is None else None
    filled = [bool(split(line)) for line in lines] if words is None else list(map(bool, words))
    everything = opened.encode(lines)  # (N,)
    logprobs, lengths = opened.model.score(everything)
    tokens = everything[1:]
    scored = np.repeat(np.array(filled), opened.sizes(lines, everything))  # (N-1,) not of a blank line
    unknown = tokens == (-1 if opened.unknown is None else opened.unknown)
    kept, oov = logprobs[scored], int((unknown & scored).sum())
    count = int((scored & (tokens != opened.model.eos_id)).sum())
    if words is None:
        size = sum(len(line) + 1 for line, full in zip(lines, filled, strict=True) if full)
    else:
        size = sum(sum(map(len, row)) + len(row) for row in words if row)
    known = oov == 0 and (opened.tokenizer is None or all(opened.tokenizer.knows(line.decode()) for line in lines))
    shares = np.bincount(lengths[scored], minlength=opened.model.order + 1)[1:] / max(1, len(kept))
    values: dict[str, Any] = {
        "perplexity": finite(perplexity(kept)), "bits_per_byte": finite(bits_per_byte(kept, size if known else None)),
        "oov_rate": oov / max(1, count), "tokens": len(kept), "words": count, "oov": oov, "bytes": size,
        "perplexity_excluding_oov": finite(perplexity(logprobs[scored & ~unknown])),
        "perplexity_with_blank_lines": finite(perplexity(logprobs)), "tokens_with_blank_lines": len(logprobs),
        "logprob10": finite(float(kept.sum()) / LOG10), "impossible_tokens": int(np.isneginf(kept).sum()),
        "lines": int(sum(filled)), "blank_lines": len(filled) - sum(filled),
        "found_by_order": [round(share, 6) for share in shares.tolist()],
        "order": opened.model.order, "smoothing": opened.model.smoothing, "kind": opened.kind,
    }  # fmt: skip
    notes = []
    if values["impossible_tokens"]:
        notes.append(
            f"{values['impossible_tokens']:,} of {len(kept):,} tokens have no probability at all, so perplexity "
            "is infinite (null): take a smoothing other than mle, or kneser-ney without --discount."
        )
    if oov:
        notes.append(f"{oov:,} of {count:,} tokens are not in the vocabulary: bits per byte would flatter the model.")
    elif not known:
        notes.append("The tokenizer loses something of this text: bits per byte would flatter the model.")
    rows = tuple((name.replace("_", " "), values[name]) for name in (
        "perplexity", "perplexity_excluding_oov", "perplexity_with_blank_lines", "bits_per_byte", "oov_rate", "tokens",
        "lines"))  # fmt: skip
    found = tuple((k, share) for k, share in enumerate(values["found_by_order"], 1))
    tables = (
        Table("Scores", ("what", "value"), rows),
        Table("Longest n-gram that was seen", ("order", "share"), found),
    )
    return Report(f"{model} on {texts}", values, tables=tables, notes=tuple(notes))


def finite(value: float | None) -> float | None:
    """Return None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def sample(model: str | Path, *, prompt: str = "", count: int = 5, max_tokens: int = 50, seed: int = 0) -> Report:
    """Draw sentences, each from the beginning or after a prompt."""
    for option, value, low in (("count", count, 1), ("max-tokens", max_tokens, 1), ("seed", seed, 0)):
        check_least(option, value, low)
    opened = load(model)
    ids = opened.context(prompt)
    ids = ids[1:] if ids[:1] == [opened.model.eos_id] else ids
    if not opened.model.distribution([opened.model.eos_id, *ids]).any():
        raise InputError("nothing follows this prompt: mle knows the contexts of its text alone", found=prompt,
                         fix="another --prompt, or a model of another smoothing")  # fmt: skip
    texts, seeds = [], np.random.SeedSequence(seed).generate_state(count, np.uint64).tolist()
    for one in seeds:
        drawn = opened.model.sample(max_tokens=max_tokens, prompt=ids, seed=one)
        texts.append(opened.text([*ids, *drawn]))
    return Report(f"{model}: {count} samples", {"prompt": prompt, "texts": texts, "seed": seed},
                  texts=tuple((f"{i}", text) for i, text in enumerate(texts, 1)))  # fmt: skip


def table(model: str | Path, context: str = "", *, top: int = 20) -> Report:
    """Return the likeliest tokens after a context, `<s>` for the beginning of a sentence: P(jumps | fox) = 1.0000."""
    check_least("top", top, 1)
    opened = load(model)
    ids = opened.context(context)
    if opened.unknown in ids and opened.unknown is not None:
        missing = [word.decode() for word in split(context.encode()) if opened.ids.get(word, 1) == 1]
        raise InputError("the model does not know this context", found=" ".join(missing) or context,
                         fix="take words of the training text")  # fmt: skip
    longest = opened.model.order - 1
    used = ids[max(0, len(ids) - longest) :]
    distribution = opened.model.distribution(used)
    best = np.argsort(-distribution, kind="stable")[:top]
    best = best[distribution[best] > 0]
    names = [END if i == opened.model.eos_id else opened.names[i] for i in best.tolist()]
    given = [BEGIN if i == opened.model.eos_id else opened.names[i] for i in used]
    shown = " ".join(given)
    probabilities = dict(zip(names, distribution[best].tolist(), strict=True))
    rows = tuple((f"P({name} | {shown})" if shown else f"P({name})", f"{p:.4f}") for name, p in probabilities.items())
    values = {"context": given, "probabilities": probabilities, "left": float(1 - distribution[best].sum())}
    notes = () if len(used) == len(ids) else (f"The model of order {longest + 1} sees the last {longest} tokens only.",)
    return Report(f"{model}: after {shown or 'nothing'}", values, notes=notes,
                  tables=(Table("Conditional probabilities", ("what", "value"), rows),))  # fmt: skip


def score(model: str | Path, text: str) -> Report:
    """Return the log-probability of one sentence as the sum of its tokens' (the chain rule), each by its own."""
    opened = load(model)
    stream = opened.encode([text.encode("utf-8", "replace")])
    logprobs, lengths = opened.model.score(stream)
    names = [END if i == opened.model.eos_id else opened.names[i] for i in stream[1:].tolist()]
    tokens = [
        {"token": name, "probability": math.exp(p), "logprob": finite(p), "ngram": n}
        for name, p, n in zip(names, logprobs.tolist(), lengths.tolist(), strict=True)
    ]
    total = float(logprobs.sum())
    values = {"logprob": finite(total), "logprob10": finite(total / LOG10), "perplexity": finite(perplexity(logprobs)),
              "tokens": tokens}  # fmt: skip
    rows = tuple((str(row["token"]), row["probability"], row["logprob"], row["ngram"]) for row in tokens)
    columns = ("token", "probability", "natural log", "n-gram found")
    title = f"log P = {total:.4f} (base 10: {total / LOG10:.4f})"
    return Report(title, values, tables=(Table("Chain rule", columns, rows),))
