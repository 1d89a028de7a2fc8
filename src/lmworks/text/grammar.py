"""A probabilistic context-free grammar whose entropy and whose probability of any text are exact.

Each rule rewrites a symbol to words and symbols and carries a template for the English side, so that a derivation is
also a translation. The grammar has no recursion, so every quantity is one pass over the rules:

    H(A) = Σ_r p_r · (−log2 p_r + Σ H(symbols of r))        entropy in bits (Grenander 1967)
    P(A → w_i … w_j) = Σ_r p_r · Π …                        the inside probability (Baker 1979)

H is the entropy of derivations. It is that of the texts too where no text has two; `inside` counts them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

English = str | tuple[str, ...]
Ends = dict[int, tuple[float, int]]  # where a symbol can end, with what probability, in how many ways
Known = dict[tuple[str, int], Ends]


@dataclass(frozen=True)
class Rule:
    """One way to rewrite a symbol.

    `parts` are symbols (begin with a capital) and words. `english` is a template whose {0}, {1} … stand for the
    symbols' English; several templates give several forms, which `{0[1]}` picks. `tag` says what the whole phrase is.
    """

    weight: float
    parts: tuple[str, ...]
    english: tuple[str, ...]
    tag: str = ""


@dataclass(frozen=True)
class Tree:
    """A derivation: a symbol, the rule that rewrote it, the trees of that rule's symbols in order, and all words."""

    symbol: str
    rule: Rule
    children: tuple[Tree, ...]
    words: tuple[str, ...]

    def english(self, asked: Tree | None = None, word: str = "") -> English:
        """Return the English below this node, in one form or several; `word` stands in for the node `asked`."""
        if self is asked:
            return word
        inner = [child.english(asked, word) for child in self.children]
        forms = tuple(" ".join(form.format(*inner).split()) for form in self.rule.english)
        return forms[0] if len(forms) == 1 else forms

    def spans(self, start: int = 0) -> Iterator[tuple[int, Tree]]:
        """Yield (number of its first word, node) of this and every node below, from the top and from the left."""
        yield start, self
        below = iter(self.children)
        for part in self.rule.parts:
            child = next(below) if is_symbol(part) else None
            if child is not None:
                yield from child.spans(start)
            start += 1 if child is None else len(child.words)


class Uniform:
    """Uniform random numbers that are the same on every machine: Philox's raw output, with no library rule between."""

    def __init__(self, seed: int) -> None:
        self.bits, self.block, self.at = np.random.Philox(key=seed), [0.0], 1

    def draw(self) -> float:
        """Return the next number in [0, 1)."""
        if self.at == len(self.block):
            raw = np.asarray(self.bits.random_raw(4096), np.uint64)
            self.block, self.at = ((raw >> np.uint64(11)) * 2.0**-53).tolist(), 0
        self.at += 1
        return self.block[self.at - 1]

    def index(self, below: int) -> int:
        """Return the next number in 0 … below-1."""
        return int(self.draw() * below)


