"""Filling masks against transformers' fill-mask pipeline, on real sentences with a word masked at random."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from oracle import minilm
from oracle_text import answers, facts_of, make, near, reviews, roberta_tokenizer, scale

from lmworks.base.errors import InputError
from lmworks.tasks.base import Facts
from lmworks.tasks.fill_mask import FillMask
from lmworks.tokens.tokenizer import Tokenizer


def masked(data_folder, mask, count, *, masks=1, seed=0):
    """Return real sentences with `masks` random words replaced."""
    pick, sentences = random.Random(seed), []
    for sentence in reviews(data_folder, 2 * count):
        words = sentence.split()
        if len(words) > 2 * masks:
            for place in pick.sample(range(len(words)), masks):
                words[place] = mask
            sentences.append(" ".join(words))
    return sentences[:count]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = minilm(tmp_path_factory.mktemp("bert"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = make("BertForMaskedLM", tokenizer, tie_word_embeddings=False)
    scale(model.cls.predictions.decoder, 6.0)
    return Tokenizer.from_pretrained(folder), tokenizer, model


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, data_folder):
    folder = roberta_tokenizer(data_folder, tmp_path_factory.mktemp("roberta"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {"pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1, "tie_word_embeddings": False}
    model = make("RobertaForMaskedLM", tokenizer, **settings)
    scale(model.lm_head.decoder, 6.0)
    return Tokenizer.from_pretrained(folder), tokenizer, model


def pipeline(tokenizer, model, **options):
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu", **options)


def same(found, wanted):
    """Check the fills of one mask; the pipeline's tokens may not be closer than what float64 tells apart."""
    assert near([fill.score for fill in found], [row["score"] for row in wanted], 1e-9)
    for fill, row in zip(found, wanted, strict=True):
        assert (fill.token, fill.token_str, fill.sequence) == (row["token"], row["token_str"], row["sequence"])
    return found[0].score - found[1].score


def test_200_real_sentences(bert, data_folder):
    ours, tokenizer, model = bert
    texts = masked(data_folder, "[MASK]", 220)
    found = answers(FillMask(ours, facts_of(model)), texts, model)
    margins = [same(fills, rows) for fills, rows in zip(found, pipeline(tokenizer, model)(texts), strict=True)]
    assert sum(margin > 1e-3 for margin in margins) >= 200
    assert len({fills[0].token for fills in found}) > 20


def test_byte_level_tokens_and_a_mask_that_eats_the_space_before_it(roberta, data_folder):
    ours, tokenizer, model = roberta
    texts = [*masked(data_folder, "<mask>", 40, seed=1), "Zoë <mask> 😀👍🏽 naïve", "<mask>", "東京<mask>北京"]
    found = answers(FillMask(ours, facts_of(model), top_k=7), texts, model, pad_id=1)
    for fills, rows in zip(found, pipeline(tokenizer, model, top_k=7)(texts), strict=True):
        same(fills, rows)
        assert len(fills) == 7


def test_several_masks_give_a_list_for_each(bert, data_folder):
    ours, tokenizer, model = bert
    texts = masked(data_folder, "[MASK]", 30, masks=3)
    for text, rows in zip(texts, answers(FillMask(ours, facts_of(model), top_k=3), texts, model), strict=True):
        wanted = pipeline(tokenizer, model, top_k=3)(text)
        assert len(rows) == len(wanted) == 3
        for fills, row in zip(rows, wanted, strict=True):
            same(fills, row)
            assert fills[0].sequence.count("[MASK]") >= 2


def test_special_tokens_that_win_are_shown(bert):
    """A token that `sequence` leaves out still has a name, and padding is not shown at all."""
    ours, tokenizer, model = bert
    names = ["[CLS]", "[PAD]", "[MASK]", "the"]
    for text in ("so [MASK] !", "so [MASK] and [MASK]"):
        found = answers(FillMask(ours, facts_of(model), targets=names), [text], model)[0]
        wanted = pipeline(tokenizer, model)(text, targets=names)
        pairs = [(found, wanted)] if text.count("[MASK]") == 1 else zip(found, wanted, strict=True)
        for fills, rows in pairs:
            same(fills, rows)
            assert {fill.token_str for fill in fills} == set(names)


