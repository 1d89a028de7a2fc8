"""The baselines are what they say: scikit-learn's logistic regression, the commonest answer, spans from anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lmworks.text.labelled import Labelled, read_labelled
from lmworks.training.baseline import PENALTY, fit, majority, no_answer, random_spans


def test_the_classifier_is_logistic_regression() -> None:
    """Its loss is scikit-learn's divided by the rows; the same minimum is found."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)).astype(np.float32)
    y = (x @ rng.normal(size=(12, 4)) + rng.normal(size=(300, 4))).argmax(1)
    theirs = LogisticRegression(C=1 / (2 * len(x) * PENALTY), tol=1e-9, max_iter=5000).fit(x, y)
    weight, bias = fit(torch.from_numpy(x), torch.from_numpy(y), 4)
    assert weight.numpy() - weight.numpy().mean(0) == pytest.approx(theirs.coef_ - theirs.coef_.mean(0), abs=5e-3)
    assert (bias - bias.mean()).numpy() == pytest.approx(theirs.intercept_ - theirs.intercept_.mean(), abs=5e-3)


def test_the_commonest_answer_is_counted_in_the_training_data(data_folder) -> None:
    def texts(references: list) -> Labelled:
        return Labelled("text-classification", ["x"] * len(references), references, ("a", "b"), "here")

    assert majority(texts(["a", "b", "a"]), texts(["b", "b", "b", "a"]))["accuracy"] == 0.25
    numbers = majority(texts([1.0, 3.0]), texts([2.0, 4.0]))
    assert numbers["mse"] == pytest.approx(2.0)
    tags = read_labelled(data_folder / "wnut17/dev.conll", "token-classification")
    assert majority(tags, tags)["f1"] == 0 and majority(tags, tags)["accuracy"] > 0.9


def test_random_spans_are_as_long_as_the_answers_and_from_their_context(data_folder) -> None:
    data = read_labelled(data_folder / "xquad/xquad.en.json", "question-answering")
    spans = random_spans(data)
    for span, (_, context), answers in zip(spans, data.examples, data.references, strict=True):
        assert len(span.split()) == min(len(answers[0][0].split()), len(context.split()))
        assert span in " ".join(context.split())
    assert 0 < majority(data, data)["f1"] < 0.1
    assert spans == random_spans(data)


def test_a_random_span_does_not_know_which_questions_have_no_answer() -> None:
    """It is a span of some other question's length; that there is no answer is a baseline of its own."""
    examples = [("who ?", "anna lives in bern and emil in paris")] * 40
    references = [(("anna lives", 0),), ()] * 20
    data = Labelled("question-answering", examples, references, (), "here")
    assert {len(span.split()) for span in random_spans(data)} == {2}
    assert no_answer(data) == {"exact_match": 0.5, "f1": 0.5}
    assert majority(data, data)["exact_match"] < 0.5
