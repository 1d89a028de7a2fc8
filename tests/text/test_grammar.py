"""The engine on grammars small enough to count by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from lmworks.text.grammar import Grammar, Rule, Uniform

RAW = (16086915834549238692, 5448529601018347655)  # the first two 64-bit numbers of Philox under key 7


def make() -> Grammar:
    """A grammar in which the noun `a` has two derivations: alone, and after a `Maybe` that is empty."""
    return Grammar(
        {
            "Sentence": [
                Rule(3, ("Noun", "verb"), ("{0} runs",)),
                Rule(1, ("Noun", "verb", "Noun"), ("{0} sees {1}",)),
            ],
            "Noun": [Rule(1, ("a",), ("ant",)), Rule(2, ("b",), ("bee",)), Rule(1, ("Maybe", "a"), ("{0} ant",))],
            "Maybe": [Rule(1, ("very",), ("big",)), Rule(1, (), ("",))],
        }
    )


def enumerate_derivations(grammar: Grammar, symbol: str) -> list[tuple[float, tuple[str, ...]]]:
    """Every derivation of a symbol with its probability."""
    found = []
    for chance, rule in zip(grammar.chances[symbol], grammar.rules[symbol], strict=True):
        rows: list[tuple[float, tuple[str, ...]]] = [(chance, ())]
        for part in rule.parts:
            options = enumerate_derivations(grammar, part) if part[0].isupper() else [(1.0, (part,))]
            rows = [(p * q, words + more) for p, words in rows for q, more in options]
        found += rows
    return found


def test_every_quantity_equals_its_enumeration() -> None:
    grammar = make()
    derivations = enumerate_derivations(grammar, "Sentence")
    assert math.fsum(p for p, _ in derivations) == pytest.approx(1)
    assert grammar.entropy("Sentence") == pytest.approx(-math.fsum(p * math.log2(p) for p, _ in derivations))
    characters = math.fsum(p * sum(len(word) + 1 for word in words) for p, words in derivations)
    assert grammar.mean_characters("Sentence") == pytest.approx(characters)
    lengths = [len(words) for _, words in derivations]
    assert grammar.lengths["Sentence"] == (min(lengths), max(lengths)) == (2, 5)
    by_text: dict[tuple[str, ...], list[float]] = {}
    for p, words in derivations:
        by_text.setdefault(words, []).append(p)
    for words, chances in by_text.items():
        probability, ways = grammar.inside("Sentence", words)
        assert probability == pytest.approx(math.fsum(chances))
        assert ways == len(chances)
    assert max(map(len, by_text.values())) == 4  # the test would notice an ambiguity


@pytest.mark.parametrize(
    "words", [(), ("a",), ("a", "verb", "a", "a"), ("verb",), ("a", "verb", "x"), ("very", "verb")]
)
def test_what_is_no_sentence_has_no_probability(words: tuple[str, ...]) -> None:
    assert make().inside("Sentence", words) == (0.0, 0)


def test_samples_follow_the_probabilities() -> None:
    grammar, uniform = make(), Uniform(3)
    trees = [grammar.sample("Sentence", uniform) for _ in range(4000)]
    counts = Counter(tree.words for tree in trees)
    for words, count in counts.items():
        p, _ = grammar.inside("Sentence", words)
        assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))
    assert {tree.english() for tree in trees if tree.words == ("very", "a", "verb", "b")} == {"big ant sees bee"}
    tree = next(tree for tree in trees if tree.words == ("very", "a", "verb", "b"))
    assert [(start, node.symbol) for start, node in tree.spans()] == [
        (0, "Sentence"),
        (0, "Noun"),
        (0, "Maybe"),
        (3, "Noun"),
    ]
    assert tree.english(tree.children[1], "what") == "big ant sees what"


def test_uniform_numbers_are_pinned() -> None:
    """The same on every machine and with every version of numpy: Philox's own output, shifted to 53 bits."""
    uniform = Uniform(7)
    first = [uniform.draw() for _ in range(5000)]
    assert first[:2] == [0.8720734548204873, 0.29536538151378355] == [n / 2**64 // 2**-53 * 2**-53 for n in RAW]
    assert first[4096:4098] != first[:2]
    assert min(first) >= 0
    assert max(first) < 1
    assert abs(sum(first) / 5000 - 0.5) < 0.02
    assert {Uniform(seed).index(6) for seed in range(60)} == set(range(6))
