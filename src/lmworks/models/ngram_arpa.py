r"""ARPA files, as KenLM and SRILM read and write them: \data\, one section an order, base-10 logarithms.

    logprob <tab> words [<tab> weight of the context that the words are]

`<s>` begins a sentence and `</s>` ends it: in our streams they are one token, eos, as a context and as an answer.
`mle` and `laplace` do not back off, but can be said exactly: every n-gram that does not begin a sentence and is shorter
than the longest has the probability of anything unseen, so that a context's weight turns it into what it must be.

Shapes: G n-grams of an order, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from lmworks.base.errors import FormatError
from lmworks.base.files import own_file
from lmworks.models.ngram import PLAIN, NgramModel
from lmworks.models.ngram_counts import Float64, Int64
from lmworks.models.ngram_smoothing import Level

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
NEVER = -99.0  # base 10: what stands for no probability at all
MISSING = -100.0  # base 10: an unknown word where the file has none, as in KenLM
LN10 = float(np.log(10.0))
SHORTEST = 4  # bytes of a line: a digit, a tab, a letter, a line feed
AT_ONCE = 1 << 16  # lines of one write
BLANK = re.compile(r"[\0\t\n\r ]+")  # what KenLM takes for white space


def write_arpa(model: NgramModel, names: Sequence[str], file: IO[str]) -> None:
    """Write a model whose tokens have these names (V), eos that of END; a blank inside a name becomes <0x20>."""
    model = as_backoff(model)
    words = [BLANK.sub(escape, name) or "<empty>" for name in names]
    counts = [model.vocab_size + 1, *model.counts[1:]]
    file.write("\\data\\\n" + "".join(f"ngram {k}={count}\n" for k, count in enumerate(counts, 1)))
    weights = [*(level.backoff / LN10 for level in model.levels), None]
    logprobs = [model.unigrams, *(level.logprobs for level in model.levels)]
    texts = [BEGIN if i == model.eos_id else word for i, word in enumerate(words)]  # as contexts
    for k, (values, weight) in enumerate(zip(logprobs, weights, strict=True), 1):
        file.write(f"\n\\{k}-grams:\n")
        made = np.maximum(values / LN10, NEVER)
        if k == 1:
            shown = [END if i == model.eos_id else word for i, word in enumerate(words)]
            own = 0.0 if weight is None else float(weight[model.eos_id])
            file.write(f"{NEVER:g}\t{BEGIN}{suffix(own, weight is None)}\n")
            if weight is not None:
                weight = weight.copy()
                weight[model.eos_id] = 0.0  # what ends a sentence is no context
        else:
            context, token = np.divmod(model.levels[k - 2].keys, model.vocab_size)
            ends = [END if i == model.eos_id else word for i, word in enumerate(words)]
            shown = [f"{texts[c]} {ends[t]}" for c, t in zip(context.tolist(), token.tolist(), strict=True)]
            texts = shown
        for start in range(0, len(shown), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            tails = [None] * len(shown[part]) if weight is None else np.maximum(weight[part], NEVER).tolist()
            rows = zip(made[part].tolist(), shown[part], tails, strict=True)
            file.writelines(f"{p:.9g}\t{text}{suffix(tail, tail is None)}\n" for p, text, tail in rows)
    file.write("\n\\end\\\n")


def suffix(weight: float | None, last: bool) -> str:
    """Return the end of a line: the weight, but for the longest n-grams."""
    return "" if last else f"\t{weight:.9g}"


def escape(found: re.Match[str]) -> str:
    """Return blanks in a form that an ARPA file can hold: " " -> "<0x20>"."""
    return "".join(f"<0x{ord(letter):02X}>" for letter in found[0])


def as_backoff(model: NgramModel) -> NgramModel:
    """Return a plain model in the form that backs off, with the same probabilities; any other as it is."""
    if model.smoothing not in PLAIN or not model.levels:
        return model
    floor = max(model.floor, NEVER * LN10)
    initial = np.arange(model.vocab_size) == model.eos_id  # (V,) begins a sentence
    levels = []
    for k, level in enumerate(model.levels, 2):
        last = k == model.order
        weights = np.maximum(level.backoff, NEVER * LN10) - floor  # (G below,)
        weights[~(initial | last)] = 0.0
        initial = initial[level.keys // model.vocab_size]  # (G,)
        levels.append(Level(level.keys, np.where(initial | last, level.logprobs, floor), weights))
    return replace(model, unigrams=np.full(model.vocab_size, floor), levels=tuple(levels), smoothing="arpa")


def read_arpa(path: Path) -> tuple[NgramModel, list[str]]:
    """Return a model and the names of its tokens (V), END first and UNKNOWN second; raise FormatError where damaged."""
    with own_file(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = enumerate(file, 1)
        counts = read_counts(lines, path)
        if sum(counts) * SHORTEST > path.stat().st_size:
            raise damaged(path, f"{sum(counts)} n-grams cannot be in {path.stat().st_size} bytes")
        ids: dict[str, int] = {END: 0, BEGIN: 0, UNKNOWN: 1, UNKNOWN.upper(): 1}  # as KenLM reads it
        names, V = [END, UNKNOWN], 0
        levels: list[Level] = []
        unigrams, weights = np.zeros(0), np.zeros(0)
        for k, count in enumerate(counts, 1):
            expect(lines, f"\\{k}-grams:", path)
            logprobs, texts, own = read_section(lines, k, count, len(counts), path)
            if k == 1:
                for (word,) in texts:
                    if ids.setdefault(word, len(names)) == len(names):
                        names.append(word)
                if len({word for (word,) in texts}) < count:
                    raise damaged(path, "a 1-gram stands there twice")
                V = len(names)
                unigrams, weights = np.full(V, MISSING * LN10), np.zeros(V)
                for (word,), p, weight in zip(texts, logprobs.tolist(), own.tolist(), strict=True):
                    if word != BEGIN:
                        unigrams[ids[word]] = p
                    if word != END:
                        weights[ids[word]] = weight
                continue
            try:
                tokens = np.array([[ids[word] for word in words] for words in texts], np.int64).reshape(-1, k)  # (G, k)
            except KeyError as error:
                raise damaged(path, f"the word {error.args[0]!r} is no 1-gram") from None
            context = find(levels, tokens[:, :-1], V, path)
            keys = context * V + tokens[:, -1]
            order = np.argsort(keys, kind="stable")
            if (np.diff(keys[order]) == 0).any():
                raise damaged(path, f"a {k}-gram stands there twice")
            levels.append(Level(keys[order], logprobs[order], weights))
            weights = own[order]
        expect(lines, "\\end\\", path)
    return NgramModel(V, 0, unigrams, tuple(levels), "arpa"), names


def find(levels: Sequence[Level], tokens: Int64, vocab_size: int, path: Path) -> Int64:
    """Return the numbers of n-grams given by their tokens (G, k); raise FormatError where one is not there."""
    numbers = tokens[:, 0]
    for level, token in zip(levels, tokens.T[1:], strict=True):
        wanted = numbers * vocab_size + token
        numbers = np.minimum(np.searchsorted(level.keys, wanted), max(len(level.keys) - 1, 0))
        if len(wanted) and (not len(level.keys) or (level.keys[numbers] != wanted).any()):
            raise damaged(path, f"a {tokens.shape[1] + 1}-gram whose first {tokens.shape[1]} words are not there")
    return numbers


def read_counts(lines: Iterator[tuple[int, str]], path: Path) -> list[int]:
    r"""Read up to the end of \data\; return how many n-grams of each order there are."""
    for _, line in lines:
        if line.strip() == "\\data\\":
            break
    else:
        raise damaged(path, "no \\data\\")
    counts: list[int] = []
    for number, line in lines:
        row = re.fullmatch(r"ngram (\d+)\s*=\s*(\d+)", line.strip())
        if row is None:
            break
        if int(row[1]) != len(counts) + 1:
            raise damaged(path, f"line {number}: {line.strip()}")
        counts.append(int(row[2]))
    if not counts or line.strip():
        raise damaged(path, "no counts after \\data\\")
    return counts


def expect(lines: Iterator[tuple[int, str]], wanted: str, path: Path) -> None:
    """Read up to this line, over blank ones."""
    for number, line in lines:
        if line.strip() == wanted:
            return
        if line.strip():
            raise damaged(path, f"line {number}: {line.strip()[:60]!r} instead of {wanted}")
    raise damaged(path, f"it ends before {wanted}")


def read_section(
    lines: Iterator[tuple[int, str]], k: int, count: int, order: int, path: Path
) -> tuple[Float64, list[list[str]], Float64]:
    """Return natural logarithms, words and weights of the n-grams of one order."""
    logprobs, texts, weights = np.empty(count), [], np.zeros(count)
    for i in range(count):
        number, line = next(lines, (0, ""))
        parts = [part for part in BLANK.split(line) if part]
        try:
            logprobs[i] = float(parts[0])
            weights[i] = float(parts[k + 1]) if len(parts) == k + 2 else 0.0
            if len(parts) not in (k + 1, k + 2) or (k == order and weights[i] != 0):  # some writers give the longest 0
                raise ValueError
        except (ValueError, IndexError):
            raise damaged(path, f"line {number}: {line.strip()[:60]!r} in the {k}-grams") from None
        texts.append(parts[1 : k + 1])
    if not np.isfinite(logprobs).all() or (logprobs > 0).any() or not np.isfinite(weights).all():
        raise damaged(path, f"a {k}-gram with no logarithm of a probability or weight")
    return logprobs * LN10, texts, weights * LN10


def damaged(path: Path, found: str) -> FormatError:
    """Return the error for a file that is not a whole ARPA file."""
    return FormatError("this is no whole ARPA file", where=str(path), found=found, fix="write or fetch it again")
