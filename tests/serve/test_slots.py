"""Continuous batching against one text at a time, over the real ONNX runtime of the tiny writer."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_page import PROMPTS, made_folder

from lmworks.base.errors import LmworksError
from lmworks.runtime.decoding import begin
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.predictor import Predictor, load
from lmworks.runtime.sampling import Sampling
from lmworks.serve.slots import LateError, Slots, shared


class Heard:
    """Collects what the slots tell."""

    def __init__(self) -> None:
        self.pieces: dict[int, str] = {}
        self.done: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}

    def __call__(self, request: int, what: str, value: Any) -> None:
        if what == "piece":
            self.pieces[request] = self.pieces.get(request, "") + value[0]
        elif what == "done":
            self.done[request] = value
        else:
            self.errors[request] = value


@pytest.fixture(scope="module")
def alone() -> Predictor:
    """The same model with one slot."""
    return load(made_folder(), runtime="onnx")


@pytest.fixture
def heard() -> Heard:
    return Heard()


def make(heard: Heard, count: int = 3, dtype: str = "fp32") -> Slots:
    """Return slots over the tiny writer."""
    return Slots(OnnxRuntime(made_folder(), dtype=dtype, slots=count), count, heard)


def writer(predictor: Predictor, prompt: str, tokens: int = 20, **sampling: Any) -> Any:
    """Return the Writer of a prompt."""
    return begin(predictor.tokenizer, prompt, max_length=predictor.runtime.max_length, max_tokens=tokens,
                 sampling=Sampling(**sampling), eos_ids=predictor.eos_ids)  # fmt: skip


def finish(slots: Slots, turns: int = 1000) -> None:
    """Take turns until nothing waits."""
    for _ in range(turns):
        if not slots.turn() and not slots.line:
            return
    raise AssertionError("it never ends")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_texts_written_together_are_those_written_alone(dtype: str, heard: Heard) -> None:
    """int8 too: a step there never holds two texts."""
    single = load(made_folder(), runtime="onnx", dtype=dtype)
    slots = make(heard, 3, dtype)
    settings = [{"temperature": 0.0}, {"temperature": 1.2, "seed": 3}, {"temperature": 0.7, "top_k": 5, "seed": 4}]
    jobs = [(prompt, settings[i % 3], 5 + 7 * (i % 4)) for i, prompt in enumerate([*PROMPTS, *PROMPTS])]
    for number, (prompt, how, tokens) in enumerate(jobs):
        slots.add(number, writer(single, prompt, tokens, **how), time.monotonic() + 60)
    finish(slots)
    for number, (prompt, how, tokens) in enumerate(jobs):
        expected = single.generate(prompt, max_tokens=tokens, **how)
        assert heard.pieces.get(number, "") == expected.text
        assert heard.done[number].writer.tokens == expected.tokens
    assert not heard.errors
    assert slots.active == 0


def test_slots_step_together_and_a_free_one_is_taken_at_once(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 2)
    for number, tokens in enumerate((30, 4, 26)):
        slots.add(number, writer(alone, PROMPTS[number], tokens), time.monotonic() + 60)
    finish(slots)
    assert slots.steps <= 34, "58 tokens one after the other would need 57 steps"


def test_a_prompt_that_begins_alike_is_read_once(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 2)
    start = "The small bird sees the river. The old fox finds a café. "
    slots.add(1, writer(alone, start, 6), time.monotonic() + 60)
    finish(slots)
    read = slots.read_tokens
    longer = start + heard.pieces[1] + " Who sings to nobody?"
    slots.add(2, writer(alone, longer, 8), time.monotonic() + 60)
    finish(slots)
    assert heard.done[2].reused >= len(alone.tokenizer.encode_prompt(start)) - 1
    assert slots.read_tokens - read < len(alone.tokenizer.encode_prompt(longer)) / 2
    assert heard.pieces[2] == alone.generate(longer, max_tokens=8).text
    slots.add(3, writer(alone, start, 6), time.monotonic() + 60)  # the same prompt again: its last token is read
    finish(slots)
    assert heard.pieces[3] == heard.pieces[1]


def test_conversations_in_turn_keep_a_slot_each(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 2)
    prompts = ("The small bird sees the river. " * 4, "Who sings to nobody? " * 6)
    for number, prompt in enumerate(prompts * 2):
        slots.add(number, writer(alone, prompt, 3), time.monotonic() + 60)
        finish(slots)
    assert [heard.done[number].reused > 0 for number in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_what_was_asked_before_changes_no_answer(dtype: str, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 rounds by call: there whole parts of a prompt are kept, and nothing that was read otherwise."""
    monkeypatch.setattr("lmworks.serve.slots.PART", 16)
    single, slots = load(made_folder(), runtime="onnx", dtype=dtype), make(heard, 1, dtype)
    long = "The small bird sees the river — today. The old fox paints two hats. Who sings?"
    for number, prompt in enumerate((long, long, long + " The old", long)):
        one = writer(single, prompt, 6)
        one.limits = replace(one.limits, logprobs=0)
        slots.add(number, one, time.monotonic() + 60)
        finish(slots)
    first, second, _, last = ([one.logprob for one in heard.done[i].writer.chosen] for i in range(4))
    assert heard.done[1].reused == (len(heard.done[1].prompt) - 1 if dtype == "fp32" else 16)
    assert (first == second == last) if dtype == "int8" else np.allclose([first, first], [second, last], atol=1e-5)


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others(
    alone: Predictor, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmworks.serve.slots.PART", 8)
    slots = make(heard, 2)
    slots.add(1, writer(alone, "Who", 30), time.monotonic() + 60)
    slots.turn()
    long = "The small bird sees the river — today. The old fox paints two hats. Who sings?"
    slots.add(2, writer(alone, long, 5), time.monotonic() + 60)
    parts = -(-len(alone.tokenizer.encode_prompt(long)) // 8)
    for _ in range(parts):
        before = len(heard.pieces.get(1, ""))
        slots.turn()
        assert len(heard.pieces[1]) >= before
    assert slots.slots[0].text is not None and len(slots.slots[0].text.writer.tokens) == parts + 1
    finish(slots)
    assert heard.pieces[2] == alone.generate(long, max_tokens=5).text


def test_a_cancelled_text_frees_its_slot(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 1)
    for number in (1, 2, 3):
        slots.add(number, writer(alone, PROMPTS[number], 40), time.monotonic() + 60)
    slots.turn()
    slots.cancel(1)
    slots.cancel(2)
    slots.turn()
    assert slots.active == 1 and slots.slots[0].text is not None and slots.slots[0].text.request == 3
    finish(slots)
    assert set(heard.done) == {3}


def test_a_text_that_waited_too_long_is_told_so(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 1)
    slots.add(1, writer(alone, "Who", 10), time.monotonic() + 60)
    slots.add(2, writer(alone, "Who", 10), time.monotonic() - 1)
    finish(slots)
    assert isinstance(heard.errors[2], LateError) and 1 in heard.done


def test_what_goes_wrong_with_one_text_is_told_to_it_alone(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 2)
    bad = writer(alone, "Who", 10)
    bad.history[:] = [10**6]
    slots.add(1, writer(alone, "Who", 10), time.monotonic() + 60)
    slots.add(2, bad, time.monotonic() + 60)
    finish(slots)
    assert heard.pieces[1] == alone.generate("Who", max_tokens=10).text
    assert isinstance(heard.errors[2], LmworksError)


def test_logits_that_are_not_numbers_end_their_text_alone(alone: Predictor, heard: Heard) -> None:
    slots = make(heard, 2)
    step = slots.runtime.step

    def broken(rows: Any, ids: Any) -> Any:
        logits = step(rows, ids).copy()
        logits[list(rows).index(1)] = np.nan
        return logits

    for number in (0, 1):
        slots.add(number, writer(alone, PROMPTS[number], 10), time.monotonic() + 60)
    slots.turn()
    slots.turn()
    slots.runtime.step = broken  # type: ignore[method-assign]
    slots.turn()
    slots.runtime.step = step  # type: ignore[method-assign]
    finish(slots)
    assert heard.pieces[0] == alone.generate(PROMPTS[0], max_tokens=10).text
    assert "finite" in str(heard.errors[1])


def test_how_two_sequences_begin_alike() -> None:
    assert [shared([1, 2, 3], [1, 2, 4]), shared([1], [1, 2]), shared([], [1]), shared([2], [1])] == [2, 1, 0, 0]
