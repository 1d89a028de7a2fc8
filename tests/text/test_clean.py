"""Light cleaning: what goes, what stays, and that a second time changes nothing."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from lmworks.text.clean import clean


def test_examples() -> None:
    assert clean("e\u0301\r\nb\rc\x0cd\u2028e") == "é\nb\nc\nd\ne"
    assert clean("\ufeffa\x00b\x1b[0m\tc\x7f so\u00adft") == "ab[0m\tc soft"
    assert clean("a  \t\n  b \n") == "a\n  b\n"
    assert clean("a\n\n\nb\n\n \n\n\nc") == "a\n\n\nb\n\n\nc"
    assert clean("x\ud800y") == "x\ufffdy"
    assert clean("می‌خواهم \u200d") == "می‌خواهم \u200d"  # joiners carry meaning


@given(st.text(st.characters(exclude_categories=())))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not {c for c in once if unicodedata.category(c) in ("Cc", "Cs")} - {"\n", "\t"}


def test_real_text_is_hardly_touched(data_folder: Path) -> None:
    text = (data_folder / "tinyshakespeare" / "input.txt").read_text("utf-8")
    assert len(text) - len(clean(text)) == 4  # blanks at the end of two lines
    assert clean(text) == re.sub(" +\n", "\n", text)


def test_mojibake_is_mended_only_on_request(data_folder: Path) -> None:
    cases = json.loads((data_folder / "dirty" / "mojibake" / "in-the-wild.json").read_text("utf-8"))
    right = [clean(case.get("fixed-encoding", case["fixed"])) for case in cases]
    mended = sum(clean(case["original"], mojibake=True) == text for case, text in zip(cases, right, strict=True))
    assert mended >= 0.9 * len(cases)
    assert sum(clean(case["original"]) == text for case, text in zip(cases, right, strict=True)) < 0.1 * len(cases)
    for case in json.loads((data_folder / "dirty" / "mojibake" / "negative.json").read_text("utf-8")):
        kept = clean(case.get("fixed-encoding", case["fixed"]))
        assert clean(case["original"], mojibake=True) == kept, case["label"]
