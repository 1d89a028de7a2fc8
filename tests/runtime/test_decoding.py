"""The generation loop on a scripted runtime: what it writes, when it ends, and that no piece splits a character."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmworks.base.errors import InputError
from lmworks.runtime.decoding import generate
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.writing import Characters, StopStrings, overlap

EOS = 256


class Bytes:
    """A tokenizer with one token a byte: every character beyond ASCII is split over tokens."""

    eos_id = EOS

    def encode_prompt(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Script:
    """A runtime that says what it was told to say, and notes how it was asked."""

    name, dtype, vocab_size = "script", "fp32", 300
    turn = None

    def __init__(self, tokens: Sequence[int], *, max_length: int = 1000, delay: float = 0.0) -> None:
        self.tokens, self.max_length, self.delay = list(tokens), max_length, delay
        self.prompt: list[int] = []
        self.fed: list[int] = []

    def _next(self, said: int) -> np.ndarray:
        time.sleep(self.delay)
        return np.eye(self.vocab_size, dtype=np.float32)[[self.tokens[said]]] * 10

    def prefill(self, slots, input_ids):
        self.prompt, self.fed = list(input_ids[0]), []
        return self._next(0)

    def step(self, slots, input_ids):
        assert input_ids[0] == self.tokens[len(self.fed)], "the loop must feed the token that it chose"
        self.fed += input_ids
        assert len(self.prompt) + len(self.fed) <= self.max_length, "fed past the last position"
        return self._next(len(self.fed))

    def run(self, batch):
        (row,) = batch["input_ids"].tolist()
        assert len(row) <= self.max_length
        self.prompt = self.prompt or row
        assert row == self.prompt + self.tokens[: len(row) - len(self.prompt)]
        return {"logits": self._next(len(row) - len(self.prompt))[None]}


def script(text: str | bytes, *, end: bool = True, **options) -> Script:
    data = text.encode() if isinstance(text, str) else text
    return Script([*data, *([EOS] if end else [])], **options)


TEXT = "a é 日本 🧑‍🚀🇪🇺 ɲ\u0301 ok"


@pytest.mark.parametrize("use_cache", [True, False])
def test_multibyte_characters_are_never_split(use_cache):
    stream = generate(script(TEXT), Bytes(), "x", use_cache=use_cache)
    pieces = list(stream)
    assert "".join(pieces) == TEXT == stream.result.text
    assert pieces == list(TEXT), "one byte a token: each character comes alone, and as soon as it is complete"
    assert stream.result.tokens == [*TEXT.encode(), EOS]
    assert stream.result.finish_reason == "stop"


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=1, max_size=40))
def test_the_pieces_of_any_bytes_are_the_decoded_whole(data):
    """Invalid UTF-8 too: what can never become a character is shown as U+FFFD, neither lost nor held for ever."""
    stream = generate(script(data), Bytes(), "x")
    pieces = list(stream)
    assert "".join(pieces) == data.decode(errors="replace") == stream.result.text
    assert all(pieces)


@settings(deadline=None)
@given(st.lists(st.text(max_size=4), max_size=8), st.data())
def test_tokens_that_cut_anywhere_still_give_whole_characters(words, data):
    """Tokens of several bytes, cut at random places as merges may cut them: only whole, valid characters appear."""
    whole = "".join(words).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    class Parts:
        def decode(self, ids: Sequence[int]) -> str:
            return b"".join(parts[i] for i in ids).decode(errors="replace")

    characters, shown = Characters(Parts()), ""
    for i in range(len(parts)):
        shown += characters.push(i)
        before = b"".join(parts[: i + 1])
        valid = before.decode(errors="ignore")  # without an unfinished end
        assert shown == valid or shown == valid.removesuffix("\ufffd")
    assert shown + characters.flush() == whole.decode()


@settings(deadline=None)
@given(st.text(alphabet="ab é日本語😀\ufffd", max_size=12), st.booleans())
def test_byte_fallback_gives_whole_characters(text, after):
    """Llama's decoder shows a run of byte tokens as U+FFFD for each byte until all of the run is whole.

    And it takes the space off the first token: a text that goes on `after` a prompt keeps it.
    """
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)} | {"▁": 257, "a": 258, "b": 259, "▁a": 260}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    ids = backend.encode("▁" + text.replace(" ", "▁")).ids
    characters, shown = Characters(backend, [1, 259, 200] if after else ()), ""
    text = " " * after + text
    for id in ids:
        shown += characters.push(id)
        assert text.startswith(shown)
    assert shown + characters.flush() == text


def test_a_decoder_that_looks_at_the_token_before_keeps_its_spaces():
    class Words:
        def decode(self, ids: Sequence[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    characters = Characters(Words())
    assert [characters.push(i) for i in (5, 6, 7)] == ["w5", " w6", " w7"]


def test_an_unfinished_character_is_flushed_at_the_end():
    stream = generate(script("🙂".encode()[:3], end=False), Bytes(), "x", max_tokens=3)
    assert list(stream) == ["\ufffd"]
    assert stream.result.finish_reason == "length"


@pytest.mark.parametrize("ends", [[ord("!")], [7, ord("!"), 9], ord("!")])
def test_one_or_several_end_tokens(ends):
    stream = generate(script("ab!cd", end=False), Bytes(), "x", eos_ids=ends)
    assert "".join(stream) == "ab"
    assert stream.result.tokens == [*b"ab!"]
    assert stream.result.finish_reason == "stop"


def test_without_end_tokens_it_runs_to_the_limit():
    stream = generate(script("ab"), Bytes(), "x", eos_ids=[], max_tokens=3)
    assert "".join(stream) == "ab"
    assert stream.result.tokens == [*b"ab", EOS]
    assert stream.result.finish_reason == "length"


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_models_last_position_ends_it(use_cache):
    """A prompt of 5 in 8 positions: 3 tokens are read and the fourth is written from the last position."""
    runtime = script("abcdefgh", max_length=8)
    stream = generate(runtime, Bytes(), "12345", use_cache=use_cache, max_tokens=100)
    assert "".join(stream) == "abcd"
    assert stream.result.finish_reason == "length"


def test_a_prompt_of_exactly_the_models_length_still_gets_a_token():
    assert "".join(generate(script("abc", max_length=5), Bytes(), "12345")) == "a"


def test_a_prompt_longer_than_the_model_is_refused_at_once():
    """C32: never cut silently."""
    with pytest.raises(InputError) as caught:
        generate(script("abc", max_length=5), Bytes(), "123456")
    assert "6 tokens" in caught.value.found
    assert "5" in caught.value.expected


def test_an_empty_prompt_begins_with_the_end_token():
    runtime = script("abc")
    assert "".join(generate(runtime, Bytes(), "")) == "abc"
    assert runtime.prompt == [EOS]


def test_a_prompt_may_be_token_ids():
    runtime = script("abc")
    assert "".join(generate(runtime, Bytes(), [5, 6])) == "abc"
    assert runtime.prompt == [5, 6]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", "\n\n", "one"),
        ("one\ntwo", ["\n\n", "wo"], "one\nt"),
        ("aXYbXYZ", ["XYZ"], "aXYb"),
        ("ab日本", ["本"], "ab日"),
        ("abc", ["abcd"], "abc"),
        ("abcab", ["zz", "cab", "b"], "a"),
    ],
)
def test_stop_strings_cut_the_text_and_are_never_shown(text, stop, expected):
    stream = generate(script(text), Bytes(), "x", stop=stop)
    pieces = list(stream)
    assert "".join(pieces) == expected == stream.result.text
    assert stream.result.finish_reason == "stop"


def test_a_possible_stop_string_waits_and_the_rest_flows():
    stops = StopStrings(["END"])
    assert [stops.push(c) for c in "aENbEN"] == ["a", "", "", "ENb", "", ""]
    assert stops.flush() == "EN"
    several = StopStrings(["b", "cab"])
    assert (several.push("xcabb"), several.found) == ("x", True)
    assert (overlap("abc", "bcd"), overlap("abc", "abc"), overlap("", "a")) == (2, 0, 0)


def test_closing_the_stream_stops_the_model():
    runtime = script(TEXT)
    stream = generate(runtime, Bytes(), "x")
    assert next(stream) == "a"
    stream.close()
    assert list(stream) == []
    assert stream.result.tokens == [*b"a"]
    assert runtime.fed == []


def test_speed_leaves_out_the_first_token_and_the_reader():
    stream = generate(script("abcdef", end=False, delay=0.01), Bytes(), "x", max_tokens=5)
    for _ in stream:
        time.sleep(0.02)  # a slow reader is not a slow model
    assert 60 < stream.result.tokens_per_second < 100
    one = generate(script("a", end=False), Bytes(), "x", max_tokens=1)
    list(one)
    assert one.result.tokens_per_second is None


def test_the_repeat_penalty_sees_the_prompt_and_the_answer():
    class Loud(Script):
        def _next(self, said: int) -> np.ndarray:
            logits = np.zeros((1, self.vocab_size), np.float32)
            logits[0, [97, 98, 99]] = [3, 2.5, 2]
            return logits

        def step(self, slots, input_ids):
            return self._next(0)

    def write(prompt: str, **settings) -> str:
        return "".join(generate(Loud([]), Bytes(), prompt, sampling=Sampling(**settings), max_tokens=3))

    assert write("x") == "aaa"
    assert write("a", repeat_penalty=5.0) == "bca"
    assert write("a", repeat_penalty=5.0, repeat_last_n=1) == "bab"


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"stop": [""]}, {"stop": ""}])
def test_senseless_limits_are_refused(bad):
    with pytest.raises(InputError):
        generate(script("a"), Bytes(), "x", **bad)
