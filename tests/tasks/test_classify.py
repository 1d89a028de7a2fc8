"""text-classification against transformers.pipeline: same labels, same scores, on real sentences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from oracle import ODD, answers, facts, make_bert, minilm, news, reviews, spread

from lmworks.base.errors import FormatError, InputError
from lmworks.base.types import Label
from lmworks.tasks.base import Facts
from lmworks.tasks.classify import TextClassification
from lmworks.tokens.tokenizer import Tokenizer

NAMES = {0: "bad", 1: "so so", 2: "good"}
KIND = "BertForSequenceClassification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(data_folder):
    return [*reviews(data_folder), *ODD, "", "  \t\n "]


@pytest.fixture(scope="module")
def model(theirs, texts):
    """Three labels that exclude each other, over the texts."""
    model = make_bert(KIND, id2label=NAMES)
    return spread(model, model.classifier, theirs(texts)["input_ids"])


def reference(model, theirs, examples, **options):
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=theirs, device="cpu")
    inputs = [one if isinstance(one, str) else {"text": one[0], "text_pair": one[1]} for one in examples]
    return [pipe(one, **{"top_k": None, **options}) for one in inputs]


def same(found, expected, *, size=None):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert [label.label for label in one] == [label["label"] for label in other]
        np.testing.assert_allclose([label.score for label in one], [label["score"] for label in other], atol=1e-5)
        assert [label.score for label in one] == sorted((label.score for label in one), reverse=True)
        assert size is None or len(one) == size


def test_sentences_get_the_labels_and_scores_of_the_pipeline(model, ours, theirs, texts):
    found = answers(TextClassification(ours, facts(model)), texts, model)
    same(found, reference(model, theirs, texts), size=3)
    assert {labels[0].label for labels in found} == set(NAMES.values())


def test_top_k_keeps_the_best(model, ours, theirs, texts):
    found = answers(TextClassification(ours, facts(model), top_k=2), texts[:20], model)
    same(found, reference(model, theirs, texts[:20], top_k=2), size=2)


def test_pairs_are_read_as_pairs(model, ours, theirs, data_folder):
    """The two texts carry different token types; a pair that was joined to one text would score differently."""
    pairs = news(data_folder)
    found = answers(TextClassification(ours, facts(model)), pairs, model)
    same(found, reference(model, theirs, pairs))
    joined = answers(TextClassification(ours, facts(model)), [" ".join(pair) for pair in pairs[:20]], model)
    assert any(abs(one[0].score - two[0].score) > 1e-3 for one, two in zip(found, joined, strict=False))
    from_json = TextClassification(ours, facts(model)).encode([list(pairs[0])])
    assert from_json[0].inputs == TextClassification(ours, facts(model)).encode([pairs[0]])[0].inputs


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("multi_label_classification", 3), ("regression", 1), ("regression", 3), (None, 1), (None, 3)],
)
def test_what_a_model_was_trained_for_decides_the_kind_of_scores(problem, labels, ours, theirs, texts):
    model = make_bert(KIND, num_labels=labels, problem_type=problem, seed=labels)
    found = answers(TextClassification(ours, facts(model)), texts[:40], model)
    same(found, reference(model, theirs, texts[:40]), size=labels)
    if problem == "multi_label_classification":
        assert any(abs(sum(label.score for label in one) - 1) > 0.1 for one in found)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "none"])
def test_the_kind_of_scores_can_be_chosen(scores, model, ours, theirs, texts):
    found = answers(TextClassification(ours, facts(model), scores=scores), texts[:20], model)
    same(found, reference(model, theirs, texts[:20], function_to_apply=scores))


def test_scores_survive_huge_logits(ours):
    for problem in ("multi_label_classification", None):
        task = TextClassification(ours, Facts(model_type="bert", max_length=8, labels=("a", "b"), problem_type=problem))
        assert task.decode(task.encode(["x"]), [np.array([-1e4, 1e4])], ["x"]) == [[Label("b", 1.0), Label("a", 0.0)]]


def test_long_texts_are_refused_by_default(model, ours, data_folder):
    """B15: nothing is cut in silence."""
    task = TextClassification(ours, facts(model, max_length=16))
    with pytest.raises(InputError, match=r"longer than the model[\s\S]*text 2[\s\S]*at most 16"):
        task.encode(["short", reviews(data_folder)[0] * 3])


def test_truncation_cuts_what_the_pipeline_cuts(model, ours, theirs, data_folder):
    task = TextClassification(ours, facts(model, max_length=21), long="truncate")
    pairs = news(data_folder, 60)
    pairs += [(b, a) for a, b in pairs] + [(a, a) for a, _ in pairs] + [("", b) for _, b in pairs[:3]]
    examples = [*pairs, *(text for _, text in pairs[:60])]
    found = answers(task, examples, model)
    same(found, reference(model, theirs, examples, truncation=True, max_length=21))
    assert any(len(feature) == 21 for feature in task.encode(examples))


@pytest.mark.parametrize("overlap", [None, 0, 5])
def test_windows_average_what_each_of_them_adds(overlap, model, ours, theirs, data_folder):
    """The reference cuts the ids by hand: the whole text is read, no token counts twice."""
    length, texts = 24, [" ".join(reviews(data_folder)[start : start + 6]) for start in range(0, 60, 6)]
    found = answers(
        TextClassification(ours, facts(model, max_length=length), long="window", overlap=overlap), texts, model
    )
    shared, room = length // 4 if overlap is None else overlap, length - 2
    for text, labels in zip(texts, found, strict=True):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        total, read, start = 0.0, 0, 0
        while read < len(ids):
            window = ids[start : start + room]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[101, *window, 102]])).logits[0]
            total = total + logits.softmax(-1).numpy() * (start + len(window) - read)
            read, start = start + len(window), start + room - shared
        best = {label.label: label.score for label in labels}
        np.testing.assert_allclose([best[NAMES[place]] for place in range(3)], total / len(ids), atol=1e-9)


def test_windows_of_a_pair_repeat_the_first_text(model, ours, data_folder):
    task = TextClassification(ours, facts(model, max_length=40), long="window")
    first, second = "who wrote this ?", " ".join(text for _, text in news(data_folder, 5))
    features = task.encode([(first, second), "short"])
    head = ours.encode(first)
    assert len(features) > 4 and [feature.example for feature in features] == [0] * (len(features) - 1) + [1]
    for feature in features[:-1]:
        ids, types = feature.inputs["input_ids"], feature.inputs["token_type_ids"]
        assert ids[: len(head) + 2] == [101, *head, 102] and ids[-1] == 102
        assert types == [0] * (len(head) + 2) + [1] * (len(ids) - len(head) - 2)
    assert sum(feature.notes["new_tokens"] for feature in features[:-1]) == len(ours.encode(second))
    tight = "a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d e"  # leaves room for six tokens
    assert len(task.encode([(tight, second)])) > 20
    with pytest.raises(InputError, match="no room"):
        task.encode([(second, "short")])


def test_bad_options_and_examples_end_in_one_clear_message(ours, model):
    known = facts(model)
    for options, said in [
        ({"scores": "sofmax"}, 'did you mean "softmax"'),
        ({"long": "cut"}, "error, truncate, window"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"overlap": 0.5}, "overlap"),
    ]:
        with pytest.raises(InputError, match=said):
            TextClassification(ours, known, **options)
    task = TextClassification(ours, known)
    for example in (3, None, ("a", "b", "c"), ("a", 1), b"bytes"):
        with pytest.raises(InputError, match="text 2"):
            task.encode(["fine", example])
    assert task.encode([]) == [] and task.decode([], [], []) == []
    with pytest.raises(FormatError, match="4 numbers"):
        task.decode(task.encode(["a"]), [np.zeros(4)], ["a"])
    with pytest.raises(FormatError, match="not a number"):
        task.decode(task.encode(["a"]), [np.array([0, np.nan, 0])], ["a"])


def test_a_text_without_tokens_is_an_error_where_nothing_is_added(data_folder):
    tokens = data_folder / "tokenizers" / "gpt2"
    from tokenizers import ByteLevelBPETokenizer

    plain = ByteLevelBPETokenizer.from_file(str(tokens / "encoder.json"), str(tokens / "vocab.bpe"))
    task = TextClassification(Tokenizer(plain._tokenizer), Facts(model_type="gpt2", max_length=8, labels=("a", "b")))
    with pytest.raises(InputError, match=r"is empty[\s\S]*text 1"):
        task.encode([""])
