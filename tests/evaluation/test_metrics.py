"""Metrics against scikit-learn, seqeval, scipy and a plain reading of the SQuAD rule, and what cannot be scored."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import seqeval.scheme
import sklearn.metrics
from sklearn.preprocessing import MultiLabelBinarizer

from lmworks.base.errors import InputError
from lmworks.evaluation.metrics import class_scores, confusion, entities, entity_scores, normalize_answer, score
from lmworks.text.labelled import read_labelled

CLASSES = ["World", "Sports", "Business", "Sci/Tech", "never"]


def draw(seed: int, count: int = 60) -> tuple[list[str], list[str]]:
    """Return predictions and references; some classes occur in only one of them, one in neither."""
    rng = random.Random(seed)
    return rng.choices(CLASSES[: 2 + seed % 3], k=count), rng.choices(CLASSES[seed % 2 : 4], k=count)


@pytest.mark.parametrize("seed", range(6))
def test_classes_as_scikit_learn_counts_them(seed: int) -> None:
    predictions, references = draw(seed)
    ours = score("text-classification", predictions, references, labels=CLASSES)
    p, r, f, _ = sklearn.metrics.precision_recall_fscore_support(
        references, predictions, average="macro", zero_division=0
    )
    accuracy = sklearn.metrics.accuracy_score(references, predictions)
    assert ours == pytest.approx({"accuracy": accuracy, "f1": f, "precision": p, "recall": r}, abs=1e-12)
    assert score("image-classification", predictions, references) == ours
    absent = class_scores(predictions, references, labels=CLASSES).macro()  # a class that never occurs lowers no mean
    assert absent == pytest.approx({"f1": f, "precision": p, "recall": r}, abs=1e-12)

    table = class_scores(predictions, references, labels=CLASSES).table()
    columns = sklearn.metrics.precision_recall_fscore_support(
        references, predictions, labels=CLASSES, average=None, zero_division=0
    )
    assert [row["label"] for row in table] == CLASSES
    for name, theirs in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in table] == pytest.approx(list(theirs), abs=1e-12)
    theirs = sklearn.metrics.confusion_matrix(references, predictions, labels=CLASSES)
    assert confusion(predictions, references, CLASSES).tolist() == theirs.tolist()
    micro = sklearn.metrics.precision_recall_fscore_support(references, predictions, average="micro", zero_division=0)
    assert class_scores(predictions, references).micro() == pytest.approx(
        {"precision": micro[0], "recall": micro[1], "f1": micro[2]}, abs=1e-12
    )


@pytest.mark.parametrize("seed", range(4))
def test_several_labels_as_scikit_learn_counts_them(seed: int) -> None:
    rng = random.Random(seed)
    references = [tuple(rng.sample(CLASSES[:3], rng.randrange(4))) for _ in range(40)]
    predictions = [tuple(rng.sample(CLASSES[:4], rng.randrange(3))) for _ in range(40)]
    predictions[0] = references[0] = ("World", "Sports")
    predictions[1], references[1] = ("Sports", "World"), ("World", "Sports")  # a set has no order
    ours = score("text-classification", predictions, references)
    binary = MultiLabelBinarizer().fit(predictions + references)
    x, y = binary.transform(predictions), binary.transform(references)
    expected = {"accuracy": sklearn.metrics.accuracy_score(y, x)}
    for average, prefix in (("macro", ""), ("micro", "micro_")):
        p, r, f, _ = sklearn.metrics.precision_recall_fscore_support(y, x, average=average, zero_division=0)
        expected |= {f"{prefix}precision": p, f"{prefix}recall": r, f"{prefix}f1": f}
    assert ours == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheme", ["BIO", "IO", "BIOES", "bare prefixes"])
@pytest.mark.parametrize("seed", range(8))
def test_entities_as_seqeval_counts_them(scheme: str, seed: int) -> None:
    rng = random.Random(seed)
    prefixes = {"IO": "I", "BIO": "BI"}.get(scheme, "BIES")
    tags = ["O", *(f"{p}-{kind}" for p in prefixes for kind in ("person", "creative-work"))]
    tags += list("BIES") if scheme == "bare prefixes" else []  # any order of them: most are no legal sequence
    references = [rng.choices(tags, k=rng.randrange(1, 12)) for _ in range(60)]
    predictions = [[t if rng.random() < 0.7 else rng.choice(tags) for t in row] for row in references]
    ours = score("token-classification", predictions, references)
    assert ours == pytest.approx(
        {
            "accuracy": seqeval.metrics.accuracy_score(references, predictions),
            "f1": seqeval.metrics.f1_score(references, predictions),
            "precision": seqeval.metrics.precision_score(references, predictions),
            "recall": seqeval.metrics.recall_score(references, predictions),
        },
        abs=1e-12,
    )
    report = seqeval.metrics.classification_report(references, predictions, output_dict=True, zero_division=0)
    for row in entity_scores(predictions, references).table():
        theirs = report[row["label"]]
        assert (row["precision"], row["recall"], row["f1"], row["support"]) == pytest.approx(
            (theirs["precision"], theirs["recall"], theirs["f1-score"], theirs["support"])
        )


def test_bilou_as_seqeval_counts_it() -> None:
    """Last and unit tags end an entity as BIOES' E and S do; a kind that is called so is left alone."""
    rng = random.Random(0)
    words = ["O", "U-LOC", "U-PER", "B-PER L-PER", "B-LOC I-LOC L-LOC", "B-LOC L-LOC"]
    references = [" ".join(rng.choices(words, k=rng.randrange(1, 8))).split() for _ in range(60)]
    predictions = [[t if rng.random() < 0.9 else "O" for t in row] for row in references]
    assert entities(["B-LOC", "L-LOC", "U-LOC", "U-PER"]) == [("LOC", 0, 1), ("LOC", 2, 2), ("PER", 3, 3)]
    assert entities(["L", "L", "U"]) == [("L", 0, 1), ("U", 2, 2)]
    legal = [tags for tags in references if tags]
    theirs = seqeval.scheme.Entities(legal, seqeval.scheme.BILOU).entities
    for tags, found in zip(legal, theirs, strict=True):
        assert entities(tags) == [(one.tag, one.start, one.end - 1) for one in found]
    same = [[{"L": "E", "U": "S"}.get(t[0], t[0]) + t[1:] for t in row] for row in predictions]
    gold = [[{"L": "E", "U": "S"}.get(t[0], t[0]) + t[1:] for t in row] for row in references]
    ours = score("token-classification", predictions, references)
    assert 0.5 < ours["f1"] < 1 and ours["f1"] == pytest.approx(seqeval.metrics.f1_score(gold, same), abs=1e-12)


