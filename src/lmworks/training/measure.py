"""What a predictor says of labelled examples, in the words of the references, and the task's metrics by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmworks.evaluation.metrics import score
from lmworks.evaluation.retrieval import nearest_labels, rank_partners
from lmworks.runtime.predictor import Predictor
from lmworks.tasks.embed import unit
from lmworks.text.labelled import Labelled
from lmworks.training.rows import join_words

LIKELY = 0.5  # from this score on, one of several labels holds
CLASSES = ("text-classification", "image-classification")
MAIN = {  # the number by which weights are chosen; for the other tasks the loss
    "text-classification": "accuracy",
    "image-classification": "accuracy",
    "token-classification": "f1",
    "question-answering": "f1",
}


def measure(predictor: Predictor, data: Labelled, *, problem: str | None = None, **options: Any) -> dict[str, float]:
    """Return the metrics of a predictor's answers: accuracy, f1, precision, recall, exact_match, mse …"""
    said = answer(predictor, data, problem=problem, **options)
    return score(data.task, said, data.references, labels=data.labels)


def answer(predictor: Predictor, data: Labelled, *, problem: str | None = None, **options: Any) -> list[Any]:
    """Return a label, tuple of labels, number, tuple of tags or answer for each example, as its reference is."""
    if data.task == "token-classification":
        return tag_words(predictor, data.examples, **options)
    if data.task == "question-answering":
        unanswerable = any(not answers for answers in data.references)
        found = predictor(list(data.examples), **({"no_answer": True} if unanswerable else {}), **options)
        return [one.text for one in found]
    if data.task == "feature-extraction":
        return compare_texts(predictor, data, **options)
    if problem == "single_label_classification":  # of thousands of labels all scores would fill the memory
        options |= {"top_k": 1}
    ranked = predictor(list(data.examples), **options)
    if problem == "regression":
        return [labels[0].score for labels in ranked]
    if problem == "multi_label_classification":
        return [tuple(label.label for label in labels if label.score >= LIKELY) for labels in ranked]
    return [labels[0].label for labels in ranked]


def number_labels(own: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Return a model's labels as data call them: 0, 1 … for LABEL_0, LABEL_1 …, its own for every other."""
    plain = tuple(str(i) for i in range(len(own)))
    usual = tuple(own) == tuple(f"LABEL_{i}" for i in plain)
    return plain if usual and not set(plain).isdisjoint(wanted) else tuple(own)


def problem_type(data: Labelled) -> str | None:
    """Return what kind of labels texts or pictures have, in config.json's words; None for other tasks."""
    if data.task not in CLASSES:
        return None
    first = data.references[0]
    if isinstance(first, float):
        return "regression"
    return "single_label_classification" if isinstance(first, str) else "multi_label_classification"


def main_metric(task: str, data: Labelled, problem: str | None) -> str:
    """Return the number by which weights are chosen: "loss" is the validation loss."""
    if task == "feature-extraction":
        return {float: "spearman", str: "accuracy"}.get(type(data.references[0]), "mrr")
    return "loss" if problem == "regression" else MAIN.get(task, "loss")


def compare_texts(predictor: Predictor, data: Labelled, **options: Any) -> list[Any]:
    """Return the label of the nearest text, the cosine of a pair, or the rank of a partner among all partners.

    Of triplets (rank, whether the partner is nearer than the negative), the negatives being candidates too.
    """
    groups = [(example,) if isinstance(example, str) else tuple(example) for example in data.examples]
    place = {text: i for i, text in enumerate(dict.fromkeys(text for group in groups for text in group))}
    vectors = unit(predictor(list(place), **options))  # (n, D)
    columns = [[place[text] for text in column] for column in zip(*groups, strict=True)]
    first = vectors[columns[0]]
    if isinstance(data.references[0], str):
        return list(nearest_labels(first, data.references))
    cosines = [(first * vectors[column]).sum(1) for column in columns[1:]]
    if isinstance(data.references[0], float):
        return [float(cosine) for cosine in cosines[0]]
    candidates = {text: i for i, text in enumerate(dict.fromkeys(t for column in columns[1:] for t in column))}
    partners = [candidates[text] for text in columns[1]]
    ranks = rank_partners(first, vectors[list(candidates)], partners, names=[group[0] for group in groups])
    if len(columns) == 2:
        return list(ranks)
    return [(rank, bool(near > far)) for rank, near, far in zip(ranks, *cosines, strict=True)]


def tag_words(predictor: Predictor, sentences: Sequence[Sequence[str]], **options: Any) -> list[tuple[str, ...]]:
    """Return the tag of each word: that of its first token; "O" for a word that the tokenizer, or a cut, left out."""
    texts = [join_words(words) for words in sentences]
    found = predictor([text for text, _ in texts], aggregation="tokens", **options)
    tags = []
    for (_, spans), tokens in zip(texts, found, strict=True):
        row, word = ["O"] * len(spans), 0
        seen = [False] * len(spans)
        for token in tokens:
            if not token.attends or token.start == token.end:
                continue
            while word < len(spans) - 1 and spans[word][1] <= token.start:
                word += 1
            if token.start < spans[word][1] and spans[word][0] < token.end and not seen[word]:
                row[word], seen[word] = token.label, True
        tags.append(tuple(row))
    return tags
