"""An n-gram language model: interpolated modified Kneser-Ney smoothing, the referee for every network.

    p(w | h) = (a(hw) − D(a(hw))) / Σ_v a(hv) + γ(h) · p(w | h′)        h′ is h without its first token

a(hw) is how often hw occurs; in the lower orders it is in how many different contexts hw occurs, but for what begins
a document, which has no context. D takes one of three discounts, for counts 1, 2 and more; γ(h) is what they freed. The
recursion ends in the uniform distribution over the vocabulary, so nothing has probability zero. Source: Chen & Goodman,
"An empirical study of smoothing techniques for language modeling", 1999, section 3; the details (where a document
begins, discounts from the adjusted counts) are those of KenLM (Heafield et al. 2013), whose perplexities it reproduces.

Every n-gram of order k ≥ 2 has a number: its place among the sorted keys `number of its first k−1 tokens · V + token`.
That is exact (no hashing), and finding n-grams is one binary search an order for a whole text at once.

Shapes: N tokens of a stream, G n-grams of an order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Ints

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
FALLBACK = (0.5, 1.0, 1.5)  # discounts where the counts give none, as in KenLM


@dataclass(frozen=True)
class Level:
    """The n-grams of one order k ≥ 2."""

    keys: Int64  # (G,) sorted: context · V + token
    logprobs: Float64  # (G,) natural log of the interpolated probability
    backoff: Float64  # (G of the order below,) natural log of γ of each context; 0 where nothing follows


@dataclass(frozen=True)
class KneserNey:
    """A trained model; `unigrams` (V,) are natural log-probabilities, `levels` the orders from 2 up."""

    vocab_size: int
    eos_id: int
    unigrams: Float64
    levels: tuple[Level, ...]
    discounts: tuple[tuple[float, float, float], ...]  # of each order, for counts of 1, 2 and more

    @classmethod
    def train(cls, streams: Ints | Sequence[Ints], *, order: int = 5, vocab_size: int, eos_id: int | None) -> KneserNey:
        """Count and smooth one stream `[eos] doc1 [eos] doc2 [eos] …` of token ids, or several.

        No n-gram crosses the start of a document; its context is the one eos before it. About a second a million
        tokens. Raises InputError for ids outside the vocabulary or a stream that does not begin with eos.
        """
        if eos_id is None or order < 1:
            raise InputError("an n-gram model needs a token that ends documents, and an order of at least 1")
        parts = [streams] if isinstance(streams, np.ndarray) else list(streams)
        for part in parts:
            if not len(part) or part[0] != eos_id:
                raise InputError("the stream does not begin with the end token", expected=f"id {eos_id} first")
        stream = np.concatenate([parts[0], *(part[1:] for part in parts[1:])]).astype(np.int64)  # (N,)
        check(stream, vocab_size)
        return cls(vocab_size, eos_id, *fit(stream, order, vocab_size, eos_id))

    @property
    def order(self) -> int:
        """The longest n-gram's length."""
        return len(self.levels) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """How many different n-grams of each order it holds; every token of the vocabulary is a unigram."""
        return (self.vocab_size, *(len(level.keys) for level in self.levels))

    def logprobs(self, stream: Ints) -> Float64:
        """Return the natural log-probability of each token of `stream[1:]` after those before it, (N-1,).

        Longer n-grams never reach back over an eos, because training has none that does.
        """
        tokens = np.asarray(stream).astype(np.int64)  # (N,)
        check(tokens, self.vocab_size)
        result = self.unigrams[tokens[1:]]  # (N-1,)
        for level, found, longer in self.match(tokens):
            context = found[:-1]
            shorter = result + np.where(context >= 0, level.backoff[context], 0.0)
            result = np.where(longer[1:] >= 0, level.logprobs[longer[1:]], shorter)
        return result

    def match(self, tokens: Int64) -> Iterator[tuple[Level, Int64, Int64]]:
        """Yield each level with the numbers of the n-grams one shorter, and of its own, that end at each token (N,).

        A number is -1 where there is no such n-gram.
        """
        found = tokens  # a unigram's number is its token
        for level in self.levels:
            wanted = np.where(found[:-1] >= 0, found[:-1] * self.vocab_size + tokens[1:], -1)
            place = np.searchsorted(level.keys, wanted)
            hit = level.keys[np.minimum(place, len(level.keys) - 1)] == wanted
            longer = np.concatenate([[-1], np.where(hit, place, -1)])[: len(tokens)]
            yield level, found, longer
            found = longer

    def distribution(self, context: Sequence[int]) -> Float64:
        """Return the probability of every token after these, (V,); it sums to 1."""
        tokens = np.array(context[max(0, len(context) - self.order + 1) :], np.int64)
        check(tokens, self.vocab_size)
        probabilities = np.exp(self.unigrams)  # (V,)
        for level, found, _ in self.match(tokens):
            if not len(found) or found[-1] < 0:
                break
            ends = np.array([found[-1], found[-1] + 1]) * self.vocab_size
            first, last = np.searchsorted(level.keys, ends)
            probabilities *= np.exp(level.backoff[found[-1]])
            probabilities[level.keys[first:last] % self.vocab_size] = np.exp(level.logprobs[first:last])
        return probabilities

    def sample(self, *, max_tokens: int, prompt: Sequence[int] = (), seed: int = 0) -> list[int]:
        """Draw tokens after eos and `prompt` until the next eos (which is left out) or `max_tokens`."""
        rng = np.random.Generator(np.random.Philox(seed))
        tokens = [self.eos_id, *prompt]
        for _ in range(max_tokens):
            cumulative = np.cumsum(self.distribution(tokens))
            token = int(np.searchsorted(cumulative[:-1], rng.random() * cumulative[-1], "right"))
            if token == self.eos_id:
                break
            tokens.append(token)
        return tokens[1 + len(prompt) :]


def check(tokens: Int64, vocab_size: int) -> None:
    """Raise InputError for ids outside the vocabulary."""
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise InputError(
            "a token id is outside the vocabulary",
            found=f"ids from {tokens.min()} to {tokens.max()}",
            expected=f"0 to {vocab_size - 1}",
        )


@dataclass(frozen=True)
class Tally:
    """What the n-grams of one order are and how often they occur, in the order of their keys."""

    keys: Int64  # (G,)
    suffix: Int64  # (G,) the number of the n-gram without its first token
    counts: Int64  # (G,) occurrences
    initial: NDArray[np.bool_]  # (G,) begins a document


def tally(stream: Int64, order: int, vocab_size: int, eos_id: int) -> list[Tally]:
    """Number and count the n-grams of orders 2 … `order`, or as far as the documents are long."""
    at = np.arange(len(stream))
    begin = np.maximum.accumulate(np.where(stream == eos_id, at, 0))  # (N,) the last eos so far
    room = at - np.concatenate([[0], begin[:-1]]) + 1  # (N,) tokens of the document up to here, its eos included
    found, tallies = stream, []
    for k in range(2, order + 1):
        ends = np.flatnonzero(room >= k)  # where an n-gram of this order ends
        if not len(ends):
            break
        keys = found[ends - 1] * vocab_size + stream[ends]
        by_key = np.argsort(keys)
        keys, ends = keys[by_key], ends[by_key]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(np.concatenate([first, [len(keys)]]))
        shown = ends[first]  # one place where each n-gram ends
        tallies.append(Tally(keys[first], found[shown], counts, room[shown] == k))
        found = np.full(len(stream), -1)
        found[ends] = np.repeat(np.arange(len(first)), counts)
    return tallies


def fit(
    stream: Int64, order: int, vocab_size: int, eos_id: int
) -> tuple[Float64, tuple[Level, ...], tuple[tuple[float, float, float], ...]]:
    """Return unigram log-probabilities, levels and discounts."""
    tallies = tally(stream, order, vocab_size, eos_id)
    if tallies:
        adjusted = np.bincount(tallies[0].keys % vocab_size, minlength=vocab_size)  # (V,) different tokens before it
    else:
        adjusted = np.bincount(stream[1:], minlength=vocab_size)
    cuts = find_discounts(adjusted)
    taken = np.choose(np.minimum(adjusted, 3), [0.0, *cuts])  # (V,)
    total = max(1, int(adjusted.sum()))
    freed = taken.sum() / total if adjusted.any() else 1.0
    below = (adjusted - taken) / total + freed / vocab_size  # (V,) probabilities of the order below
    unigrams, levels, discounts = np.log(below), [], [cuts]
    for k, this in enumerate(tallies):
        if k + 1 < len(tallies):
            longer = tallies[k + 1]
            kinds = np.bincount(longer.suffix, minlength=len(this.keys))  # (G,) different tokens before it
            adjusted = np.where(this.initial, this.counts, kinds)
        else:
            adjusted = this.counts
        cuts = find_discounts(adjusted)
        taken = np.choose(np.minimum(adjusted, 3), [0.0, *cuts])  # (G,)
        context = this.keys // vocab_size  # (G,)
        totals = np.bincount(context, adjusted, minlength=len(below))  # (G below,)
        freed = np.bincount(context, taken, minlength=len(below))
        gamma = np.where(totals > 0, freed / np.maximum(totals, 1), 1.0)  # (G below,)
        below = (adjusted - taken) / totals[context] + gamma[context] * below[this.suffix]  # (G,)
        levels.append(Level(this.keys, np.log(below), np.log(gamma)))
        discounts.append(cuts)
    return unigrams, tuple(levels), tuple(discounts)


def find_discounts(adjusted: Int64) -> tuple[float, float, float]:
    """Return D for counts of 1, 2 and more, estimated from how many n-grams have a count of 1, 2, 3 and 4."""
    n = np.bincount(np.minimum(adjusted, 5), minlength=5)[:5].astype(np.float64)
    if not n[1:4].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    one, two, more = (float(i - (i + 1) * y * n[i + 1] / n[i]) for i in (1, 2, 3))
    return (one, two, more) if 0 < one <= 1 and 0 < two <= 2 and 0 < more <= 3 else FALLBACK