def test_wnut_as_seqeval_counts_it(data_folder: Path) -> None:
    data = read_labelled(data_folder / "wnut17" / "test.conll", "token-classification")
    rng = random.Random(0)
    predictions = [[t if rng.random() < 0.8 else rng.choice(data.labels) for t in row] for row in data.references]
    ours = score("token-classification", predictions, data.references, labels=data.labels)
    references = [list(row) for row in data.references]
    assert ours["f1"] == pytest.approx(seqeval.metrics.f1_score(references, predictions), abs=1e-12)
    assert 0.05 < ours["f1"] < 0.95
    assert sum(row["support"] for row in entity_scores(predictions, references).table()) == 1079
    assert score("token-classification", references, references)["f1"] == 1


def test_entities_of_sentences_do_not_join_and_bare_kinds_count_as_inside() -> None:
    assert entities(["I-PER", "B-PER", "O", "I-LOC"]) == [("PER", 0, 0), ("PER", 1, 1), ("LOC", 3, 3)]
    assert entities(["person", "person", "place", "O", "person"]) == [
        ("person", 0, 1),
        ("place", 2, 2),
        ("person", 4, 4),
    ]
    assert entity_scores([["B-X"], ["I-X"]], [["B-X"], ["I-X"]]).actual.tolist() == [2]


def test_parts_of_speech_are_classes_of_words() -> None:
    references = [["NOUN", "VERB"], ["DET", "NOUN", "VERB"]]
    predictions = [["NOUN", "NOUN"], ["DET", "NOUN", "VERB"]]
    flat = [tag for row in references for tag in row], [tag for row in predictions for tag in row]
    ours = score("token-classification", predictions, references)
    assert ours["f1"] == pytest.approx(sklearn.metrics.f1_score(*flat, average="macro"))
    assert ours["accuracy"] == 0.8


