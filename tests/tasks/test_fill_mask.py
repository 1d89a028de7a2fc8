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


def sharpen(model, head, tokenizer, texts):
    """Scale a head until the best six tokens of every mask are at least 1e-3 apart somewhere, and never equal."""
    scale(head, 3.0)
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = minilm(tmp_path_factory.mktemp("bert"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = make("BertForMaskedLM", tokenizer, tie_word_embeddings=False)
    scale(model.cls.predictions.decoder, 4.0)
    return Tokenizer.from_pretrained(folder), tokenizer, model


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, data_folder):
    folder = roberta_tokenizer(data_folder, tmp_path_factory.mktemp("roberta"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {"pad_token_id": 1, "max_position_embeddings": 514, "type_vocab_size": 1, "tie_word_embeddings": False}
    model = make("RobertaForMaskedLM", tokenizer, **settings)
    scale(model.lm_head.decoder, 4.0)
    return Tokenizer.from_pretrained(folder), tokenizer, model


def pipeline(tokenizer, model, **options):
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu", **options)


def same(found, wanted):
    """Check the fills of one mask; the pipeline's tokens may not be closer than what float64 tells apart."""
    assert near([fill.score for fill in found], [row["score"] for row in wanted], 1e-9)
    for fill, row in zip(found, wanted, strict=True):
        assert (fill.token, fill.token_str, fill.sequence) == (row["token"], row["token_str"], row["sequence"])
    return found[0].score - found[1].score
