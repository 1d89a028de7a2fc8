"""From bytes to text, whatever the encoding, and never by guessing in silence: the name of the encoding comes along."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from itertools import chain

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.text.language import identify

MARKS = (  # byte order marks, the longest first
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SEVEN_BIT = (  # encodings that look like ASCII: what gives them away
    (re.compile(rb"\x1b\$[@B(]"), "iso2022_jp_2"),
    (re.compile(rb"\x1b\$\)C"), "iso2022_kr"),
    (re.compile(rb"~\{(?:[\x21-\x7e]{2})+~\}"), "hz"),
)
DECLARED = re.compile(rb"""<meta[^>]{0,200}charset\s{0,9}=\s{0,9}["']?([\w.:-]{1,40})""", re.IGNORECASE)
WINDOW = 1 << 18  # bytes that tell the encoding of a long text
LOOSER = 1.0  # charset-normalizer's tolerance of odd characters, on the second try (its own default is 0.2)
DAMAGED = "utf-8 (damaged)"  # some bytes are not UTF-8: they are read as cp1252, halves of surrogate pairs as U+FFFD
MOSTLY = 4  # characters of UTF-8 for each byte that is none, in a damaged file; legacy encodings have less than 1
WIDE = ["utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7"]  # told by marks and zeros
LATIN = ["cp1252", "cp1250", "cp1254", "cp1257", "iso8859_2", "iso8859_15", "mac_roman", "cp850", "cp437", "cp852"]
FEW = 24  # accents, which tell charset-normalizer too little
HIGH = re.compile(rb"[\x80-\xff]+")
WITHIN = re.compile(rb"(?<=[A-Za-z])([\x80-\x91\x93-\x95\x98-\xac\xae-\xff])(?=[A-Za-z])")  # a word, signs apart
WESTERN = {*"af an br ca da de en es eu fi fo fr ga gl id is it lb ms nb nl nn no oc pt sv sw und wa".split()}
LETTER = re.compile(rb"[A-Za-z]")
HIRAGANA = re.compile("[\u3041-\u3096]")
SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")


def decode(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str]:
    """Return the text and its encoding: byte order mark, UTF-8, what an HTML page declares, else detection.

    A last character that is cut off is left out. A file that is UTF-8 but for some bytes is read as such (DAMAGED).
    Raises InputError for bytes that are no text, or not in `encoding`.
    """
    if encoding is not None:
        text = attempt(data, encoding)
        if text is None:
            raise InputError(f"{name} is not {encoding}", fix="leave the encoding out: it is told by the bytes")
        return text.removeprefix("\ufeff"), encoding
    for mark, encoding in MARKS:
        if data.startswith(mark):
            text = attempt(data[len(mark) :], encoding)
            if text is None:
                raise InputError(f"{name} begins as {encoding} but does not go on as such", fix="save it as UTF-8")
            return text, encoding
    if b"\0" in data:
        return decode_wide(data, name)
    if data.isascii():
        for signature, encoding in SEVEN_BIT:
            text = attempt(data, encoding) if signature.search(data) else None
            if text is not None:
                return text, encoding
        return data.decode("ascii"), "utf-8"
    text = attempt(data, "utf-8")
    if text is not None and not text.isascii():  # all ASCII but a torn last character: rather an older encoding
        return text, "utf-8"
    declared = DECLARED.search(data[:4096])
    if declared:
        encoding = declared[1].decode("ascii").lower()
        text = attempt(data, encoding)
        if text is not None:
            return text, encoding
    if is_damaged(data):
        return data.decode("utf-8", DAMAGED), DAMAGED
    return detect(data, name)


def is_damaged(data: bytes, good: int = 0) -> bool:
    """Say whether bytes, after `good` characters beyond ASCII, are UTF-8 with a few others among them."""
    data = SURROGATE.sub(b"", data)
    good += count_beyond(data.decode("utf-8", "ignore"))
    bad = data.decode("utf-8", "replace").count("\ufffd") - data.count(b"\xef\xbf\xbd")
    return good >= MOSTLY * bad


def count_beyond(text: str) -> int:
    """Return how many characters are beyond ASCII."""
    return len(text) - len(text.encode("ascii", "ignore"))


