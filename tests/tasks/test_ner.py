"""token-classification against transformers.pipeline: entities, scores and character offsets, every aggregation."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from oracle import ODD, answers, facts, make_bert, minilm, reviews, shake, spread, tweets

from lmworks.base.errors import FormatError, InputError
from lmworks.tasks.base import Facts
from lmworks.tasks.ner import TokenClassification
from lmworks.tokens.tokenizer import Tokenizer

TAGS = dict(enumerate(["O", "B-person", "I-person", "B-location", "I-location", "I-group", "location"]))
KIND = "BertForTokenClassification"
WAYS = ["none", "simple", "first", "average", "max"]


@pytest.fixture(scope="module", params=["uncased", "cased"])
def folder(request, tmp_path_factory):
    return minilm(tmp_path_factory.mktemp("minilm"), cased=request.param == "cased")


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(data_folder):
    return [*tweets(data_folder), *ODD, "", "  \t\n ", "and [SEP] then [MASK]"]


@pytest.fixture(scope="module")
def model(theirs, texts):
    model = make_bert(KIND, id2label=TAGS)
    return spread(model, model.classifier, theirs(texts)["input_ids"])


def reference(model, theirs, examples, aggregation, **options):
    pipe = transformers.pipeline("token-classification", model=model, tokenizer=theirs, device="cpu", **options)
    return [pipe(text, aggregation_strategy=aggregation) for text in examples]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        named = [(entity.get("entity", entity.get("entity_group")), entity["word"]) for entity in other]
        assert [(entity.label, entity.word) for entity in one] == named
        assert [(entity.start, entity.end) for entity in one] == [(entity["start"], entity["end"]) for entity in other]
        np.testing.assert_allclose([entity.score for entity in one], [entity["score"] for entity in other], atol=1e-5)


@pytest.mark.parametrize("aggregation", WAYS)
def test_entities_are_those_of_the_pipeline(aggregation, model, ours, theirs, texts):
    found = answers(TokenClassification(ours, facts(model), aggregation=aggregation), texts, model)
    same(found, reference(model, theirs, texts, aggregation))
    assert sum(map(len, found)) > 1000


@pytest.mark.parametrize("aggregation", ["first", "average", "max"])
def test_no_word_is_split(aggregation, model, ours, theirs, texts):
    """C30: sub-words vote by word, an entity begins and ends with a word, and offsets are those of the given text."""
    every = TokenClassification(ours, facts(model), aggregation=aggregation, ignore_labels=[])
    for text, entities in zip(texts, answers(every, texts, model), strict=True):
        encoding = theirs(text)
        numbers = dict.fromkeys(number for number in encoding.word_ids() if number is not None)
        words = [encoding.word_to_chars(number) for number in numbers]
        assert {entity.start for entity in entities} <= {word.start for word in words}
        assert {entity.end for entity in entities} <= {word.end for word in words}
        assert sum(entity.start <= word.start < entity.end for entity in entities for word in words) == len(words)


def decide(ours, text, labels, aggregation):
    """Return the entities of a text whose tokens have these labels and probabilities."""
    names = ("O", "B-ENT", "I-ENT", "I-NAME")
    task = TokenClassification(ours, Facts(model_type="bert", max_length=32, labels=names), aggregation=aggregation)
    (feature,) = task.encode([text])
    inside = [at for at, special in enumerate(feature.encoding.special_tokens_mask) if not special]
    rows = np.full((len(feature), 4), 0.25)
    for at, (name, score) in zip(inside, labels, strict=True):
        rows[at] = (1 - score) / 3
        rows[at, names.index(name)] = score
    return task.decode([feature], [np.log(rows)], [text])[0]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("simple", [("ENT", 0, 4), ("NAME", 4, 5), ("ENT", 5, 14), ("NAME", 14, 17)]),
        ("first", [("ENT", 0, 17)]),
        ("max", [("NAME", 0, 9), ("ENT", 10, 17)]),
        ("average", [("ENT", 0, 9), ("NAME", 10, 17)]),
    ],
)
def test_votes_are_counted_as_documented(aggregation, expected):
    """Two words of three tokens, with scores under which every rule says something else."""
    vocabulary = {piece: place for place, piece in enumerate(["[UNK]", "micr", "##o", "##soft", "comp", "##an", "##y"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    assert backend.encode("microsoft company").tokens == ["micr", "##o", "##soft", "comp", "##an", "##y"]
    labels = [("B-ENT", 0.8), ("I-NAME", 0.9), ("B-ENT", 0.5), ("I-ENT", 0.6), ("I-NAME", 0.55), ("I-NAME", 0.55)]
    found = decide(Tokenizer(backend), "microsoft company", labels, aggregation)
    assert [(entity.label, entity.start, entity.end) for entity in found] == expected


def test_an_invisible_character_does_not_glue_words(ours):
    """C30: the pipeline compares lengths to find sub-words: "f", a zero-width space and "oo" seem one."""
    text = "ada f\u200boo bob"
    found = decide(ours, text, [("B-ENT", 0.9)] * 3, "first")
    assert [text[entity.start : entity.end] for entity in found] == text.split()


def test_every_token_can_be_had_with_its_label(model, ours, theirs, texts):
    """R89: token, label, score, and whether it takes part; special tokens do not."""
    found = answers(TokenClassification(ours, facts(model), aggregation="tokens"), texts, model)
    for text, tags in zip(texts, found, strict=True):
        inputs = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        with torch.no_grad():
            scores, best = model(input_ids=torch.tensor([inputs["input_ids"]])).logits[0].softmax(-1).max(-1)
        assert [tag.token for tag in tags] == theirs.convert_ids_to_tokens(inputs["input_ids"])
        assert [tag.label for tag in tags] == [TAGS[place] for place in best.tolist()]
        assert [tag.attends for tag in tags] == [not special for special in inputs["special_tokens_mask"]]
        assert [(tag.start, tag.end) for tag in tags] == inputs["offset_mapping"]
        np.testing.assert_allclose([tag.score for tag in tags], scores.numpy(), atol=1e-5)


def test_other_labels_can_be_ignored(model, ours, theirs, texts):
    task = TokenClassification(ours, facts(model), aggregation="simple", ignore_labels=["person", "O"])
    expected = reference(model, theirs, texts[:30], "simple", ignore_labels=["person", "O"])
    same(answers(task, texts[:30], model), expected)


@pytest.fixture(scope="module")
def long_texts(data_folder):
    sentences = tweets(data_folder)
    return [" ".join(sentences[start : start + count]) for start, count in [(0, 3), (3, 4), (7, 9), (20, 7), (40, 1)]]


def test_long_texts_are_refused_by_default(model, ours, long_texts):
    """B15: nothing is cut in silence."""
    with pytest.raises(InputError, match=r"longer than the model[\s\S]*text 2[\s\S]*at most 32"):
        TokenClassification(ours, facts(model, max_length=32)).encode(["short", long_texts[1]])


@pytest.mark.parametrize("aggregation", WAYS)
def test_truncation_cuts_what_the_pipeline_cuts(aggregation, model, folder, ours, long_texts):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=32)
    task = TokenClassification(ours, facts(model, max_length=32), aggregation=aggregation, long="truncate")
    same(answers(task, long_texts, model), reference(model, theirs, long_texts, aggregation))


@pytest.mark.parametrize(("length", "overlap"), [(64, 16), (64, 15), (64, 0), (32, 25), (33, 24)])
def test_each_token_is_answered_where_it_lies_deepest(length, overlap, model, ours, theirs, long_texts):
    """The reference cuts the ids by hand and looks at every window that holds a token."""
    task = TokenClassification(
        ours, facts(model, max_length=length), aggregation="tokens", long="window", overlap=overlap
    )
    for text, tags in zip(long_texts, answers(task, long_texts, model), strict=True):
        ids, room = theirs(text, add_special_tokens=False)["input_ids"], length - 2
        windows = [0]
        while windows[-1] + room < len(ids):
            windows.append(windows[-1] + room - overlap)
        best = [(-1, None)] * len(ids)
        for start in windows:
            window = ids[start : start + room]
            with torch.no_grad():
                row = model(input_ids=torch.tensor([[101, *window, 102]])).logits[0, 1:-1].softmax(-1).numpy()
            for at in range(len(window)):
                before = at if start else 10**6
                after = len(window) - 1 - at if start + len(window) < len(ids) else 10**6
                if min(before, after) > best[start + at][0]:
                    best[start + at] = (min(before, after), row[at])
        assert [tag.attends for tag in tags] == [False, *[True] * len(ids), False]
        assert [tag.token for tag in tags[1:-1]] == theirs.convert_ids_to_tokens(ids)
        assert [tag.label for tag in tags[1:-1]] == [TAGS[int(row.argmax())] for _, row in best]
        np.testing.assert_allclose([tag.score for tag in tags[1:-1]], [row.max() for _, row in best], atol=1e-9)


@pytest.mark.parametrize("aggregation", ["simple", "first", "average", "max"])
def test_windows_agree_with_the_strides_of_the_pipeline_outside_their_overlaps(
    aggregation, model, folder, ours, long_texts
):
    """The pipeline settles an overlap by the longest entity, we by the deepest token: elsewhere both must agree."""
    length, overlap, compared = 64, 16, 0
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=length)
    task = TokenClassification(
        ours, facts(model, max_length=length), aggregation=aggregation, long="window", overlap=overlap
    )
    expected = reference(model, theirs, long_texts, aggregation, stride=overlap)
    for text, one, other in zip(long_texts, answers(task, long_texts, model), expected, strict=True):
        whole = theirs(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
        offsets, step = whole["offset_mapping"], length - 2 - overlap
        shared = [start for number in range(1, len(offsets)) for start in range(number * step, number * step + overlap)]
        taken = [offsets[place] for place in shared if place < len(offsets) and len(offsets) > length - 2]

        def apart(start, end, taken=taken):
            return all(end + 20 < begin or start - 20 > stop for begin, stop in taken)

        mine = [entity for entity in one if apart(entity.start, entity.end)]
        same([mine], [[entity for entity in other if apart(entity["start"], entity["end"])]])
        compared += len(mine)
    assert compared > 40


@pytest.mark.parametrize("aggregation", ["simple", "first", "average", "max"])
def test_a_model_with_a_short_sight_answers_as_if_it_read_the_text_at_once(
    aggregation, folder, ours, theirs, long_texts
):
    """Two layers that see four tokens to either side: windows that share 16 lose nothing."""
    config = transformers.ModernBertConfig(
        vocab_size=30522, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        local_attention=8, layer_types=["sliding_attention"] * 2, pad_token_id=0, bos_token_id=101, eos_token_id=102,
        cls_token_id=101, sep_token_id=102, id2label=TAGS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = shake(transformers.ModernBertForTokenClassification(config), 0)
    spread(model, model.classifier, theirs(long_texts)["input_ids"])
    task = TokenClassification(ours, facts(model, max_length=64), aggregation=aggregation, long="window", overlap=16)
    assert len(task.encode(long_texts)) > 12
    expected = reference(model, theirs, long_texts, aggregation)
    same(answers(task, long_texts, model), expected)
    blind = TokenClassification(ours, facts(model, max_length=64), aggregation=aggregation, long="window", overlap=2)
    with pytest.raises(AssertionError):
        same(answers(blind, long_texts, model), expected)


@pytest.fixture(scope="module")
def bytewise(data_folder, tmp_path_factory):
    """GPT-2: a tokenizer that marks no sub-words and adds no special tokens."""
    source, folder = data_folder / "tokenizers" / "gpt2", tmp_path_factory.mktemp("gpt2")
    theirs = transformers.GPT2Tokenizer(vocab=str(source / "encoder.json"), merges=str(source / "vocab.bpe"))
    theirs.save_pretrained(folder)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, id2label=TAGS)
    torch.manual_seed(0)
    model = shake(transformers.GPT2ForTokenClassification(config), 0)
    texts = [*tweets(data_folder, 60), *reviews(data_folder, 60), *ODD[:2]]
    spread(model, model.classifier, theirs(texts)["input_ids"])
    return model, Tokenizer.from_pretrained(folder), theirs, texts


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", WAYS)
def test_byte_level_tokenizers_give_the_entities_of_the_pipeline(aggregation, bytewise):
    model, ours, theirs, texts = bytewise
    task = TokenClassification(ours, facts(model), aggregation=aggregation, words="spaces")
    if aggregation in ("first", "average", "max"):  # there the pipeline cuts characters of several bytes in pieces
        texts = [text for text in texts if text.isascii()]
    assert len(texts) > 100
    same(answers(task, texts, model), reference(model, theirs, texts, aggregation))


def test_byte_level_words_end_before_punctuation_and_keep_their_characters_whole(bytewise):
    """C30 for GPT-2 and RoBERTa: "London," is a word and a comma, and an emoji of four tokens is one word."""
    model, ours, *_ = bytewise
    text = "in London, 😀👍🏽 東京"
    for words, expected in [
        ("tokenizer", ["in", " London", ",", " 😀👍🏽", " 東京"]),
        ("spaces", ["in", " London,", " 😀👍🏽", " 東京"]),
    ]:
        task = TokenClassification(ours, facts(model), aggregation="first", ignore_labels=[], words=words)
        (feature,) = task.encode([text])
        logits = np.zeros((len(feature), 7))
        logits[:, 1] = 9  # B-person everywhere: every word is an entity
        found = task.decode([feature], [logits], [text])[0]
        assert [text[entity.start : entity.end] for entity in found] == expected
        assert [entity.word for entity in found] == expected
    assert TokenClassification(ours, facts(model)).encode([""]) == []
    assert answers(TokenClassification(ours, facts(model)), ["", "a", ""], model)[::2] == [[], []]


def test_bad_options_and_examples_end_in_one_clear_message(ours, model):
    known = facts(model)
    for options, said in [
        ({"aggregation": "averge"}, 'did you mean "average"'),
        ({"long": "windows"}, 'did you mean "window"'),
        ({"words": "space"}, 'did you mean "spaces"'),
        ({"overlap": -1}, "overlap"),
        ({"ignore_labels": ["persn"]}, 'did you mean "person"'),
    ]:
        with pytest.raises(InputError, match=said):
            TokenClassification(ours, known, **options)
    task = TokenClassification(ours, known)
    for example in (3, None, ("a", "b"), b"bytes"):
        with pytest.raises(InputError, match="text 2"):
            task.encode(["fine", example])
    assert task.encode([]) == [] and task.decode([], [], []) == []
    with pytest.raises(FormatError, match="4 numbers"):
        task.decode(task.encode(["a"]), [np.zeros((3, 4))], ["a"])
    with pytest.raises(FormatError, match="not a number"):
        task.decode(task.encode(["a"]), [np.full((3, 7), np.nan)], ["a"])
    with pytest.raises(InputError, match="no room"):
        TokenClassification(ours, facts(model, max_length=16), long="window", overlap=14).encode(["a " * 50])
