"""The steps that clean a text, each by name: what it does is one function from a text to a text.

mojibake           text that was decoded wrongly: "cafÃ©" -> "café" (ftfy)
controls           line ends become \\n; control characters, soft hyphens, byte order marks go; lone surrogates: U+FFFD
nfc, nfkc          one Unicode form: composed; and also one form of look-alikes ("ﬁ" -> "fi", "①" -> "1")
blanks             no blanks at a line's end, at most two blank lines
markup             HTML tags, comments and entities: "<b>5 &lt; 6</b>" -> "5 < 6"
markdown           Markdown's marks: "## A *b* [c](d)" -> "A b c"
boilerplate        Project Gutenberg's header, licence and footer
lower              lower case
punctuation        "Don't stop, now!" -> "Dont stop now"
symbols            signs of mathematics, currencies, emoji …
digits             numbers in any script
mask-email … -id   an address, telephone number or identifier becomes [EMAIL], [PHONE], [ID]; see `mask`
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.optional import require
from lmworks.text.boilerplate import drop_boilerplate
from lmworks.text.mask import mask_emails, mask_identifiers, mask_phones, mask_urls

LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\ufeff]")  # control characters, soft hyphen, byte order mark
SURROGATES = re.compile("[\ud800-\udfff]")
TOO_BLANK = re.compile(r"\n{4,}")
TRAILING = re.compile(r"[ \t]+(?=\n|\Z)")
BLANKS = re.compile(r"[ \t]{2,}")
TAGS = (
    "a abbr address article aside audio b blockquote body br button canvas caption center cite code col colgroup "
    "dd del details dfn div dl dt em embed fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head "
    "header hr html i iframe img input ins kbd label li link main map mark meta nav noscript object ol optgroup "
    "option p param picture pre q s samp script section select small source span strike strong style sub summary "
    "sup svg table tbody td template textarea tfoot th thead time title tr tt u ul var video wbr"
)
UNSEEN = re.compile(r"(?is)<(script|style|template)\b[^>]*>.*?</\1\s*>|<!--.*?-->|<!doctype[^>]*>")
LINES = (
    "br p div h[1-6] li tr table ul ol dl dt dd blockquote section article header footer nav aside main form pre hr "
    "title option figure figcaption caption address"
)
VALUE = r"""\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
FLAGS = "allowfullscreen async autofocus autoplay checked controls defer disabled hidden itemscope loop multiple muted "
FLAGS += "noshade novalidate nowrap open readonly required reversed selected"
PROPER = rf"(?:\s+(?:[\w:@.-]+{VALUE}|(?:{'|'.join(FLAGS.split())})(?=[\s/>])))*\s*/?>"
INSIDE = rf"(?:{PROPER}|(?:\s[^<>]*=[^<>]*)?\s*/?>)"
NEW_LINE = re.compile(rf"(?i)</?(?:{'|'.join(LINES.split())}){INSIDE}")
CELL = re.compile(r"(?i)</t[dh]\s*>(?=\s*<t[dh]\b)")
TAG = re.compile(rf"(?i)</?(?:{'|'.join(TAGS.split())}){INSIDE}")
MARKDOWN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^[ \t]*(?:```|~~~)[^\n]*\n?", re.MULTILINE), ""),  # a fence
    (re.compile(r"^[ \t]*(?:[-*_][ \t]*){3,}$\n?", re.MULTILINE), ""),  # a rule
    (re.compile(r"^(?:[ \t]*>)+[ \t]?", re.MULTILINE), ""),  # a quotation
    (re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE), r"\1"),  # a heading
    (re.compile(r"^([ \t]*)[-*+][ \t]+", re.MULTILINE), r"\1"),  # an item
    (re.compile(r"!?\[([^\[\]\n]*)\](?:\([^()\s]*(?:\s+\"[^\"\n]*\")?\)|\[[^\[\]\n]*\])"), r"\1"),  # a link or image
    (re.compile(r"(\*\*\*|\*\*|\*|~~)(?=\S)([^*~\n]+?)(?<=\S)\1"), r"\2"),  # emphasis
    (re.compile(r"(?<!\w)(__|_)(?=\S)([^_\n]+?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"`+([^`\n]+)`+"), r"\1"),  # code
)
Step = Callable[[str], str]


def fix_mojibake(text: str) -> str:
    """Return the text with mojibake mended line by line, as ftfy does; needs the [data] extra."""
    if text.isascii():
        return text
    mend = require("ftfy", extra="data").fix_encoding
    return "\n".join(line if line.isascii() else mend(line) for line in text.split("\n"))


def drop_controls(text: str) -> str:
    r"""Return the text with \n line ends and nothing that is never seen."""
    return INVISIBLE.sub("", LINE_ENDS.sub("\n", mend_surrogates(text)))


def mend_surrogates(text: str) -> str:
    """Return the text with U+FFFD for lone surrogates, which no encoding can hold."""
    return text if text.isascii() else SURROGATES.sub("\ufffd", text)


def compose(text: str) -> str:
    """Return the text in Unicode's composed form."""
    return unicodedata.normalize("NFC", text)


def drop_blanks(text: str) -> str:
    """Return the text without blanks at a line's end and blank lines after the second."""
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = TRAILING.sub("", text)
    return TOO_BLANK.sub("\n\n\n", text)


def drop_markup(text: str) -> str:
    """Return the text without HTML; a tag that HTML does not have, such as <unk>, stays, and so does "a < b"."""
    if "<" in text:
        text = TAG.sub("", NEW_LINE.sub("\n", CELL.sub("\t", UNSEEN.sub("", text))))
    return html.unescape(text) if "&" in text else text


def drop_markdown(text: str) -> str:
    """Return the text without Markdown's marks; what they mark stays."""
    for pattern, kept in MARKDOWN:
        text = pattern.sub(kept, text)
    return text


def drop_kind(*kinds: str) -> Step:
    """Return a step that turns characters of these categories into blanks; an apostrophe in a word just goes."""
    pattern = "".join(rf"\p{{{kind}}}" for kind in kinds)

    def drop(text: str) -> str:
        library = require("regex", extra="text")
        if "P" in kinds:
            text = library.sub(r"(?<=\p{L})['’](?=\p{L})", "", text)
        found: str = library.sub(rf"[{pattern}]+", " ", text)
        return found if found == text else TRAILING.sub("", BLANKS.sub(" ", found)).strip(" ")

    return drop


STEPS: dict[str, Step] = {
    "mojibake": fix_mojibake,
    "controls": drop_controls,
    "nfc": compose,
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "blanks": drop_blanks,
    "markup": drop_markup,
    "markdown": drop_markdown,
    "boilerplate": drop_boilerplate,
    "lower": str.lower,
    "punctuation": drop_kind("P"),
    "symbols": drop_kind("S"),
    "digits": drop_kind("N"),
    "mask-email": mask_emails,
    "mask-url": mask_urls,
    "mask-id": mask_identifiers,
    "mask-phone": mask_phones,
}
LIGHT = ("controls", "nfc", "blanks")
DEFAULT_STEPS = "mojibake,controls,nfc,boilerplate,blanks"


def clean(text: str, *, mojibake: bool = False) -> str:
    r"""Return the text in Unicode's composed form (NFC) with \n line ends: " e\u0301 \r\n" -> " é\n".

    Control characters but tab and newline, soft hyphens and byte order marks go, as do blanks at the end of a line
    and blank lines after the second. A lone surrogate becomes U+FFFD. Joiners and other marks that a script needs
    stay. `mojibake` also mends text that was decoded wrongly, "caf\u00c3\u00a9" -> "café" (needs the [data] extra).
    """
    for name in ("mojibake", *LIGHT) if mojibake else LIGHT:
        text = STEPS[name](text)
    return text


def choose_steps(names: Sequence[str]) -> tuple[str, ...]:
    """Return the steps as they were ordered; one that does not exist is an InputError."""
    for name in names:
        if name not in STEPS:
            fix = did_you_mean(name, STEPS).strip()
            raise InputError(f'there is no cleaning step "{name}"', expected=", ".join(STEPS), fix=fix)
    return tuple(names)
