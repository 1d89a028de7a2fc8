"""Batches depend on (seed, step) alone; validation scores every token once."""

from __future__ import annotations

import numpy as np
import pytest
from small import BATCH, CONTEXT, make_data, make_stream

from lmworks.base.errors import InputError
from lmworks.training.data import IGNORED, LEAST_CONTEXT, TokenWindows, draw
from lmworks.verbs.settings import RANGES


def test_a_batch_depends_on_seed_and_step_only() -> None:
    """C26: resume changes results, because the sampler's position is not saved. Here the step is the position."""
    data = make_data()
    first = data.batch(5)
    for step in (0, 9, 3):
        data.batch(step)
    again = make_data().batch(5)
    assert np.array_equal(first["input_ids"], again["input_ids"])
    assert not np.array_equal(first["input_ids"], data.batch(6)["input_ids"])
    assert not np.array_equal(first["input_ids"], make_data(seed=1).batch(5)["input_ids"])


def test_the_random_numbers_are_pinned() -> None:
    """A new numpy may not change what a seed means: Philox is specified, these are its first outputs."""
    assert draw(7, 3, 3).tolist() == PINNED
    assert len({*draw(7, 3, 9).tolist(), *draw(7, 3, 9, stream=1).tolist(), *draw(7, 4, 9).tolist()}) == 27


PINNED = [8893702929424106994, 13357943582879616415, 927023405073346982]


def test_a_batch_holds_windows_of_the_stream_and_the_tokens_after_them() -> None:
    stream = np.arange(CONTEXT + 30, dtype=np.uint16)
    data = TokenWindows(stream, context=CONTEXT, batch_size=200)
    batch = data.batch(0)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (200, CONTEXT)
    assert ids.dtype == labels.dtype == np.int64
    assert np.array_equal(ids, ids[:, :1] + np.arange(CONTEXT))
    assert np.array_equal(labels, ids + 1)
    assert set(ids[:, 0]) == set(range(30))  # every start, the last one included


@pytest.mark.parametrize("length", [2, 5, CONTEXT, CONTEXT + 1, CONTEXT + 2, 40, 41, 97])
def test_validation_scores_every_token_but_the_first_once(length: int) -> None:
    """C29: one strided definition of perplexity."""
    held_out = np.arange(length, dtype=np.uint16)
    data = TokenWindows(make_stream(50), held_out, context=CONTEXT, batch_size=3)
    scored = []
    for batch in data.validation():
        ids, labels = batch["input_ids"], batch["labels"]
        kept = labels != IGNORED
        assert np.array_equal(labels[kept], ids[kept] + 1)
        scored += labels[kept].tolist()
        seen = kept * np.arange(1, ids.shape[1] + 1)  # tokens that a scored one sees
        if ids[0, 0] > 0:
            assert seen[kept].min() >= CONTEXT // 2
    assert sorted(scored) == list(range(1, length))


def test_a_limited_validation_is_an_even_selection() -> None:
    held_out = np.arange(1000, dtype=np.uint16)
    data = TokenWindows(make_stream(50), held_out, context=CONTEXT, batch_size=BATCH)
    labels = np.concatenate([batch["labels"][batch["labels"] != IGNORED] for batch in data.validation(200)])
    assert 150 <= len(labels) <= 300
    assert len(set(labels)) == len(labels)
    gaps = np.diff(np.sort(labels))
    assert set(gaps) == {1, 3 * CONTEXT // 2 + 1}  # every fourth window, each half a context after the one before
    assert sum((batch["labels"] != IGNORED).sum() for batch in data.validation(10**9)) == 999


def test_a_text_shorter_than_a_window_is_refused_with_both_counts() -> None:
    TokenWindows(make_stream(CONTEXT + 1), context=CONTEXT, batch_size=1).batch(0)
    with pytest.raises(InputError) as error:
        TokenWindows(make_stream(CONTEXT), context=CONTEXT, batch_size=1)
    assert f"{CONTEXT} tokens" in error.value.found
    assert f"{CONTEXT + 1}" in error.value.expected
    for tokens, fix in ((60, "--context 15"), (9, "--context 8"), (8, "more text")):  # what is advised can be done
        with pytest.raises(InputError) as error:
            TokenWindows(make_stream(tokens), context=64, batch_size=1)
        assert error.value.fix.endswith(fix)
    assert RANGES["context"][0] == LEAST_CONTEXT
    with pytest.raises(InputError, match="validation text is too short"):
        TokenWindows(make_stream(50), make_stream(1), context=CONTEXT, batch_size=1)


def test_the_fingerprint_knows_the_data() -> None:
    one = make_data().fingerprint()
    assert one == make_data().fingerprint()
    changed = make_stream(700)
    changed[350] += 1
    other = TokenWindows(changed, make_stream(160, seed=1), context=CONTEXT, batch_size=BATCH)
    assert one not in {other.fingerprint(), make_data(batch_size=4).fingerprint(), make_data(seed=3).fingerprint()}