class Grammar:
    """Rules by symbol, without recursion; weights are normalised to probabilities."""

    def __init__(self, rules: dict[str, list[Rule]]) -> None:
        self.rules, self.chances, self.limits = rules, {}, {}
        for symbol, options in rules.items():
            total = math.fsum(rule.weight for rule in options)
            self.chances[symbol] = [rule.weight / total for rule in options]
            self.limits[symbol] = list(accumulate(self.chances[symbol]))

    def sample(self, symbol: str, uniform: Uniform) -> Tree:
        """Draw a derivation."""
        limits = self.limits[symbol]
        rule = self.rules[symbol][min(bisect_right(limits, uniform.draw()), len(limits) - 1)]
        children: list[Tree] = []
        words: list[str] = []
        for part in rule.parts:
            if part in self.rules:
                children.append(self.sample(part, uniform))
                words.extend(children[-1].words)
            else:
                words.append(part)
        return Tree(symbol, rule, tuple(children), tuple(words))

    def entropy(self, symbol: str) -> float:
        """Return the entropy of the derivations of a symbol, in bits."""
        return self.expect(symbol, lambda chance, rule: -math.log2(chance), {})

    def mean_characters(self, symbol: str) -> float:
        """Return the expected characters of a symbol's words, each word with the blank before it."""
        return self.expect(symbol, lambda _, rule: sum(1 + len(part) for part in rule.parts if not is_symbol(part)), {})

    def expect(self, symbol: str, value: Callable[[float, Rule], float], known: dict[str, float]) -> float:
        """Return the expected sum of `value(probability, rule)` over all rules of a derivation."""
        if symbol not in known:
            known[symbol] = math.fsum(
                chance
                * (value(chance, rule) + sum(self.expect(part, value, known) for part in rule.parts if is_symbol(part)))
                for chance, rule in zip(self.chances[symbol], self.rules[symbol], strict=True)
            )
        return known[symbol]

    @cached_property
    def lengths(self) -> dict[str, tuple[int, int]]:
        """How many words each symbol yields at least and at most."""
        found: dict[str, tuple[int, int]] = {}

        def measure(part: str) -> tuple[int, int]:
            if not is_symbol(part):
                return 1, 1
            if part not in found:
                rows = [[measure(inner) for inner in rule.parts] for rule in self.rules[part]]
                found[part] = min(sum(n for n, _ in row) for row in rows), max(sum(n for _, n in row) for row in rows)
            return found[part]

        for symbol in self.rules:
            measure(symbol)
        return found

    @cached_property
    def starts(self) -> dict[str, dict[str, list[int]]]:
        """For each symbol, the rules that can begin with a word; "" holds those that can be empty."""
        found: dict[str, dict[str, list[int]]] = {}
        for symbol in self.rules:
            self.find_starts(symbol, found)
        return found

    def find_starts(self, symbol: str, found: dict[str, dict[str, list[int]]]) -> dict[str, list[int]]:
        """Fill in the entry of one symbol and of all below it."""
        if symbol not in found:
            entry: dict[str, list[int]] = {}
            for i, rule in enumerate(self.rules[symbol]):
                words: dict[str, None] = {}
                for part in rule.parts:
                    first = dict.fromkeys(self.find_starts(part, found) if is_symbol(part) else (part,))
                    words |= first
                    if "" not in first:
                        words.pop("", None)
                        break
                else:
                    words[""] = None
                for word in words:
                    entry.setdefault(word, []).append(i)
            found[symbol] = entry
        return found[symbol]

    def inside(self, symbol: str, words: Sequence[str]) -> tuple[float, int]:
        """Return the probability of these words as one whole symbol, and in how many ways it derives them."""
        return self.reach(symbol, 0, words, {}).get(len(words), (0.0, 0))

    def reach(self, symbol: str, start: int, words: Sequence[str], known: Known) -> Ends:
        """Return {end: (probability, derivations)} of a symbol that begins at `start`."""
        if (symbol, start) in known:
            return known[symbol, start]
        result: Ends = {}
        starts = self.starts[symbol]
        options = {*starts.get("", ()), *(starts.get(words[start], ()) if start < len(words) else ())}
        for i in sorted(options):
            ends: Ends = {start: (self.chances[symbol][i], 1)}
            for part in self.rules[symbol][i].parts:
                after: Ends = {}
                for at, (chance, ways) in ends.items():
                    if is_symbol(part):
                        steps = self.reach(part, at, words, known)
                    else:
                        steps = {at + 1: (1.0, 1)} if at < len(words) and words[at] == part else {}
                    for end, (more, times) in steps.items():
                        before = after.get(end, (0.0, 0))
                        after[end] = (before[0] + chance * more, before[1] + ways * times)
                ends = after
            for end, (chance, ways) in ends.items():
                before = result.get(end, (0.0, 0))
                result[end] = (before[0] + chance, before[1] + ways)
        known[symbol, start] = result
        return result


def is_symbol(part: str) -> bool:
    """Say whether a part of a rule is a symbol rather than a word."""
    return part[:1].isupper()
