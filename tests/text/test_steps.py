"""The named steps: what each changes, and what it leaves alone."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest

from lmworks.base.errors import InputError
from lmworks.text.boilerplate import drop_boilerplate
from lmworks.text.clean import DEFAULT_STEPS, STEPS, choose_steps
from lmworks.text.html import main_text


@pytest.mark.parametrize("kind", ["in-the-wild", "synthetic", "language-names", "negative"])
def test_every_case_of_ftfy_is_mended_and_nothing_else_is_touched(kind: str, data_folder: Path) -> None:
    """Of the negative cases one holds a control character, which is to become "…"; the others stay letter by letter."""
    cases = json.loads((data_folder / "dirty" / "mojibake" / f"{kind}.json").read_text("utf-8"))
    found = {case["label"]: STEPS["mojibake"](case["original"]) for case in cases}
    assert found == {case["label"]: case.get("fixed-encoding", case["fixed"]) for case in cases}
    if kind == "negative":
        assert sum(found[case["label"]] != case["original"] for case in cases) == 1


def test_known_failures_are_left_as_they_were(data_folder: Path) -> None:
    cases = json.loads((data_folder / "dirty" / "mojibake" / "known-failures.json").read_text("utf-8"))
    wrong = [c for c in cases if STEPS["mojibake"](c["original"]) != c.get("fixed-encoding", c["fixed"])]
    assert len(wrong) == len(cases) == 10  # ftfy's own figure; fewer would be news


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        ("nfc", "e\u0301", "é"),
        ("nfkc", "ﬁne ①", "fine 1"),
        ("controls", "a\x00b\r\nc\ud800\x07", "ab\nc\ufffd"),
        ("blanks", "a \n\n\n\n\nb\t", "a\n\n\nb"),
        ("markup", "<p>5 &lt; 6 <b class='x'>bold</b><br/>a&nbsp;b</p><!-- no -->", "\n5 < 6 bold\na\xa0b\n"),
        ("markup", "<script>a = '<b>'</script>if a<b and c>d: <unk> <|end|>", "if a<b and c>d: <unk> <|end|>"),
        ("markdown", "# A *b* __c__ #\n* [d](e) ![f](g \"h\")\n> `i` 2 * 3 * 4 snake_case_name\n---\n```py\nx\n```\n",
         "A b c\nd f\ni 2 * 3 * 4 snake_case_name\nx\n"),
        ("lower", "ÀÉ İ", "àé i̇"),
        ("punctuation", "Don't stop, now! «Ja» 中文。好", "Dont stop now Ja 中文 好"),
        ("symbols", "5 € + 3 $ 🙂", "5 3"),
        ("digits", "in 1984, ٣ cats", "in , cats"),
        ("mask-email", "Write to ann.b+c@mail.example.co.uk, or a@b. @me", "Write to [EMAIL], or a@b. @me"),
        ("mask-url", "see https://a.b/c?d=e, or www.f.org.", "see [URL], or [URL]."),
        ("mask-phone", "call +44 20 7946 0958, (030) 1234567, 030/1234567 or 212-555-0123",
         "call [PHONE], [PHONE], [PHONE] or [PHONE]"),
        ("mask-phone", "on 2024-11-21 and 1,234,567 of 1914-1918, pi 3.14159265 at 10:30", None),
        ("mask-id", "DE89 3704 0044 0532 0130 00, 4111 1111 1111 1111, 078-05-1120, 192.168.0.1, 2001:db8::1",
         "[ID], [ID], [ID], [ID], [ID]"),
        ("mask-id", "DE88 3704 0044 0532 0130 00, 4111 1111 1111 1112, at 10:30:00, v1.2.3, 1.2.3.400", None),
    ],
)  # fmt: skip
def test_steps(step: str, before: str, after: str | None) -> None:
    assert STEPS[step](before) == (before if after is None else after)


def test_the_default_steps_leave_clean_text_alone(data_folder: Path) -> None:
    for path in sorted((data_folder / "udhr").glob("*.txt")):
        text = before = path.read_text("utf-8")
        for step in DEFAULT_STEPS.split(","):
            text = STEPS[step](text)
        kept = re.sub(r"[ \t]+$", "", unicodedata.normalize("NFC", before), flags=re.MULTILINE)
        assert re.sub(r"\n{4,}", "\n\n\n", kept) == text, path.stem


def test_a_step_that_does_not_exist_is_refused() -> None:
    assert choose_steps(["lower", "nfc"]) == ("lower", "nfc")
    with pytest.raises(InputError, match=r'no cleaning step "lowre"[\s\S]*did you mean "lower"'):
        choose_steps(["lowre"])


HEADER = "The Project Gutenberg EBook of X\n\nTitle: X\n\n"
START, END = "*** START OF THE PROJECT GUTENBERG EBOOK {} ***\n", "*** END OF THE PROJECT GUTENBERG EBOOK {} ***\n"
LICENCE = "\nSection 1. General Terms of Use of Project Gutenberg\n" * 3


def test_gutenberg(data_folder: Path) -> None:
    book = (data_folder / "books" / "botchan.txt").read_text("utf-8-sig")
    kept = drop_boilerplate(book)
    assert "gutenberg" not in kept.lower() and "Produced by" not in kept
    assert (
        kept.split() == book[book.index("BOTCHAN (MASTER DARLING)\nBy The") : book.index("End of Project Gut")].split()
    )
    for name in ("bronte", "darwin", "dubois"):  # collections without notices
        text = (data_folder / "books" / f"{name}.txt").read_text("utf-8")
        assert drop_boilerplate(text) == text


def test_several_books_and_parts_of_books() -> None:
    one = HEADER + START.format("X") + "Produced by A. B.\n\nChapter 1\n" + END.format("X") + LICENCE
    assert drop_boilerplate(one) == "Chapter 1\n"
    assert drop_boilerplate(one + one.replace("Chapter 1", "Chapter 2")) == "Chapter 1\n\nChapter 2\n"
    assert drop_boilerplate("the end.\n" + END.format("X") + LICENCE) == "the end.\n"  # as of a file's last part
    assert drop_boilerplate(one[: one.index("*** END")]) == "Chapter 1\n"  # as of a file's first part
    novel = "He read about Project Gutenberg.\nEnd of story.\n"
    assert drop_boilerplate(novel) == novel


def test_markup_leaves_no_words_glued_and_no_tag_with_a_bare_attribute() -> None:
    table = "<table><tr><th>Name</th><th>Age</th></tr>\n<tr><td nowrap>Ann</td> <td>7</td></tr></table>"
    assert STEPS["markup"](table).split() == ["Name", "Age", "Ann", "7"]
    assert STEPS["markup"]("<title>A</title><pre>b</pre><dl><dt>c</dt><dd>d</dd></dl>").split() == ["A", "b", "c", "d"]
    for tag in (
        "<input disabled>",
        "<details open>",
        '<img src=x alt="a > b">',
        "<video controls loop>",
        "<hr noshade/>",
    ):
        assert STEPS["markup"](f"x {tag}y").split() in (["x", "y"], ["x y"])
    for text in ("if a<b and b>c", "the a <time of day> b", "x <p q r> y", "<unk>"):
        assert STEPS["markup"](text) == text


def test_a_page_that_is_one_form_has_its_text() -> None:
    text = "All of this page stands in a form, as ASP.NET writes it."
    search = "<form><label>Search this site</label><input></form>"
    assert main_text(f"<body><form id='aspnetForm'><div><p>{text}</p></div></form></body>") == text
    assert main_text(f"<body>{search}<p>{text}</p></body>") == text


@pytest.mark.parametrize(
    ("step", "text", "masked"),
    [
        ("mask-email", "имя@пример.рф, o'brien@example.com; 'a@b.com'", "[EMAIL], [EMAIL]; '[EMAIL]'"),
        ("mask-email", "写信给 john@x.com的人 100%sure@x.de", "写信给 [EMAIL]的人 [EMAIL]"),
        ("mask-email", "a@xn--e1afmkfd.xn--p1ai ?q=bob@x.com", "[EMAIL] ?q=[EMAIL]"),
        ("mask-phone", "06 12 34 56 78 or 01.23.45.67.89", "[PHONE] or [PHONE]"),
        ("mask-phone", "1-800-555-1234, 555 213 4567 (Tel.+15551234567)", "[PHONE], [PHONE] (Tel.[PHONE])"),
        ("mask-phone", "Lee (2003) 1234 of 100 200 3000, (1999) 20 30 40", None),
        ("mask-phone", "DE89 3704 0044 0532 0130 00, 0301 234567", "DE89 3704 0044 0532 0130 00, [PHONE]"),
        ("mask-phone", "a slope of +0.1234567 a year", None),
        ("mask-id", "192.168.0.1:8080 from 00-1A-2B-3C-4D-5E", "[ID]:8080 from [ID]"),
        ("mask-id", "C::D ab::cd std::vector ba::ad 1.2.3.4.5", None),
    ],
)
def test_more_of_what_masks_find_and_leave(step: str, text: str, masked: str | None) -> None:
    assert STEPS[step](text) == (text if masked is None else masked)
