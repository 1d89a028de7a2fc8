"""Question answering against a plain reference over transformers' own tokenizer and models.

transformers 5 has no question-answering pipeline any more. `reference` says what that of transformers 4 computed, in
the plainest way: every window alone, every span by two loops.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from oracle import minilm
from oracle_text import answers, facts_of, make, questions, roberta_tokenizer, scale

from lmworks.base.errors import InputError
from lmworks.base.types import Answer
from lmworks.tasks.base import Facts
from lmworks.tasks.qa import QuestionAnswering
from lmworks.tokens.tokenizer import Tokenizer


def reference(model, tokenizer, pair, *, length, stride, longest=15, words=True):
    """Return [(score, start, end)] of every span, best first, and the score of no answer."""
    question, context = pair
    options = {"truncation": "only_second", "max_length": length, "stride": stride, "return_overflowing_tokens": True}
    encoded = tokenizer(question, context, **options)
    found: dict[tuple[int, int], float] = {}
    nothing = 1.0
    for window, ids in enumerate(encoded["input_ids"]):
        inputs = {name: torch.tensor([encoded[name][window]]) for name in tokenizer.model_input_names}
        with torch.no_grad():
            logits = model(**inputs)
        sides, word_ids, offsets = (
            encoded.sequence_ids(window),
            encoded.word_ids(window),
            encoded.encodings[window].offsets,
        )
        context_tokens = [place for place, side in enumerate(sides) if side == 1]
        counted = context_tokens + [place for place, id in enumerate(ids) if id == tokenizer.cls_token_id]
        start, end = {}, {}
        for kind, row in ((start, logits.start_logits[0]), (end, logits.end_logits[0])):
            total = torch.logsumexp(row[counted], 0)
            kind.update({place: float(torch.exp(row[place] - total)) for place in counted})
        nothing = min(nothing, start.get(0, 0.0) * end.get(0, 0.0))
        left, right = {}, {}  # where the word of a token begins and ends, or the token itself
        for place in context_tokens:
            left.setdefault(word_ids[place] if words else place, offsets[place][0])
            right[word_ids[place] if words else place] = offsets[place][1]
        for i in context_tokens:
            for j in range(i, min(i + longest, context_tokens[-1] + 1)):
                span = left[word_ids[i] if words else i], right[word_ids[j] if words else j]
                found[span] = max(found.get(span, 0.0), start[i] * end[j])
    return sorted(((score, *span) for span, score in found.items()), reverse=True), nothing, len(encoded["input_ids"])


def load(folder, name, *, sharp=6.0, seed=1, **settings):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = make(name, tokenizer, seed=seed, **settings)
    scale(model.qa_outputs, sharp)
    return tokenizer, model


def compare(task, model, tokenizer, pairs, *, length, pad_id=0, least=None, **options):
    """Check every answer; `least` of them must win by 1e-3 (or all). Return how many windows there were."""
    windows = decisive = 0
    for pair, found in zip(pairs, answers(task, pairs, model, pad_id=pad_id), strict=True):
        ranked, _, count = reference(model, tokenizer, pair, length=length, **options)
        windows += count
        assert found.text == pair[1][found.start : found.end] and found.text
        assert abs(found.score - ranked[0][0]) <= 1e-9
        decisive += ranked[0][0] - ranked[1][0] > 1e-3
        if ranked[0][0] - ranked[1][0] > 1e-9:
            assert (found.start, found.end) == ranked[0][1:]
    assert decisive >= (len(pairs) if least is None else least), decisive
    return windows


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = minilm(tmp_path_factory.mktemp("bert"))
    return Tokenizer.from_pretrained(folder), *load(folder, "BertForQuestionAnswering", sharp=12.0)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, data_folder):
    folder = roberta_tokenizer(data_folder, tmp_path_factory.mktemp("roberta"))
    settings = {"pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1}
    return Tokenizer.from_pretrained(folder), *load(folder, "RobertaForQuestionAnswering", sharp=12.0, **settings)


def test_200_real_questions_whose_contexts_pass_a_window(bert, data_folder):
    """C31: the best span of all windows, with its offsets, is the answer."""
    ours, tokenizer, model = bert
    pairs = questions(data_folder, "en", 220)
    task = QuestionAnswering(ours, facts_of(model), max_length=96)
    windows = compare(task, model, tokenizer, pairs, length=96, stride=48, least=200)
    assert windows > 2 * len(pairs)


@pytest.mark.parametrize("language", ["zh", "ru"])
def test_offsets_count_characters_of_other_scripts(bert, data_folder, language):
    ours, tokenizer, model = bert
    pairs = questions(data_folder, language, 40)
    for words in (True, False):
        task = QuestionAnswering(ours, facts_of(model), max_length=192, overlap=20, align_to_words=words)
        assert compare(task, model, tokenizer, pairs, length=192, stride=20, words=words, least=36) > len(pairs)


def test_a_context_that_fits_is_one_window_of_384_tokens(bert, data_folder):
    ours, tokenizer, model = bert
    pairs = questions(data_folder, "en", 40)
    pairs[-1] = (pairs[-1][0], " ".join(context for _, context in pairs[:8]))
    task = QuestionAnswering(ours, facts_of(model))
    compare(task, model, tokenizer, pairs, length=384, stride=128, least=28)
    counts = np.bincount([feature.example for feature in task.encode(pairs)])
    assert counts[-1] > 3 and (counts[:-1] == 1).sum() > 30
    assert max(map(len, task.encode(pairs))) == 384


def test_byte_level_tokens_without_token_types(roberta, data_folder):
    ours, tokenizer, model = roberta
    pairs = [
        *questions(data_folder, "en", 40),
        ("who 😀?", "Zoë  Müller —  naïve 😀👍🏽 café,\tSão Paulo\n\n東京 " * 9),
    ]
    for words in (True, False):
        task = QuestionAnswering(ours, facts_of(model), max_length=128, align_to_words=words)
        compare(task, model, tokenizer, pairs, length=128, stride=64, pad_id=1, words=words, least=36)


def test_a_decoder_has_no_cls(tmp_path, data_folder):
    folder = roberta_tokenizer(data_folder, tmp_path)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))
    backend = Tokenizer.from_pretrained(folder).backend
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, model = load(folder, "GPT2ForQuestionAnswering", sharp=12.0)
    ours, pairs = Tokenizer.from_pretrained(folder), questions(data_folder, "en", 30)
    task = QuestionAnswering(ours, facts_of(model), max_length=128)
    compare(task, model, tokenizer, pairs, length=128, stride=64, least=26)
    with pytest.raises(InputError, match=r"cannot say that there is no answer[\s\S]*cls_token"):
        QuestionAnswering(ours, facts_of(model), no_answer=True)


def test_several_answers_and_none(bert, data_folder):
    ours, tokenizer, model = bert
    pairs, lifted = questions(data_folder, "en", 40), copy.deepcopy(model)
    with torch.no_grad():  # raise what [CLS] says, so that some questions have no answer
        rows = tokenizer([question for question, _ in pairs])["input_ids"]
        cls = sum(model.bert(torch.tensor([row])).last_hidden_state[0, 0] for row in rows) / len(rows)
        lifted.qa_outputs.weight += 18 * cls / cls.square().sum()
    task = QuestionAnswering(ours, facts_of(model), max_length=96, no_answer=True, top_k=4, max_answer_length=6)
    nothing = 0
    for pair, found in zip(pairs, answers(task, pairs, lifted), strict=True):
        ranked, none, _ = reference(lifted, tokenizer, pair, length=96, stride=48, longest=6)
        wanted = sorted([*ranked, (none, 0, 0)], reverse=True)[:4]
        assert [(answer.start, answer.end) for answer in found] == [row[1:] for row in wanted]
        assert np.allclose([answer.score for answer in found], [row[0] for row in wanted], atol=1e-9)
        assert all(answer.text == pair[1][answer.start : answer.end] for answer in found)
        nothing += found[0] == Answer("", found[0].score, 0, 0)
    assert 5 < nothing < 35


def test_padding_and_the_batch_change_nothing(bert, data_folder):
    ours, _, model = bert
    pairs = questions(data_folder, "en", 12)
    task = QuestionAnswering(ours, facts_of(model), max_length=128)
    alone = [answers(task, [pair], model, size=1)[0] for pair in pairs]
    together = answers(task, pairs, model, size=64)
    assert [(a.text, a.start, a.end) for a in alone] == [(a.text, a.start, a.end) for a in together]


def test_a_long_question_leaves_less_to_overlap(bert, data_folder):
    ours, tokenizer, model = bert
    question = "which of the many things that are told about it here is the one that matters most to us " * 2
    context = questions(data_folder, "en", 1)[0][1]
    task = QuestionAnswering(ours, facts_of(model), max_length=64)
    compare(task, model, tokenizer, [(question, context)], length=64, stride=(64 - 3 - 38) // 2)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([("who?", "me"), ("", "me")], r"the question is empty\n  where: example 2"),
        ([("who?", " \n")], r"the context is empty\n  where: example 1"),
        ([("who?", "\u200b\u200b")], r"the context has no tokens\n  where: example 1"),
        (["who?"], r"must be \(question, context\)\n  where: example 1"),
        ([("who?",)], r"must be \(question, context\)"),
        ([("who?", None)], r"must be \(question, context\)"),
        ([("who?", "me"), ("who is it " * 30, "me")], r"no room for the text in a window\n  where: example 2"),
    ],
)
def test_what_cannot_be_asked(bert, examples, message):
    ours, _, model = bert
    with pytest.raises(InputError, match=message):
        QuestionAnswering(ours, facts_of(model), max_length=64).encode(examples)


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"max_answer_length": 0}, {"max_length": 0}, {"overlap": -1}, {"max_length": 513}]
)
def test_options_that_make_no_sense(bert, options):
    with pytest.raises(InputError, match=f"{next(iter(options))} "):
        QuestionAnswering(bert[0], Facts(model_type="bert", max_length=512), **options)
