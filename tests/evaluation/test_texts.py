"""Scores of texts by the piece against all of them at once, and the entropy of what a model expects against scipy's."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.evaluation import texts as module
from lmworks.evaluation.perplexity import bits_per_byte, entropy_of, token_logprobs
from lmworks.evaluation.texts import BLOCK, TextScores, block_ends, lines_of, score_lines, score_texts
from lmworks.tokens.batch import make_stream
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

LINES = ["the cat sat on the mat", "a dög barked – twice", "", "rain fell all day long", "it was late, and nobody came"]


class Sum:
    """A model whose logits depend on every token of the window so far."""

    name, dtype, max_length = "toy", "fp32", 16
    turn = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.table = np.random.default_rng(0).normal(size=(vocab_size, vocab_size)).astype(np.float32)

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        return {"logits": np.cumsum(self.table[batch["input_ids"]], axis=1) * 0.3}

    def prefill(self, slots: Any, input_ids: Any) -> Any:
        raise NotImplementedError

    def step(self, slots: Any, input_ids: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["\n".join(LINES * 5)], kind="bpe", vocab_size=300)


def documents(count: int, lines: int) -> list[str]:
    rng = np.random.default_rng(count)
    return ["\n".join(LINES[i] for i in rng.integers(0, len(LINES), lines)) + "\n" for _ in range(count)]


@pytest.mark.parametrize("count,lines,windows", [(1, 4, 64), (1, 3, 2), (1, 200, 3), (7, 40, 2), (40, 9, 64)])
def test_a_piece_at_a_time_is_all_at_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, count: int, lines: int, windows: int
) -> None:
    monkeypatch.setattr(module, "WINDOWS", windows)
    model, texts = Sum(tokenizer.vocab_size), documents(count, lines)
    whole = token_logprobs(model, make_stream(tokenizer, texts), context=16, entropy=True)
    size = sum(len(text.encode()) for text in texts)
    found = score_texts(model, tokenizer, texts)
    values = found.values()
    assert values["perplexity"] == pytest.approx(whole.perplexity, rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(bits_per_byte(whole.logprobs, size), rel=1e-6)
    assert values["next_token_accuracy"] == pytest.approx(whole.accuracy)
    assert whole.entropy is not None
    assert values["entropy"] == pytest.approx(whole.entropy.mean() / math.log(2), rel=1e-6)
    words = sum(len(text.split()) for text in texts)
    assert values["perplexity_per_word"] == pytest.approx(math.exp(-whole.logprobs.sum() / words), rel=1e-6)
    assert (values["tokens"], values["bytes"], values["words"]) == (len(whole.logprobs), size, words)
    assert found.units[0] == ("documents" if count >= 30 else "blocks")
    by_document = [token_logprobs(model, make_stream(tokenizer, texts), context=16).logprobs]
    ends = np.cumsum([len(tokenizer.encode(text)) + 1 for text in texts])
    costs = [-part.sum() for part in np.split(by_document[0], ends[:-1])]
    of = np.array(found.documents)
    assert [found.sums[of == i, 0].sum() for i in range(count)] == pytest.approx(costs, rel=1e-5)


def test_entropy() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 5, 40)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    theirs = stats.entropy(p / p.sum(-1, keepdims=True), axis=-1)
    np.testing.assert_allclose(entropy_of(logits), theirs, rtol=1e-5)
    logits[0, 0, 3:] = -np.inf
    assert np.isfinite(entropy_of(logits)).all()


def test_blocks_depend_on_the_text_alone(tokenizer: Tokenizer) -> None:
    text = documents(1, 500)[0]
    ends = block_ends(text)
    assert ends[-1] == len(text)
    assert len(ends) > 5
    assert all(text[end - 1] == "\n" and BLOCK <= end - start < BLOCK + 60
               for start, end in zip([0, *ends], ends[:-1], strict=False))  # fmt: skip
    assert block_ends("") == [0]
    assert block_ends("a" * 5000) == [5000]
    other = train_tokenizer(["\n".join(LINES * 5)], kind="char", vocab_size=300)
    scored = [score_texts(Sum(one.vocab_size), one, [text]) for one in (tokenizer, other)]
    np.testing.assert_array_equal(scored[0].sums[:, 4:], scored[1].sums[:, 4:])
    lines = lines_of(text)
    counted = TextScores()
    score_lines(text, np.full(len(lines), 2.0), np.full(len(lines), 7), counted)
    np.testing.assert_array_equal(counted.sums[:, 4:], scored[0].sums[:, 4:])
    assert counted.values()["perplexity"] == pytest.approx(math.exp(2 / 7))
    assert counted.values()["next_token_accuracy"] is None
    assert scored[0].sums[:, 1].sum() == len(tokenizer.encode(text)) + 1
    single = text.replace("\n\n", "\n").strip("\n") + "\n"  # no token crosses a line end
    ends = block_ends(single)
    inside = [len(tokenizer.encode(single[a:b])) for a, b in zip([0, *ends], ends, strict=False)]
    inside[-1] += 1  # the end of the document
    assert score_texts(Sum(tokenizer.vocab_size), tokenizer, [single]).sums[:, 1].tolist() == inside


def test_what_is_lost_leaves_nothing_to_say_about_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = train_tokenizer(["\n".join(LINES * 5)], kind="word", vocab_size=300)
    values = score_texts(Sum(words.vocab_size), words, documents(2, 30)).values()
    assert values["bits_per_byte"] is None
    assert values["perplexity_per_word"] is None
    assert values["perplexity"] is not None
    monkeypatch.setattr(Tokenizer, "eos_id", None)
    with pytest.raises(InputError, match="ends a document"):
        score_texts(Sum(words.vocab_size), words, documents(2, 30))


def test_memory_does_not_follow_the_text(tokenizer: Tokenizer) -> None:
    model, peaks = Sum(tokenizer.vocab_size), []
    for count in (30, 120):
        tracemalloc.start()
        score_texts(model, tokenizer, (text for i in range(count) for text in documents(1, 60)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks
