"""An n-gram language model, whatever smoothed it: in its modified Kneser-Ney form the referee for every network.

A longer n-gram that was seen has a probability of its own; for all others its context's weight passes on to the shorter
context (the form of an ARPA file). `mle` and `laplace` look at the longest context alone, as their formulas say: there
the weight is the probability of what was not seen. The formulas are in ngram_smoothing, the numbers of n-grams in
ngram_counts: finding n-grams is one binary search an order for a whole text at once.

Shapes: N tokens of a stream, G n-grams of an order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.types import Ints
from lmworks.models.ngram_counts import Float64, Int64, count_ngrams, room_before
from lmworks.models.ngram_smoothing import Level, Smoothing, fit

PLAIN = ("mle", "laplace")  # they look at the longest context only


@dataclass(frozen=True)
class NgramModel:
    """A trained model; `unigrams` (V,) are natural log-probabilities, `levels` the orders from 2 up."""

    vocab_size: int
    eos_id: int
    unigrams: Float64
    levels: tuple[Level, ...]
    smoothing: str = "modified-kneser-ney"  # or "arpa" for one that was read
    discounts: tuple[tuple[float, ...], ...] = ()  # of Kneser-Ney: of each order, for counts of 1, 2 and more
    degenerate: tuple[int, ...] = ()  # orders whose counts gave no discounts, so that KenLM's fallback stands in

    @classmethod
    def train(
        cls, streams: Ints | Sequence[Ints], *, order: int = 5, vocab_size: int, eos_id: int | None,
        smoothing: Smoothing = "modified-kneser-ney", discount: float | None = None, min_count: int = 1,
    ) -> NgramModel:  # fmt: skip
        """Count and smooth one stream `[eos] doc1 [eos] doc2 [eos] …` of token ids, or several.

        No n-gram crosses the start of a document; its context is the one eos before it. About a second a million
        tokens. `discount` replaces kneser-ney's own; n-grams of two tokens or more that occur less than `min_count`
        times are taken out of the finished model. Raises InputError for ids outside the vocabulary, a stream that does
        not begin with eos, or too little text for the smoothing.
        """
        if eos_id is None or order < 1:
            raise InputError("an n-gram model needs a token that ends documents, and an order of at least 1")
        known = get_args(Smoothing)
        if smoothing not in known:
            near = did_you_mean(smoothing, known).strip()
            raise InputError(f"there is no smoothing {smoothing!r}", expected=", ".join(known), fix=near)
        parts = [streams] if isinstance(streams, np.ndarray) else list(streams)
        for part in parts:
            if not len(part) or part[0] != eos_id:
                raise InputError("the stream does not begin with the end token", expected=f"id {eos_id} first")
        for part in parts:
            check(part, vocab_size)
        stream = np.concatenate([parts[0], *(part[1:] for part in parts[1:])]).astype(np.int32)  # (N,)
        counts = count_ngrams(stream, order, vocab_size, eos_id)
        made = fit(counts, smoothing, discount)
        model = cls(vocab_size, eos_id, made.unigrams, made.levels, smoothing, made.discounts, made.degenerate)
        if min_count > 1:
            from lmworks.models.ngram_prune import keep

            return keep(model, [tally.counts >= min_count for tally in counts.tallies])
        return model

    @property
    def order(self) -> int:
        """The longest n-gram's length."""
        return len(self.levels) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """How many different n-grams of each order it holds; every token of the vocabulary is a unigram."""
        return (self.vocab_size, *(len(level.keys) for level in self.levels))

    @property
    def floor(self) -> float:
        """The natural log-probability of anything after a context that a plain model has not seen."""
        return -float(np.log(self.vocab_size)) if self.smoothing == "laplace" else -np.inf

    def logprobs(self, stream: Ints) -> Float64:
        """Return the natural log-probability of each token of `stream[1:]` after those before it, (N-1,).

        Longer n-grams never reach back over an eos, because training has none that does.
        """
        return self.score(stream)[0]

    def score(self, stream: Ints) -> tuple[Float64, Int64]:
        """Return those and the length of the n-gram, its token included, that each was found by: (N-1,) each."""
        tokens = np.asarray(stream).astype(np.int64)  # (N,)
        check(tokens, self.vocab_size)
        result = self.unigrams[tokens[1:]]  # (N-1,)
        lengths = np.ones(len(result), np.int64)
        room = room_before(tokens, self.eos_id)[1:] if self.smoothing in PLAIN else None
        for k, (level, found, longer) in enumerate(self.match(tokens), 2):
            context = found[:-1]
            if room is None:
                shorter = result + np.where(context >= 0, level.backoff[context], 0.0)
            else:
                unseen = np.where(context >= 0, level.backoff[context], self.floor)
                shorter = np.where(room >= k, unseen, result)
            result = np.where(longer[1:] >= 0, level.logprobs[longer[1:]], shorter)
            lengths[longer[1:] >= 0] = k
        return result, lengths

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
        """Return the probability of every token after these, (V,); it sums to 1, but for a context without counts.

        That is nothing at all after a context that `mle` has not seen.
        """
        tokens = np.array(context[max(0, len(context) - self.order + 1) :], np.int64)
        check(tokens, self.vocab_size)
        start = np.flatnonzero(tokens == self.eos_id)
        tokens = tokens[start[-1] :] if len(start) else tokens
        plain = self.smoothing in PLAIN
        probabilities = np.exp(self.unigrams)  # (V,)
        for k, (level, found, _) in enumerate(self.match(tokens), 2):
            if k > len(tokens) + 1 or found[-1] < 0:
                break
            ends = np.array([found[-1], found[-1] + 1]) * self.vocab_size
            first, last = np.searchsorted(level.keys, ends)
            weight = np.exp(level.backoff[found[-1]])
            probabilities = np.full(self.vocab_size, weight) if plain else probabilities * weight
            probabilities[level.keys[first:last] % self.vocab_size] = np.exp(level.logprobs[first:last])
        else:
            return probabilities
        missing = plain and k <= len(tokens) + 1  # the longest context was not seen
        return np.full(self.vocab_size, np.exp(self.floor)) if missing else probabilities

    def sample(self, *, max_tokens: int, prompt: Sequence[int] = (), seed: int = 0) -> list[int]:
        """Draw tokens after eos and `prompt` until the next eos (which is left out) or `max_tokens`.

        Nothing is drawn after a context that `mle` has not seen.
        """
        rng = np.random.Generator(np.random.Philox(seed))
        tokens = [self.eos_id, *prompt]
        for _ in range(max_tokens):
            cumulative = np.cumsum(self.distribution(tokens))
            if not cumulative[-1]:
                break
            token = int(np.searchsorted(cumulative[:-1], rng.random() * cumulative[-1], "right"))
            if token == self.eos_id:
                break
            tokens.append(token)
        return tokens[1 + len(prompt) :]


def check(tokens: Ints, vocab_size: int) -> None:
    """Raise InputError for ids outside the vocabulary."""
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise InputError(
            "a token id is outside the vocabulary",
            found=f"ids from {tokens.min()} to {tokens.max()}",
            expected=f"0 to {vocab_size - 1}",
        )
