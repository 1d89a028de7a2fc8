"""The built-in constructed language: sentences with English, labels, and an exact entropy to measure models against.

- Nouns fall into eight classes. The verb's ending repeats the class of its agent, the mark after the verb that of its
  object; adjectives and possessives repeat that of what they belong to. Relative clauses, places, adverbs and objects
  with a class of their own come between: neither a bag of words nor five tokens of context are enough.
- Particles, not places, say who did what to whom: the object may come first.
- Negation opens after the agent and closes at the end of the sentence; a relative clause has a negation of its own.
- A question opens with a particle and closes with "?". All verbs of a main clause are good deeds, or all are bad.

A document has two sentences, and one more with each toss of a biased coin; a sentence is one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lmworks.base.errors import InputError
from lmworks.text.grammar import Grammar, Tree, Uniform
from lmworks.text.lexicon import make_lexicon
from lmworks.text.phrases import Phrases
from lmworks.text.read import Document

LEAST, STOP = 2, 0.2  # sentences of a document; the chance to stop after each one from there on
ENTITIES = ("person", "place", "animal")
ASKING = {"agent": "who", "patient": "what", "place": "which place"}


@dataclass(frozen=True)
class Question:
    """A question about a sentence, and its answer as characters `start` … `end` of the sentence's text."""

    text: str
    english: str
    answer: str
    start: int
    end: int


@dataclass(frozen=True)
class Sentence:
    """A sentence, its English, and labels.

    `polarity` is "positive" for a good deed, or a bad one that was not done, else "negative"; `tags` has
    one BIO tag a word.
    """

    text: str
    english: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    polarity: str
    is_question: bool
    questions: tuple[Question, ...]


class Language:
    """A language of its own for every seed."""

    def __init__(self, seed: int = 0) -> None:
        self.lexicon = make_lexicon(seed)
        self.name = self.lexicon.name
        self.grammar = Grammar(Phrases(self.lexicon).rules)

    def entropy(self) -> float:
        """Return the exact entropy of a sentence, in bits."""
        return self.grammar.entropy("Sentence")

    def document_entropy(self) -> float:
        """Return the exact entropy of a document, its length included, in bits."""
        tosses = (-STOP * math.log2(STOP) - (1 - STOP) * math.log2(1 - STOP)) / STOP
        return self.mean_sentences * self.entropy() + tosses

    def entropy_per_byte(self) -> float:
        """Return the bits per byte that the best possible model needs on many documents."""
        letters = self.grammar.mean_characters("Sentence") - 2  # no blank before the first word and the full stop
        return self.document_entropy() / (self.mean_sentences * (letters + 1) - 1)

    @property
    def mean_sentences(self) -> float:
        """The expected sentences of a document."""
        return LEAST + (1 - STOP) / STOP

    def bits(self, sentence: str) -> float:
        """Return -log2 of the exact probability of a sentence; InputError if it is not one."""
        probability, _ = self.grammar.inside("Sentence", [*sentence[:-1].split(" "), sentence[-1:]])
        if not probability:
            raise InputError(f"this is not a sentence of {self.name}", found=sentence[:200])
        return -math.log2(probability)

    def document_bits(self, text: str) -> float:
        """Return -log2 of the exact probability of a document, its end included."""
        lines = text.split("\n")
        if len(lines) < LEAST:
            raise InputError(f"a document of {self.name} has at least {LEAST} sentences", found=text[:200])
        return sum(map(self.bits, lines)) - (len(lines) - LEAST) * math.log2(1 - STOP) - math.log2(STOP)

    def sentence(self, uniform: Uniform) -> Sentence:
        """Draw a sentence with its English and its labels."""
        return self.label(self.grammar.sample("Sentence", uniform))

    def label(self, tree: Tree) -> Sentence:
        """Return the sentence of a derivation with all that the derivation says about it."""
        *words, stop = tree.words
        tags = ["O"] * len(words)
        for start, node in tree.spans():
            if node.rule.tag in ENTITIES:
                tags[start] = f"B-{node.rule.tag}"
                tags[start + 1 : start + len(node.words)] = [f"I-{node.rule.tag}"] * (len(node.words) - 1)
        mood = next(node.symbol[-1] for node in tree.children[0].children if node.symbol.startswith(("Deed", "Do")))
        negated = words[-1] == self.lexicon.particles["end"]
        return Sentence(
            text=" ".join(words) + stop,
            english=capitalise(str(tree.english())),
            words=tuple(words),
            tags=tuple(tags),
            polarity="positive" if (mood == "+") != negated else "negative",
            is_question=stop == "?",
            questions=() if stop == "?" else tuple(self.ask(tree)),
        )

    def ask(self, tree: Tree) -> Iterator[Question]:
        """Yield a question for each phrase that a statement could be asked about, in the statement's own order."""
        *words, _ = tree.words
        particles = self.lexicon.particles
        asked = set()
        for start, node in tree.spans():
            word = ASKING.get(node.rule.tag)
            if word is None or node.rule.tag in asked:
                continue
            asked.add(node.rule.tag)
            end = start + len(node.words) - (node.rule.tag != "place")  # the case particle is not part of the answer
            text = " ".join([particles["question"], *words[:start], particles["who"], *words[end:]]) + "?"
            english = capitalise(str(tree.english(node, word))[:-1] + "?")
            first = len(" ".join(words[:start])) + (start > 0)
            answer = " ".join(words[start:end])
            yield Question(text, english, answer, first, first + len(answer))

    def document(self, uniform: Uniform) -> list[Tree]:
        """Draw the derivations of a document's sentences; `label` explains each."""
        trees = [self.grammar.sample("Sentence", uniform) for _ in range(LEAST)]
        while uniform.draw() >= STOP:
            trees.append(self.grammar.sample("Sentence", uniform))
        return trees


def make_documents(
    n_documents: int | None = None, *, n_bytes: int | None = None, seed: int = 0, language: Language | None = None
) -> list[Document]:
    """Return that many documents, or so many that they have at least `n_bytes` bytes; each sentence is a line."""
    if (n_documents is None) == (n_bytes is None):
        raise InputError("say how much text to make", expected="n_documents or n_bytes")
    language = language or Language()
    uniform = Uniform(seed)
    documents: list[Document] = []
    size = 0
    while len(documents) < n_documents if n_documents is not None else size < (n_bytes or 0):
        lines = [tree.words for tree in language.document(uniform)]
        text = "\n".join(" ".join(words) + stop for *words, stop in lines)
        documents.append(Document(f"{language.name}-{len(documents) + 1}", text))
        size += len(text)
    return documents


def capitalise(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