def mend_bytes(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for bytes that are not UTF-8, and where to go on: an error handler of the codecs."""
    assert isinstance(error, UnicodeDecodeError)
    if SURROGATE.match(error.object, error.start):
        return "\ufffd", error.start + 3
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(DAMAGED, mend_bytes)


def sniff(chunks: Iterator[bytes], name: str) -> tuple[str, int]:
    """Return the encoding of a text that is too long to be decoded at once, and the bytes of its byte order mark.

    All of it is looked at: a book in Latin-1 may have its first accent after megabytes. Other encodings than UTF-8 are
    told by the lines with other bytes than ASCII from the first byte on that is not UTF-8.
    """
    head = next(chunks)
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    if b"\0" in head[:4096]:
        return decode_wide(head[: 1 << 20], name)[1], 0
    utf8 = codecs.getincrementaldecoder("utf-8")("strict")
    at = good = 0
    for chunk in chain([head], chunks):
        if b"\0" in chunk:
            raise binary(name, f"binary data: a zero byte at byte {at + chunk.index(0):,}")
        try:
            good += count_beyond(utf8.decode(chunk))
        except UnicodeDecodeError as error:
            good += count_beyond(chunk[: error.start].decode("utf-8", "ignore"))
            rest = chunk[1 + chunk.rfind(b"\n", 0, error.start) :] + next(chunks, b"")
            lines = telling_lines(rest, chunks) or rest[:WINDOW]
            return (DAMAGED if is_damaged(lines, good) else decode(lines, name)[1]), 0
        at += len(chunk)
    return "utf-8", 0


def telling_lines(rest: bytes, chunks: Iterator[bytes]) -> bytes:
    """Return whole lines that are not ASCII, of what is left of a text, until there are enough to tell the encoding."""
    lines: list[bytes] = []
    size = 0
    for chunk in chain([b"\n" + rest], chunks):
        for line in chunk.split(b"\n")[1:-1]:
            if not line.isascii():
                lines.append(line)
                size += len(line)
            if size > WINDOW:
                break
        if size > WINDOW:
            break
    return b"\n".join(lines)


def attempt(data: bytes, encoding: str) -> str | None:
    """Return the text in this encoding, without a torn last character, or None where it does not fit."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data, final=False)
    except (UnicodeError, LookupError):
        return None


def decode_wide(data: bytes, name: str) -> tuple[str, str]:
    """Return bytes with zeros as UTF-16 if the zeros are every second byte; else they are not text."""
    head = data[:4096]
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if head[start::2].count(0) > 0.4 * len(head[start::2]) and not head[1 - start :: 2].count(0):
            text = attempt(data, encoding)
            if text is not None:
                return text, encoding
    raise binary(name, f"binary data: a zero byte at byte {data.index(0):,}")


def detect(data: bytes, name: str) -> tuple[str, str]:
    """Ask charset-normalizer, first with its own tolerance of odd characters, then with a larger one."""
    try:
        library = require("charset_normalizer", extra="data")
    except Exception as error:
        raise InputError(
            f"{name} is not UTF-8",
            expected="UTF-8, or the package that detects other encodings",
            fix=f"{getattr(error, 'fix', '')}, or convert the file: iconv -f OLD -t UTF-8",
        ) from None
    latin = is_latin(data)
    told = name_japanese(data) or (name_western(data) if latin else None)
    if told is not None:
        return attempt(data, told) or "", told
    end = 1 + data.rfind(b"\n", len(data) // 2)  # the last character may be torn
    whole = data[:end] if end else data
    among = {"cp_isolation": LATIN} if latin and len(HIGH.findall(data)) <= FEW else {"cp_exclusion": WIDE}
    for settings in ({}, {"threshold": LOOSER}):
        for found in library.from_bytes(whole, **settings, **among):  # the best first
            text = attempt(data, found.encoding)
            if text is not None:
                return text, str(found.encoding)
    raise binary(name)


def is_latin(data: bytes) -> bool:
    """Say whether bytes are Latin letters with accents here and there, mostly single ones: those of CJK are pairs."""
    runs = HIGH.findall(data)
    single = sum(len(run) == 1 for run in runs)
    return 3 * single >= 2 * len(runs) and 2 * len(LETTER.findall(data)) >= 5 * sum(map(len, runs))


def name_japanese(data: bytes) -> str | None:
    """Return the encoding in which a fourth of what is beyond ASCII is hiragana, which no other language has."""
    for encoding in ("cp932", "euc_jp"):
        text = attempt(data, encoding) or ""
        if 4 * len(HIRAGANA.findall(text)) >= count_beyond(text) > 1:
            return encoding
    return None


def name_western(data: bytes) -> str | None:
    """Return the encoding of a Western language's Latin letters, or of too few to tell; None for others.

    Its plain letters tell a language, whatever stands for the others.
    """
    within = WITHIN.findall(data)
    odd = sum(not byte >= b"\xc0" for byte in within)
    language = identify(data.decode("cp1252", "replace")) if 10 * odd <= len(within) else ""
    encoding = "cp1254" if language == "tr" else "cp1252" if language in WESTERN else None
    return encoding if encoding is not None and attempt(data, encoding) is not None else None


def binary(name: str, found: str = "binary data, or an encoding that cannot be told") -> InputError:
    """Return the error for bytes that are no text."""
    return InputError(
        f"{name} is not text",
        found=found,
        expected="text in any usual encoding",
        fix="remove the file, or convert it: iconv -f OLD -t UTF-8",
    )
