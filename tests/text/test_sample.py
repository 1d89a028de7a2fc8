"""The built-in language: its exact entropy, what a 5-gram and a bag of words miss, and its labels."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lmworks.base.errors import InputError
from lmworks.models.ngram import NgramModel
from lmworks.text.clean import clean
from lmworks.text.grammar import Tree, Uniform
from lmworks.text.lexicon import BAD, GOOD, ILL, WELL
from lmworks.text.sample import ENTITIES, Language, Sentence, make_documents
from lmworks.text.split import split_documents
from lmworks.tokens.batch import make_stream
from lmworks.tokens.train import train_tokenizer

SHA256 = "ff447b78a1e1a18ce38dc6f2c6eef609f036658db6348918919c4e4fbc93d8a5"


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


@pytest.fixture(scope="module")
def trees(language: Language) -> list[Tree]:
    uniform = Uniform(11)
    return [language.grammar.sample("Sentence", uniform) for _ in range(3000)]


@pytest.fixture(scope="module")
def sentences(language: Language, trees: list[Tree]) -> list[Sentence]:
    return [language.label(tree) for tree in trees]


def test_the_text_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from lmworks.text.sample import make_documents as m;"
        "print(hashlib.sha256('|'.join(d.text for d in m(50, seed=3)).encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert run.stdout.strip() == SHA256
    here = "|".join(d.text for d in make_documents(50, seed=3))
    assert hashlib.sha256(here.encode()).hexdigest() == SHA256
    assert "|".join(d.text for d in make_documents(50, seed=4)) != here
    assert make_documents(5, language=Language(1))[0].text.split()[0] not in here.split()


def test_no_sentence_has_two_derivations(language: Language, sentences: list[Sentence]) -> None:
    for sentence in sentences[:1500]:
        _, ways = language.grammar.inside("Sentence", [*sentence.words, sentence.text[-1]])
        assert ways == 1, sentence.text


@pytest.mark.parametrize("seed", [0, 1])
def test_the_entropy_is_that_of_the_texts(seed: int) -> None:
    """Monte Carlo: the mean of -log2 p over independent sentences, within three standard errors."""
    language, uniform = Language(seed), Uniform(5)
    trees = [language.grammar.sample("Sentence", uniform) for _ in range(2500)]
    bits = np.array([language.bits(language.label(tree).text) for tree in trees])
    error = bits.std() / math.sqrt(len(bits))
    assert error < 0.3
    assert abs(bits.mean() - language.entropy()) < 3 * error


def test_the_probability_of_a_sentence_is_that_of_its_choices(language: Language, trees: list[Tree]) -> None:
    def chosen(tree: Tree) -> float:
        options = language.grammar.rules[tree.symbol]
        return language.grammar.chances[tree.symbol][options.index(tree.rule)] * math.prod(map(chosen, tree.children))

    for tree in trees[:300]:
        assert language.bits(language.label(tree).text) == pytest.approx(-math.log2(chosen(tree)))


def test_documents(language: Language) -> None:
    documents = make_documents(600, seed=1)
    bits = np.array([language.document_bits(d.text) for d in documents])
    assert abs(bits.mean() - language.document_entropy()) < 3 * bits.std() / math.sqrt(len(bits))
    per_byte = bits.sum() / sum(len(d.text) for d in documents)
    assert per_byte == pytest.approx(language.entropy_per_byte(), rel=0.01)
    lines = documents[0].text.split("\n")
    ends = -math.log2(0.2) - (len(lines) - 2) * math.log2(0.8)
    assert bits[0] == pytest.approx(sum(map(language.bits, lines)) + ends)
    assert {d.text.count("\n") + 1 for d in documents} >= set(range(2, 12))
    assert all(clean(d.text) == d.text for d in documents)  # cleaning leaves it alone, so the floor stays exact
    assert sum(len(d.text) for d in make_documents(n_bytes=20_000)) >= 20_000


def test_sentences_have_5_to_25_words(language: Language, sentences: list[Sentence]) -> None:
    shortest, longest = language.grammar.lengths["Sentence"]
    assert (shortest - 1, longest - 1) == (5, 23)  # without the full stop
    assert {len(s.words) for s in sentences} >= set(range(5, 20))


def test_what_is_not_in_the_language_is_refused(language: Language, sentences: list[Sentence]) -> None:
    text = sentences[0].text
    for wrong in ("", ".", text[:-1], text + " ", text.replace(" ", "  ", 1), "hello.", text[:-1] + "!"):
        with pytest.raises(InputError, match="not a sentence"):
            language.bits(wrong)
    with pytest.raises(InputError, match="at least 2"):
        language.document_bits(text)
    with pytest.raises(InputError, match="how much text"):
        make_documents()


def test_agreement_reaches_over_more_than_five_words(language: Language, trees: list[Tree]) -> None:
    """The verb's ending is that of its agent's class, which only the noun tells."""
    distances = []
    for tree in trees:
        (clause,) = tree.children
        nodes = {node.symbol.split(".")[0]: (start, node) for start, node in reversed(list(clause.spans()))}
        at, agent = nodes["Full"] if "Full" in nodes else nodes["Subject"]
        deed = next(node for node in clause.children if node.symbol.startswith(("Deed", "Do")))
        verb = next((start, n) for start, n in clause.spans() if n.symbol.startswith(("Do", "Act")) and within(n, deed))
        assert verb[1].symbol.split(".")[1] == agent.symbol.split(".")[1]
        ending = verb[1].words[0][-2:]
        assert ending == language.lexicon.rules[f"Poss.{agent.symbol.split('.')[1]}"][0].parts[0][-2:]
        distances.append(verb[0] - at)
    assert np.mean(np.array(distances) > 5) > 0.35
    assert max(distances) > 12


def within(node: Tree, above: Tree) -> bool:
    return node is above or any(within(node, child) for child in above.children)


def test_a_wrong_ending_anywhere_is_no_sentence(language: Language, sentences: list[Sentence]) -> None:
    endings = {rule.parts[0][-2:] for c in range(8) for rule in language.lexicon.rules[f"Mark.{c}"]}
    verbs = {
        w for s, rules in language.lexicon.rules.items() if s.startswith(("Do", "Act")) for r in rules for w in r.parts
    }
    seen = 0
    for sentence in sentences[:200]:
        for i, word in enumerate(sentence.words):
            if word in verbs:
                other = next(e for e in sorted(endings) if e != word[-2:])
                words = [*sentence.words[:i], word[:-2] + other, *sentence.words[i + 1 :], sentence.text[-1]]
                assert language.grammar.inside("Sentence", words) == (0.0, 0)
                seen += 1
    assert seen > 200


def test_case_decides_who_did_it(language: Language) -> None:
    """Two nouns of one class: the same words, the other way round, are a sentence too, and mean the opposite."""
    w, rules = language.lexicon.particles, language.lexicon.rules
    one, two = (rule.parts[0] for rule in rules["Animal.0"])
    verb, mark = rules["Do.0.+"][0].parts[0], rules["Mark.0"][0].parts[0]
    for a, b in ((w["agent"], w["object"]), (w["object"], w["agent"])):
        assert language.bits(f"{one} {a} {two} {b} {verb} {mark}.") < 40


def test_a_five_gram_falls_short(language: Language) -> None:
    """On what the demo trains on: byte pairs of 1.2 MB, nine tenths of it for training."""
    train, held_out = split_documents(make_documents(n_bytes=1_200_000))
    floor = sum(language.document_bits(d.text) for d in held_out)
    texts, test = [d.text for d in train], [d.text for d in held_out]
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    words: dict[str, int] = {}
    by_word = [np.array([0] + [i for t in part for i in word_ids(t, words)]) for part in (texts, test)]
    by_piece = [make_stream(tokenizer, part) for part in (texts, test)]
    for (seen, unseen), size in ((by_piece, tokenizer.vocab_size), (by_word, len(words) + 1)):
        model = NgramModel.train(seen, order=5, vocab_size=size, eos_id=0)
        bits = -model.logprobs(unseen).sum() / math.log(2)
        assert bits > 1.4 * floor


def word_ids(text: str, words: dict[str, int]) -> list[int]:
    spaced = text.replace("\n", " \n ").replace(".", " .").replace("?", " ?").split(" ")
    return [*(words.setdefault(word, len(words) + 1) for word in spaced), 0]


def test_a_bag_of_words_misses_the_polarity(sentences: list[Sentence]) -> None:
    """Linear regression on word counts: negation flips the sign of every verb, and relative clauses mislead."""
    index = {word: i for i, word in enumerate(sorted({w for s in sentences for w in s.words}))}
    counts = np.zeros((len(sentences), len(index) + 1))
    counts[:, -1] = 1
    for row, sentence in zip(counts, sentences, strict=True):
        for word in sentence.words:
            row[index[word]] += 1
    positive = np.array([s.polarity == "positive" for s in sentences])
    seen, unseen = counts[:2000], counts[2000:]
    ridge = seen.T @ seen + 3 * np.eye(counts.shape[1])
    weights = np.linalg.solve(ridge, seen.T @ (2.0 * positive[:2000] - 1))
    accuracy = np.mean((unseen @ weights > 0) == positive[2000:])
    assert 0.6 < accuracy < 0.8
    assert 0.4 < positive.mean() < 0.6


def test_polarity_follows_the_english(sentences: list[Sentence]) -> None:
    """Where there is no relative clause, the English verbs alone decide, turned round by "not"."""
    deeds = [
        {form for pair in words.split() for form in pair.split("/")} for words in (f"{GOOD} {WELL}", f"{BAD} {ILL}")
    ]
    seen = Counter[str]()
    for sentence in sentences:
        words = sentence.english.strip(".?").split()
        if not {"who", "whom"} & set(words):
            good, bad = (bool(set(words) & forms) for forms in deeds)
            assert good != bad, sentence.english
            assert sentence.polarity == ("positive" if good != ("not" in words) else "negative")
            seen[sentence.polarity] += 1
            assert sentence.is_question == sentence.english.startswith("Did")
    assert min(seen.values()) > 800


def test_tags(sentences: list[Sentence]) -> None:
    seen = Counter(tag for sentence in sentences for tag in sentence.tags)
    assert set(seen) == {"O", *(f"B-{e}" for e in ENTITIES), "I-person"}
    assert min(seen.values()) > 100
    for sentence in sentences:
        assert len(sentence.tags) == len(sentence.words)
        names = [
            w.capitalize() for w, t in zip(sentence.words, sentence.tags, strict=True) if t[2:] in ("person", "place")
        ]
        english = sentence.english[0].lower() + sentence.english[1:]
        said = [word.strip(".?") for word in sentence.english.split()]
        assert Counter(names) <= Counter(said)
        capitals = [word.strip(".?") for word in english.split()[1:] if word[0].isupper()]
        assert Counter(capitals) <= Counter(names)


def test_questions_and_answers(language: Language, sentences: list[Sentence]) -> None:
    asked = Counter[str]()
    who, opening = language.lexicon.particles["who"], language.lexicon.particles["question"]
    for sentence in sentences:
        assert bool(sentence.questions) != sentence.is_question
        for question in sentence.questions:
            assert sentence.text[question.start : question.end] == question.answer
            assert question.text.startswith(f"{opening} ") and question.text.endswith("?")
            assert question.text.split().count(who) == 1
            assert question.answer.split()[-1] not in language.lexicon.particles.values()  # its case is not asked
            back = question.text[len(opening) : -1].replace(f" {who} ", f" {question.answer} ", 1) + "."
            assert back.split() == sentence.text.split()
            asked[next(w for w in ("what", "which", "who") if w in question.english.lower())] += 1
    assert set(asked) == {"who", "what", "which"}
    (example,) = [q for s in sentences for q in s.questions if s.text == sentences[0].text][:1]
    assert example.english[0].isupper()


def test_english(sentences: list[Sentence]) -> None:
    texts = {s.text: s.english for s in sentences}
    english = Counter(texts.values())
    assert english.most_common(1)[0][1] <= 2  # word order and case may differ, the translation not by chance
    assert all("{" not in e and "  " not in e and e[0].isupper() and e[-1] in ".?" for e in english)
    assert any(" who did not " in e for e in english) and any(" whom " in e for e in english)
    assert any(" and " in e for e in english) and any(" or " in e for e in english)
