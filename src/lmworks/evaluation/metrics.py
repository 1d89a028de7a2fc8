"""How good a model's answers are, by task: the numbers that papers report.

    accuracy               share of examples whose answer is the reference (of several labels: all of them)
    precision, recall, f1  tp / predicted, tp / actual, and their harmonic mean; 0 for what was never predicted or never
                           there. Of classes: the plain mean over those that occur in predictions or references (macro);
                           of names in a text: over all entities (micro), an entity being right if its kind, begin and
                           end are
    exact_match, f1        of answers: the rule of SQuAD (Rajpurkar et al., 2016 and 2018), the best over the references
    mse, pearson, spearman of numbers
    recall_at_1, mrr       of ranks of what should be nearest (`lmworks.evaluation.retrieval`)

Everything but mse lies between 0 and 1 (correlations: −1 and 1); the SQuAD scripts print per cents.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.types import Ints
from lmworks.evaluation.retrieval import score_ranks

Float64 = NDArray[np.float64]
Span = tuple[str, int, int]  # kind, first and last word
ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
PREFIX = re.compile(r"([BIES])(?:-(.*))?|([LU])-(.*)", re.DOTALL)
LAST_AND_UNIT = {"L": "E", "U": "S"}  # BILOU's names


@dataclass(frozen=True)
class ClassScores:
    """Counts by class, and the three scores that follow from them; arrays (C,)."""

    names: tuple[str, ...]
    correct: Ints  # true positives
    predicted: Ints
    actual: Ints  # support

    @property
    def precision(self) -> Float64:
        """Share of what was predicted that is right."""
        return divide(self.correct, self.predicted)

    @property
    def recall(self) -> Float64:
        """Share of what is there that was found."""
        return divide(self.correct, self.actual)

    @property
    def f1(self) -> Float64:
        """Harmonic mean of the two, 2 tp / (predicted + actual)."""
        return divide(2 * self.correct, self.predicted + self.actual)

    def macro(self) -> dict[str, float]:
        """Return the plain means over the classes that occur."""
        occur = (self.predicted + self.actual) > 0
        scores = {"f1": self.f1, "precision": self.precision, "recall": self.recall}
        return {name: float(values[occur].mean()) if occur.any() else 0.0 for name, values in scores.items()}

    def micro(self) -> dict[str, float]:
        """Return the scores over all classes together."""
        total = ClassScores(("all",), *(np.array([c.sum()]) for c in (self.correct, self.predicted, self.actual)))
        return {"f1": float(total.f1[0]), "precision": float(total.precision[0]), "recall": float(total.recall[0])}

    def table(self) -> list[dict[str, Any]]:
        """Return a row a class: label, precision, recall, f1, support."""
        columns = zip(self.names, self.precision, self.recall, self.f1, self.actual, strict=True)
        return [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in columns
        ]


def score(
    task: str, predictions: Sequence[Any], references: Sequence[Any], *, labels: Sequence[str] = ()
) -> dict[str, float]:
    """Return the task's metrics by name.

    Predictions and references by task: a label, a tuple of labels or a number for "text-classification" (and
    "image-classification"); a sequence of tags, one a word, for "token-classification"; for "question-answering" a text
    ("" for no answer) and a tuple of (text, start); for "feature-extraction" a rank and (), a cosine and a number, or
    the nearest text's label and a label. `labels`: those of the model; with them an unknown one is an error.
    Raises InputError for predictions that do not match the references.
    """
    if task not in SCORES:
        raise InputError(
            "no metrics for this task", found=f"{task!r}{did_you_mean(task, SCORES)}", expected=", ".join(SCORES)
        )
    check(predictions, references)
    known = set(labels)  # of thousands a tuple is slow to search
    for label in tags_of(references) if labels and task != "question-answering" else ():
        if label not in known:
            raise InputError(
                f'the label "{label}" is not one of the model\'s',
                expected=", ".join(list(labels)[:10]),
                fix=f"correct the data;{did_you_mean(label, labels)}".rstrip(";"),
            )
    return SCORES[task](predictions, references)


def check(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise InputError unless there is one prediction a reference, and at least one."""
    if len(predictions) != len(references) or not len(references):
        raise InputError(
            "there must be one prediction for each reference, and at least one",
            found=f"{len(predictions)} predictions, {len(references)} references",
        )


