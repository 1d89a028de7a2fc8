"""What publishers put around a text: the licence and the notices of Project Gutenberg's books."""

from __future__ import annotations

import re

START = re.compile(
    r"^[ \t]*\*{3} ?START OF (?:TH(?:E|IS) )?PROJECT GUTENBERG[^\n]*?(?:\n[^\n*]*?)?\*{3}[ \t\r]*$"
    r"|^[ \t]*\*END[* ]THE SMALL PRINT!?[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
END = re.compile(
    r"^[ \t]*(?:\*{3} ?END OF (?:TH(?:E|IS) )?PROJECT GUTENBERG"
    r"|End of (?:the |this )?Project Gutenberg(?:'s|’s| e-?text| e-?book))[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
HEADER = re.compile(r"Project Gutenberg|gutenberg\.(?:org|net)", re.IGNORECASE)
CREDIT = re.compile(
    r"\A\s*(?:(?:This )?(?:e-?text |e-?book )?(?:was )?(?:produced|prepared|scanned|transcribed) by [^\n]*\n"
    r"(?:(?:[^\n]+\n){0,3}(?=[ \t\r]*\n))?)",
    re.IGNORECASE,
)
LONGEST_HEADER = 30_000  # characters before the first START that may be a header; beyond, they are another book


def drop_boilerplate(text: str) -> str:
    """Return a book, or several in one text, without Project Gutenberg's header, credits, footer and licence.

    What stands between a START and the next END is kept. A text that begins with neither begins within a book, one that
    does not end so ends within a book; a text without any of these lines is returned as it is.
    """
    if "gutenberg" not in text.lower() and "SMALL PRINT" not in text:
        return text
    marks = [(match.start(), match.end(), True) for match in START.finditer(text)]
    marks = sorted(marks + [(match.start(), match.end(), False) for match in END.finditer(text)])
    if not marks:
        return text
    header = marks[0][2] and marks[0][0] <= LONGEST_HEADER
    begin = None if header else 0  # of the book that we are in
    books = []
    for start, end, is_start in marks:
        if begin is not None:
            twice = is_start and start - begin < LONGEST_HEADER and HEADER.search(text, begin, start)
            books += [] if twice else [text[begin:start]]  # a header may have two STARTs
        begin = end if is_start else None
    if begin is not None:
        books.append(text[begin:])
    bare = [CREDIT.sub("", book).strip("\r\n") for book in books]
    return "\n\n".join(book for book in bare if book.strip()) + "\n"