# The published rule, read plainly: Rajpurkar et al. 2016, section 6.1, and the two evaluation scripts' semantics.
def squad(prediction: str, golds: list[str], version: int) -> tuple[float, float]:
    def plain(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        words, word = [], ""
        for c in text + " ":  # \\b of the articles lies between word characters and others
            if c.isalnum() or c == "_":
                word += c
                continue
            words += [" " if word in ("a", "an", "the") else word, c]
            word = ""
        return "".join(words).split()

    if version == 2:
        golds = [g for g in golds if plain(g)] or [""]
    em = f1 = 0.0
    for gold in golds:
        p, g = plain(prediction), plain(gold)
        em = max(em, float(p == g))
        if not p or not g:
            f1 = max(f1, float(p == g) if version == 2 else 0.0)
            continue
        same = sum((Counter(p) & Counter(g)).values())
        if same:
            precision, recall = same / len(p), same / len(g)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return em, f1


CASES = [
    ("Denver Broncos", ["the Denver Broncos", "Broncos"], 1, 1),
    ("the  Broncos!", ["Denver Broncos"], 0, 2 / 3),
    ("Carolina Panthers", ["Denver Broncos"], 0, 0),
    ("a the an", ["The A"], 1, 0),  # version 1.1: nothing is left of either
    ("theatre", ["atre"], 0, 0),
    ("1,000-year", ["1000year"], 1, 1),
    ("buffalo buffalo", ["buffalo"], 0, 2 / 3),
    ("6½ sacks", ["6½"], 0, 2 / 3),
    ("“Denver”", ["Denver"], 0, 0),  # only ASCII punctuation goes
    ("more—the—less", ["more— —less"], 1, 1),  # an article leaves a blank
    ("la Géorgie — a state", ["la géorgie — state"], 1, 1),
]


@pytest.mark.parametrize(("prediction", "golds", "em", "f1"), CASES)
def test_answers_by_the_rule_of_squad(prediction: str, golds: list[str], em: float, f1: float) -> None:
    ours = score("question-answering", [prediction], [tuple((gold, 0) for gold in golds)])
    assert ours == pytest.approx({"exact_match": em, "f1": f1})
    assert squad(prediction, golds, 1) == pytest.approx((em, f1))


def test_squad_2_scores_the_questions_without_an_answer() -> None:
    none: tuple[tuple[str, int], ...] = ()
    ours = score("question-answering", ["", "the", "Normandy", "x"], [none, none, none, (("x y", 0), ("the", 3))])
    assert ours == pytest.approx({"exact_match": 0.5, "f1": (1 + 1 + 0 + 2 / 3) / 4})


@pytest.mark.parametrize("language", ["en", "de", "zh"])
@pytest.mark.parametrize("version", [1, 2])
def test_xquad_against_a_plain_reading_of_the_rule(language: str, version: int, data_folder: Path) -> None:
    data = read_labelled(data_folder / "xquad" / f"xquad.{language}.json", "question-answering")
    rng = random.Random(0)
    predictions, references = [], []
    for (_, context), answers in zip(data.examples, data.references, strict=True):
        (text, start), cut = answers[0], rng.randrange(-3, 9)
        predictions.append(
            rng.choice([text, context[max(0, start - cut) : start + len(text) + cut], "", "The " + text])
        )
        references.append(() if version == 2 and rng.random() < 0.3 else (*answers, ("the", 0)))
    ours = score("question-answering", predictions, references)
    theirs = [squad(p, [t for t, _ in r], version) for p, r in zip(predictions, references, strict=True)]
    em, f1 = np.mean(theirs, axis=0)
    assert ours == pytest.approx({"exact_match": em, "f1": f1}, abs=1e-12)
    assert 0.1 < em < 0.95 and 0.1 < f1 < 0.95


def test_normalization_of_published_examples() -> None:
    assert normalize_answer("  The  U.S. Air-Force,\tan army ") == "us airforce army"


def test_numbers_as_scipy_scores_them() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50).round(1), rng.normal(size=50).round(1)  # rounded: ties
    ours = score("text-classification", list(x), list(map(float, y)))
    assert ours == pytest.approx(
        {
            "mse": sklearn.metrics.mean_squared_error(y, x),
            "pearson": scipy.stats.pearsonr(x, y).statistic,
            "spearman": scipy.stats.spearmanr(x, y).statistic,
        },
        abs=1e-12,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score("text-classification", [1.0, 1.0], [2.0, 3.0]) == {"mse": 2.5, "pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("task", "predictions", "references", "labels", "says"),
    [
        ("text-clasification", ["a"], ["a"], [], 'did you mean "text-classification"'),
        ("text-classification", ["a"], ["a", "b"], [], "1 predictions, 2 references"),
        ("text-classification", [], [], [], "at least one"),
        ("text-classification", ["positive"], ["postive"], ["positive", "negative"], 'did you mean "positive"'),
        ("token-classification", [["O"], ["O"]], [["O"], ["O", "O"]], [], "sentence 2"),
        ("token-classification", [["O"]], [["B-prson"]], ["O", "B-person"], 'did you mean "B-person"'),
        ("token-classification", [[]], [[]], [], "no words"),
        ("text-classification", [float("nan")], [1.0], [], "not finite"),
    ],
)
def test_what_cannot_be_scored(task: str, predictions: list, references: list, labels: list, says: str) -> None:
    with pytest.raises(InputError) as error:
        score(task, predictions, references, labels=labels)
    assert says in str(error.value)


def test_a_confusion_matrix_holds_every_label() -> None:
    with pytest.raises(InputError, match='"c" is not among the labels'):
        confusion(["a", "c"], ["a", "a"], ["a", "b"])
