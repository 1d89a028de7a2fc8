"""Light cleaning that changes nothing a reader would see: one Unicode form, one line end, no invisible characters."""

from __future__ import annotations

import re
import unicodedata

# control characters but tab and newline; the byte order mark; zero-width space; soft hyphen
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u200b\u00ad]")
TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{4,}")


def clean(text: str) -> str:
    """Return the text in Unicode's composed form, with \\n line ends, without invisible characters and trailing blanks.

    Lone surrogates become U+FFFD; more than two blank lines become two.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = INVISIBLE.sub("", text)
    return BLANK_LINES.sub("\n\n\n", TRAILING.sub("", text))