def divide(a: Ints, b: Ints) -> Float64:
    """Return a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def tags_of(references: Iterable[Any]) -> Iterator[str]:
    """Yield every label of references that are labels or sequences of labels; numbers have none."""
    for reference in references:
        if not isinstance(reference, float):
            yield from (reference,) if isinstance(reference, str) else reference


def class_scores(predictions: Sequence[Any], references: Sequence[Any], *, labels: Sequence[str] = ()) -> ClassScores:
    """Count by class; an example has a label or a collection of labels. `labels` come first, in their order."""
    check(predictions, references)
    return count(as_sets(predictions), as_sets(references), labels)


def as_sets(values: Iterable[Any]) -> list[set[Any]]:
    """Return each label, or collection of labels, as a set."""
    return [{value} if isinstance(value, str) else set(value) for value in values]


def count(
    predicted: Sequence[set[Any]],
    actual: Sequence[set[Any]],
    labels: Sequence[str] = (),
    *,
    kind: Callable[[Any], str] = str,
) -> ClassScores:
    """Count how many things of each kind were predicted, are there, and both."""
    sets = [(p & a, p, a) for p, a in zip(predicted, actual, strict=True)]
    correct, guessed, present = (Counter(kind(one) for row in sets for one in row[i]) for i in range(3))
    names = (*labels, *sorted({*guessed, *present} - set(labels)))
    return ClassScores(names, *(np.array([c[name] for name in names], np.int64) for c in (correct, guessed, present)))


def confusion(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Ints:
    """Return how often class i was taken for class j, (C, C), in the order of `labels`, which must hold them all."""
    check(predictions, references)
    place = {label: i for i, label in enumerate(labels)}
    strange = next((label for label in (*references, *predictions) if label not in place), None)
    if strange is not None:
        raise InputError(f'"{strange}" is not among the labels', expected=", ".join(labels))
    counts = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(counts, ([place[r] for r in references], [place[p] for p in predictions]), 1)
    return counts


def score_classes(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Return accuracy and macro scores of one label an example; of several the micro scores too; of numbers, errors."""
    if not isinstance(references[0], str) and np.ndim(references[0]) == 0:
        return score_numbers(predictions, references)
    predicted, actual = as_sets(predictions), as_sets(references)
    counts = count(predicted, actual)
    accuracy = sum(p == a for p, a in zip(predicted, actual, strict=True)) / len(actual)
    several = {f"micro_{name}": value for name, value in counts.micro().items()}
    return {"accuracy": accuracy, **counts.macro(), **({} if isinstance(references[0], str) else several)}


