"""What models read, and long texts in windows, against transformers on real text in three scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tokens.real_texts import real_texts
from tests.tokens.test_legacy import FOLDERS, MINILM
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError, InputError
from lmworks.tokens.tokenizer import Tokenizer

Both = tuple[Tokenizer, Any]


@pytest.fixture(scope="module", params=["minilm", "bert cased", "roberta", "roberta prefix", "gpt2 bos"])
def both(request: pytest.FixtureRequest, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Our tokenizer and transformers', of the same folder."""
    folder = MINILM
    if request.param != "minilm":
        folder = FOLDERS[request.param](tmp_path_factory.mktemp("folder"), data_folder)
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def questions(data_folder: Path) -> list[tuple[str, str]]:
    """Questions and the passages that answer them: English, Chinese, Russian."""
    rows = []
    for language in ("en", "zh", "ru"):
        articles = json.loads((data_folder / "xquad" / f"xquad.{language}.json").read_text("utf-8"))["data"]
        for article in articles[::12]:
            for paragraph in article["paragraphs"][:2]:
                rows.append((paragraph["qas"][0]["question"].strip(), paragraph["context"]))
    return rows


def columns(encoding: Any) -> list[Any]:
    """Return all that a task may look at, of one row."""
    return [
        *(encoding.ids, encoding.type_ids, encoding.offsets),
        *(encoding.special_tokens_mask, encoding.word_ids, encoding.sequence_ids),
    ]


def theirs_in(found: Any, i: int) -> list[Any]:
    keys = ("input_ids", "token_type_ids", "offset_mapping", "special_tokens_mask")
    return [*(found[key][i] for key in keys), found.word_ids(i), found.sequence_ids(i)]


WITH = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_token_type_ids": True}


def test_inputs_are_those_of_transformers(both: Both, data_folder: Path) -> None:
    """C31: offsets and sequences too, or no task can point into the text."""
    ours, theirs = both
    texts = real_texts(data_folder)
    rows: list[Any] = [*texts, *((a, b) for a, b in zip(texts, texts[7:], strict=False) if b)]
    for row, encoding in zip(rows, ours.encode_inputs(rows), strict=True):
        found = theirs([row] if isinstance(row, str) else [row[0]], None if isinstance(row, str) else [row[1]], **WITH)
        assert columns(encoding) == theirs_in(found, 0), row


@pytest.mark.parametrize(("length", "overlap"), [(48, 0), (64, 16), (96, 63 - 20)])
def test_windows_of_a_text_are_those_of_transformers(
    both: Both, questions: list[tuple[str, str]], length: int, overlap: int
) -> None:
    """C32: a text over the model's length is neither cut silently nor a crash."""
    ours, theirs = both
    several = 0
    for _, text in questions:
        windows = ours.encode_windows(text, length=length, overlap=overlap)
        found = theirs(
            [text], truncation=True, max_length=length, stride=overlap, return_overflowing_tokens=True, **WITH
        )
        assert [columns(window) for window in windows] == [theirs_in(found, i) for i in range(len(found["input_ids"]))]
        several += len(windows) > 1
    assert several >= 8


@pytest.mark.parametrize(("length", "overlap"), [(120, 0), (128, 32)])
def test_windows_after_a_question_are_those_of_transformers(
    both: Both, questions: list[tuple[str, str]], length: int, overlap: int
) -> None:
    """C31: question answering on a long context."""
    ours, theirs = both
    several = 0
    for question, text in questions:
        windows = ours.encode_windows(text, before=question, length=length, overlap=overlap)
        found = theirs(
            [question],
            [text],
            truncation="only_second",
            max_length=length,
            stride=overlap,
            return_overflowing_tokens=True,
            **WITH,
        )
        assert [columns(window) for window in windows] == [theirs_in(found, i) for i in range(len(found["input_ids"]))]
        several += len(windows) > 1
    assert several >= 8


def test_every_window_is_joined_by_itself_or_its_type_ids_are_lost(questions: list[tuple[str, str]]) -> None:
    """The library joins a question to all windows at once, but gives those after the first the wrong type ids."""
    ours = Tokenizer.from_pretrained(MINILM)
    question, text = questions[0]
    first = ours.backend.encode(question, add_special_tokens=False)
    rest = ours.backend.encode(text, add_special_tokens=False)
    rest.truncate(64 - 3 - len(first), stride=8)
    at_once = ours.backend.post_process(first, rest)
    by_itself = ours.encode_windows(text, before=question, length=64, overlap=8)
    assert at_once.type_ids == by_itself[0].type_ids
    right = [0] * (len(first) + 2)
    for window in by_itself:
        assert window.type_ids == right + [1] * (len(window.ids) - len(right))
    assert any(window.type_ids[len(right) :].count(0) for window in at_once.overflowing)


def test_windows_cover_the_text_and_overlap(both: Both, questions: list[tuple[str, str]]) -> None:
    ours, _ = both
    question, text = questions[0]
    whole = ours.encode(text)
    windows = ours.encode_windows(text, before=question, length=100, overlap=10)
    kept = [[id for id, part in zip(w.ids, w.sequence_ids, strict=True) if part == 1] for w in windows]
    joined = kept[0] + [id for part in kept[1:] for id in part[10:]]
    assert joined == whole
    assert all(len(window.ids) <= 100 for window in windows)
    assert [len(window.ids) for window in windows[:-1]] == [100] * (len(windows) - 1)
    short = ours.encode_windows("Hi", before="Who?", length=100, overlap=10)
    assert [columns(window) for window in short] == [columns(ours.encode_inputs([("Who?", "Hi")])[0])]


def test_no_room_is_said(both: Both) -> None:
    """C32."""
    ours, _ = both
    with pytest.raises(InputError, match="no room for the text"):
        ours.encode_windows("a text", before="a question that is long " * 9, length=32, overlap=8)
    with pytest.raises(InputError, match="no room for the text"):
        ours.encode_windows("a text", length=10, overlap=10)


def test_a_panic_in_any_call_becomes_an_error(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's panics derive from BaseException: one of them would end a server's loop."""

    class PanicException(BaseException):
        pass

    class Broken:
        """A backend whose every function panics."""

        overflowing: list[Any] = []

        def __getattr__(self, name: str) -> Any:
            def panic(*args: Any, **values: Any) -> Any:
                raise PanicException(name)

            return panic

    ours = Tokenizer(Broken())
    calls: list[Any] = [
        lambda: ours.encode("a"),
        lambda: ours.encode_inputs(["a"]),
        lambda: ours.encode_windows("a", length=9, overlap=0),
        lambda: ours.decode([1]),
        lambda: ours.token(1),
    ]
    for call in calls:
        with pytest.raises(FormatError):
            call()
    real, _ = both
    with pytest.raises(FormatError):
        real.token(-1)
    monkeypatch.setattr(real, "_bare", lambda text: Broken())
    with pytest.raises(FormatError, match="failed on this text"):
        real.encode_windows("a", length=9, overlap=0)
