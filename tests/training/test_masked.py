"""Batches of hidden tokens: BERT's 80 / 10 / 10 by a statistical test, words whole, the loss that of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import save_model
from lmworks.tokens.batch import make_word_stream
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer
from lmworks.training.data import IGNORED
from lmworks.training.examples import HELD_MASKS, MASKS
from lmworks.training.masked import MaskedWindows
from lmworks.training.objectives import CausalLoss
from lmworks.training.trainer import Trainer
from lmworks.verbs.run import FRAME, make_model, make_network, train_config
from lmworks.verbs.settings import Settings

TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog. and the fox runs on, all night.\n" * 3
         for i in range(40)]  # fmt: skip
SIZES = {"bpe": 320, "wordpiece": 90}  # so small that words are cut


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS, kind=request.param, vocab_size=SIZES[request.param], special=FRAME)


def windows(tokenizer: Tokenizer, **changes: Any) -> MaskedWindows:
    """Return windows of the texts."""
    stream = make_word_stream(tokenizer, TEXTS)
    frame = tuple(tokenizer.find(*names) or 0 for names in (("cls_token", "[CLS]"), ("sep_token", "[SEP]")))
    settings: dict[str, Any] = {"context": 32, "batch_size": 16, **changes}
    return MaskedWindows(stream, stream, frame=frame, mask_id=tokenizer.mask_id or 0, vocab_size=tokenizer.vocab_size,
                         **settings)  # type: ignore[arg-type]  # fmt: skip


def test_words_are_numbered_through(tokenizer: Tokenizer) -> None:
    ids, words = make_word_stream(tokenizer, TEXTS)
    eos = tokenizer.eos_id
    assert (ids == eos).sum() == len(TEXTS)
    assert (words[ids == eos] == -1).all()
    real = words[words >= 0]
    assert (np.diff(real) >= 0).all()
    assert set(real.tolist()) == set(range(real.max() + 1))
    parts: dict[int, list[int]] = {}
    for id, word in zip(ids.tolist(), words.tolist(), strict=True):
        parts.setdefault(word, []).append(id)
    known = [i for text in TEXTS for i in tokenizer.encode(text)]
    assert [i for word, some in sorted(parts.items()) if word >= 0 for i in some] == known
    said = [tokenizer.decode(parts[word]).strip() for word in range(9)]
    assert [word for word in said if word][:5] == ["the", "quick", "brown", "fox", "number"]


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_hidden_follows_bert(tokenizer: Tokenizer, whole: bool) -> None:
    """15 % are chosen; of them 80 % become the mask, 10 % any token, 10 % stay: chi-square, not a tolerance."""
    data = windows(tokenizer, whole_words=whole)
    frame, eos, mask = set(data.frame), tokenizer.eos_id, tokenizer.mask_id
    counts, chosen, total, replaced = np.zeros(3), 0, 0, []
    for step in range(120):
        batch = data.batch(step)
        ids, labels = batch["input_ids"], batch["labels"]
        hidden = labels != IGNORED
        before = np.where(hidden, labels, ids)
        assert (before[:, 0] == data.frame[0]).all()
        assert (before[:, -1] == data.frame[1]).all()
        assert not np.isin(before[:, 1:-1], list(frame)).any()
        assert not hidden[np.isin(before, [*frame, eos])].any()
        masked, same = hidden & (ids == mask), hidden & (ids == labels)
        counts += [masked.sum(), same.sum(), (hidden & ~masked & ~same).sum()]
        replaced += ids[hidden & ~masked & ~same].tolist()
        chosen, total = chosen + int(hidden.sum()), total + int((~np.isin(before, [*frame, eos])).sum())
    V = tokenizer.vocab_size
    stays, other = 0.1 + 0.1 / V, 0.1 - 0.2 / V  # a random token is itself, or the mask, one time in V
    expected = np.array([0.8 + 0.1 / V, stays, other]) * counts.sum()
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.001, counts
    if not whole:
        assert stats.binomtest(chosen, total, 0.15).pvalue > 0.001
    assert chosen / total == pytest.approx(0.15, abs=0.012)
    spread = np.bincount(replaced, minlength=tokenizer.vocab_size)
    assert stats.chisquare(spread).pvalue > 1e-6 or spread.min() == 0  # every token can come
    assert (spread > 0).mean() > 0.9


def test_whole_words_are_hidden_whole(tokenizer: Tokenizer) -> None:
    stream = make_word_stream(tokenizer, TEXTS)
    for whole in (False, True):
        data, parted = windows(tokenizer, whole_words=whole), 0
        places = np.arange(0, len(stream[0]) - data.room, data.room)[:, None] + np.arange(data.room)
        hidden = data.hide(stream, places, 0, 0)["labels"][:, 1:-1] != IGNORED
        for row, words in zip(hidden, stream[1][places], strict=True):
            for word in set(words[words >= 0].tolist()):
                parted += bool(row[words == word].any() != row[words == word].all())
        assert (parted == 0) is whole


def test_every_held_out_token_comes_by_once_and_the_same_ones_are_hidden(tokenizer: Tokenizer) -> None:
    data = windows(tokenizer)
    ids = np.concatenate([np.where(b["labels"] != IGNORED, b["labels"], b["input_ids"])[:, 1:-1].ravel()
                          for b in data.validation()])  # fmt: skip
    np.testing.assert_array_equal(ids, make_word_stream(tokenizer, TEXTS)[0][: len(ids)])
    assert len(ids) > len(make_word_stream(tokenizer, TEXTS)[0]) - data.room
    again = [[b["labels"] for b in data.validation()] for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*again, strict=True))
    same = np.arange(30)[None]
    learned, judged = (data.hide(data.train, same, 3, kind)["labels"] for kind in (MASKS, HELD_MASKS))
    assert not np.array_equal(learned, judged)
    few = sum(int((b["labels"] != IGNORED).sum()) for b in data.validation(60))
    assert 20 < few < 200
    assert not np.array_equal(data.batch(0)["labels"], data.batch(1)["labels"])
    np.testing.assert_array_equal(data.batch(5)["labels"], windows(tokenizer).batch(5)["labels"])
    assert data.fingerprint() != windows(tokenizer, whole_words=True).fingerprint()
    with pytest.raises(InputError, match="shorter than one window"):
        windows(tokenizer, context=100_000)


@pytest.mark.parametrize(
    ("family", "published"), [("bert", "BertForMaskedLM"), ("modernbert", "ModernBertForMaskedLM")]
)
def test_loss_is_that_of_transformers(tokenizer: Tokenizer, tmp_path: Path, family: str, published: str) -> None:
    settings = Settings(objective="masked-lm", family=family, hidden_size=32, layers=3, heads=2, context=32)  # type: ignore[arg-type]
    shape = make_network(settings, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, bos_token_id=0,
                         eos_token_id=0)  # fmt: skip
    model = make_model(shape, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(model, tmp_path)
    reference = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for step in range(3):
        batch = {name: torch.from_numpy(array) for name, array in windows(tokenizer).batch(step).items()}
        with torch.no_grad():
            theirs = reference(input_ids=batch["input_ids"], labels=batch["labels"]).loss
            ours = CausalLoss()(model, batch) / CausalLoss().count({"labels": batch["labels"].numpy()})
        assert float(ours) == pytest.approx(float(theirs), rel=2e-6)


def test_a_killed_run_ends_with_the_same_bits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "context": 32,
        "batch_size": 4,
        "steps": 14,
    }
    settings = Settings(objective="masked-lm", dtype="fp32", dropout=0.1, eval_every=4, **knobs).resolve(10_000)

    def make(folder: Path) -> Trainer:
        model = make_model(make_network(settings, vocab_size=tokenizer.vocab_size, pad_token_id=1), seed=0)
        return Trainer(model, objective=CausalLoss(), data=windows(tokenizer, batch_size=4), folder=folder,
                       config=train_config(settings))  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.fit()
    killed = make(tmp_path / "killed")
    step = killed.train_step

    def limited() -> None:
        if killed.state.step == 6:
            raise RuntimeError("killed")
        step()
        killed.save()

    killed.train_step = limited  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="killed"):
        killed.fit()
    again = make(tmp_path / "killed")
    again.fit()
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