def score_numbers(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Return mse, pearson and spearman; a correlation with something constant is 0."""
    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)  # (N,)
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("these numbers cannot be compared", found=f"shapes {x.shape} and {y.shape}, or not finite")
    return {"mse": float(np.mean((x - y) ** 2)), "pearson": pearson(x, y), "spearman": pearson(ranks(x), ranks(y))}


def pearson(x: Float64, y: Float64) -> float:
    """Return the linear correlation of two series (N,); 0 where one of them is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def ranks(x: Float64) -> Float64:
    """Return the ranks (N,) of numbers from 1 on; equal ones share the mean of their ranks."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    mean: Float64 = (np.cumsum(counts) - (counts - 1) / 2)[group]
    return mean


def score_tags(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of words with the right tag, and the scores of the entities.

    Tags that name no entities (no "O", no "B-"; parts of speech, say) are classes of words: their scores are macro.
    """
    pairs = list(zip(predictions, references, strict=True))
    wrong = next((i for i, (p, r) in enumerate(pairs, 1) if len(p) != len(r)), None)
    if wrong is not None or not any(references):
        raise InputError(
            "there must be one tag for each word" if wrong else "there are no words",
            where=f"sentence {wrong}" if wrong else "",
            found=f"{len(predictions[wrong - 1])} predicted, {len(references[wrong - 1])} in the data" if wrong else "",
        )
    guessed, actual = [t for p, _ in pairs for t in p], [t for _, r in pairs for t in r]
    accuracy = {"accuracy": sum(p == r for p, r in zip(guessed, actual, strict=True)) / len(actual)}
    if not any(tag == "O" or tag[1:2] == "-" for tag in actual):
        return {**accuracy, **class_scores(guessed, actual).macro()}
    return {**accuracy, **entity_scores(predictions, references).micro()}


def entity_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> ClassScores:
    """Count entities by kind; `micro()` is seqeval's default, which is conlleval's (Tjong Kim Sang, 2002)."""
    check(predictions, references)
    predicted, actual = ([set(entities(tags)) for tags in rows] for rows in (predictions, references))
    return count(predicted, actual, kind=lambda span: str(span[0]))


def entities(tags: Sequence[str]) -> list[Span]:
    """Return the entities (kind, first word, last word) of BIO, IO, BIOES or BILOU tags, as conlleval reads them.

    An entity begins at B and S, at any tag after O, E or S, and where the kind changes: a stray "I-" begins one. It
    ends before B, S and O, after E and S, and where the kind changes. A tag without a prefix counts as "I-".

    ["I-PER", "B-PER", "O", "I-LOC"] -> [("PER", 0, 0), ("PER", 1, 1), ("LOC", 3, 3)]
    """
    found: list[Span] = []
    before, kind_before, begin = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        match = PREFIX.fullmatch(tag)
        at, kind = ("O", "") if tag == "O" else ("I", tag)
        if match:
            at, kind = match[1] or LAST_AND_UNIT[match[3]], match[2] or match[4] or "_"
        cut = at in "BSO" or before in "OES" or kind != kind_before
        if cut and before != "O":
            found.append((kind_before, begin, i - 1))
        if cut:
            begin = i
        before, kind_before = at, kind
    return found


def normalize_answer(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation and articles, single blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[tuple[str, int]]]) -> dict[str, float]:
    """Return exact_match and f1 by SQuAD's rule: of version 2 where a question has no answer, else of version 1.1."""
    version_2 = not all(references)
    scores = np.array(
        [best_match(p, [text for text, _ in r], version_2) for p, r in zip(predictions, references, strict=True)]
    )
    return {"exact_match": float(scores[:, 0].mean()), "f1": float(scores[:, 1].mean())}


def best_match(prediction: str, answers: Sequence[str], version_2: bool) -> tuple[float, float]:
    """Return the best (exact match, f1) of a prediction over the answers.

    Version 2 leaves out answers that are nothing but articles and punctuation, and where none is left "" is right;
    version 1.1 gives two empty texts an f1 of 0.
    """
    guess = normalize_answer(prediction)
    truths = [normalize_answer(answer) for answer in answers]
    if version_2:
        truths = [truth for truth in truths if truth] or [""]
    return max(float(guess == t) for t in truths), max(word_f1(guess, t, float(version_2)) for t in truths)


def word_f1(guess: str, truth: str, both_empty: float) -> float:
    """Return the F1 of the words that two normalized answers share, each as often as both have it."""
    words, expected = guess.split(), truth.split()
    if not words and not expected:
        return both_empty
    return 2 * (Counter(words) & Counter(expected)).total() / (len(words) + len(expected))


def score_similar(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Score cosines against numbers, nearest labels against labels, and ranks of partners, whose reference is ()."""
    if references[0] == ():
        return score_ranks(predictions)
    return score_classes(predictions, references)


SCORES: dict[str, Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]] = {
    "text-classification": score_classes,
    "image-classification": score_classes,
    "token-classification": score_tags,
    "question-answering": score_answers,
    "feature-extraction": score_similar,
}
