"""Light cleaning that changes nothing a reader would see: one Unicode form, one line end, no invisible characters."""

from __future__ import annotations

import re
import unicodedata

from lmworks.base.optional import require

LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\ufeff]")  # control characters, soft hyphen, byte order mark
SURROGATES = re.compile("[\ud800-\udfff]")
TOO_BLANK = re.compile(r"\n{4,}")


def clean(text: str, *, mojibake: bool = False) -> str:
    r"""Return the text in Unicode's composed form (NFC) with \n line ends: " e\u0301 \r\n" -> " é\n".

    Control characters but tab and newline, soft hyphens and byte order marks go, as do blanks at the end of a line
    and blank lines after the second. A lone surrogate becomes U+FFFD. Joiners and other marks that a script needs
    stay. `mojibake` also mends text that was decoded wrongly, "caf\u00c3\u00a9" -> "café" (needs the [data] extra).
    """
    if mojibake:
        text = require("ftfy", extra="data").fix_encoding(text)
    text = INVISIBLE.sub("", LINE_ENDS.sub("\n", SURROGATES.sub("\ufffd", text)))
    lines = "\n".join(line.rstrip(" \t") for line in unicodedata.normalize("NFC", text).split("\n"))
    return TOO_BLANK.sub("\n\n\n", lines)