def test_targets(bert, roberta, data_folder):
    ours, tokenizer, model = bert
    texts, words = masked(data_folder, "[MASK]", 20), ["good", "bad", "##s", "film", "good"]
    found = answers(FillMask(ours, facts_of(model), targets=words, top_k=10), texts, model)
    for fills, rows in zip(found, pipeline(tokenizer, model)(texts, targets=words, top_k=10), strict=True):
        same(fills, rows)
        assert len(fills) == 4
    one = FillMask(ours, facts_of(model), targets="Film")
    assert answers(one, texts[:1], model)[0][0].token_str == "film"
    ours, _, model = roberta
    byte_level = FillMask(ours, facts_of(model), targets=[" good", "Ġbad", "film"])
    found = answers(byte_level, ["a <mask> b"], model, pad_id=1)[0]
    assert {fill.token_str for fill in found} == {" good", " bad", "film"}


@pytest.mark.parametrize("targets", [["good", "unbelievablest"], ["good", "\u1234"], "two words", ""])
def test_a_target_that_is_not_one_token(bert, targets):
    with pytest.raises(InputError, match="a target is not one token of this model"):
        FillMask(bert[0], Facts(model_type="bert", max_length=512), targets=targets)


def test_no_targets(bert):
    with pytest.raises(InputError, match="there are no targets"):
        FillMask(bert[0], Facts(model_type="bert", max_length=512), targets=[])


def test_a_long_text(bert, data_folder):
    """B15: never cut in silence. Cut on request as the pipeline cuts; a window holds what is around its mask."""
    ours, tokenizer, model = bert
    facts = facts_of(model, max_length=48)
    rest = " ".join(reviews(data_folder, 9))
    early, late, both = "a [MASK] of " + rest, rest + " so [MASK] it is", "a [MASK] of " + rest + " so [MASK] it is"
    with pytest.raises(InputError, match=r"longer than the model\n  where: text 2"):
        FillMask(ours, facts).encode(["a [MASK] .", late])
    cut = pipeline(tokenizer, model)(early, tokenizer_kwargs={"truncation": True, "max_length": 48})
    same(answers(FillMask(ours, facts, long="truncate"), [early], model)[0], cut)
    with pytest.raises(InputError, match="a mask is in the part that would be cut off"):
        FillMask(ours, facts, long="truncate").encode([both])
    windows = FillMask(ours, facts, long="window")
    ids = tokenizer(late)["input_ids"]
    assert windows.encode([late, "a [MASK]"])[0].inputs["input_ids"] == ids[:1] + ids[-47:]
    found = answers(windows, [both, late, "a [MASK] ."], model)
    assert [len(found[0]), len(found[1]), len(found[2])] == [2, 5, 5]
    assert found[1][0].sequence.startswith(rest[:40].replace(" ,", ",")) and found[1][0].sequence.endswith("it is")
    with torch.no_grad():
        logits = model(torch.tensor([ids[:1] + ids[-47:]])).logits[0, -4]
    assert near([fill.score for fill in found[1]], logits.softmax(-1).topk(5).values, 1e-9)
    same(found[2], pipeline(tokenizer, model)("a [MASK] ."))
    middle = windows.encode([rest + " [MASK] " + rest])[0].inputs["input_ids"]
    assert len(middle) == 48 and abs(middle.index(ours.find("mask_token", "")) - 24) <= 1


def test_reducing_early_changes_nothing(bert, data_folder):
    ours, _, model = bert
    texts = [*masked(data_folder, "[MASK]", 9), *masked(data_folder, "[MASK]", 3, masks=3)]
    task = FillMask(ours, facts_of(model))
    assert answers(task, texts, model, early=True) == answers(task, texts, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no mask here", r"has no mask\n  where: text 2\n  found: 'no mask here'\n  expected: \[MASK\] where"),
        ("so <mask> !", r"found: <mask>, which is not how this model spells it\n  expected: \[MASK\]"),
        ("", r"has no mask"),
        (None, r"a text is needed\n  where: text 2\n  found: None"),
    ],
)
def test_a_text_without_a_mask(bert, text, message):
    with pytest.raises(InputError, match=message):
        FillMask(bert[0], Facts(model_type="bert", max_length=512)).encode(["a [MASK]", text])


def test_wrong_options(bert, roberta):
    facts = Facts(model_type="bert", max_length=512)
    with pytest.raises(InputError, match="top_k must be at least 1"):
        FillMask(bert[0], facts, top_k=0)
    with pytest.raises(InputError, match="unknown choice for long"):
        FillMask(bert[0], facts, long="cut")
    plain = Tokenizer(roberta[0].backend.from_str(roberta[0].backend.to_str().replace("<mask>", "<blank>")))
    with pytest.raises(InputError, match="has no mask token"):
        FillMask(plain, facts)
