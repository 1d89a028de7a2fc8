"""Hide what points to a person: addresses, telephone numbers, identifiers. A pattern finds, a checksum confirms.

e-mail        name@host.tld
url           http://…, www.…
identifier    IBAN (ISO 13616, remainder 1 of 97), card numbers of 13 to 19 digits (Luhn), US social security numbers,
              UUIDs, IP addresses (4 and 6), MAC addresses
telephone     +…, (…) …, or groups of digits, 7 to 15 digits in all (E.164); dates, years and plain numbers stay
"""

from __future__ import annotations

import ipaddress
import re

EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-](?:[\w.+%'-]{0,62}[\w.+%-])?@(?:[\w-]{1,63}\.){1,8}"
    r"(?:xn--[a-z0-9-]{2,59}(?![\w@-])|[A-Za-zÀ-ɏ]{2,24}(?![A-Za-zÀ-ɏ\d_@-])|[^\W\d_A-Za-zÀ-ɏ]{2,10}(?![\w@]))"
)
URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"'“”‘’]{2,2000}(?<![.,;:!?)\]])", re.IGNORECASE)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
CARD = re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])")
SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)
MAC = re.compile(r"\b[0-9a-f]{2}([:-])(?:[0-9a-f]{2}\1){4}[0-9a-f]{2}\b", re.IGNORECASE)
IP = re.compile(
    r"(?i)(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d|\w)|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:]|\.\d))"
)
PHONE = re.compile(
    r"(?:(?<![\w,/-])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ ./-]?\d{2,5}){1,5}|(?<![\w.,/-])(?:"
    r"\((?!(?:1[89]|20)\d\d\))\d{2,5}\)[ .-]?\d{2,5}(?:[ .-]?\d{2,5}){1,3}"
    r"|0\d{1,5}[ /-]\d{3,8}(?:[ -]\d{1,5}){0,3}"
    r"|0[1-9]([ .-])\d\d(?:\1\d\d){3}"
    r"|(?:1[ .-])?(?:\d{3}([.-])\d{3}\2\d{4}|[2-9]\d\d [2-9]\d\d \d{4})))(?![\w-]|[.,]\d)"
)


def mask_emails(text: str) -> str:
    """Return the text with [EMAIL] for each address."""
    return EMAIL.sub("[EMAIL]", text) if "@" in text else text


def mask_urls(text: str) -> str:
    """Return the text with [URL] for each address of a page."""
    return URL.sub("[URL]", text)


def mask_phones(text: str) -> str:
    """Return the text with [PHONE] for each telephone number; the digits of an IBAN are none."""
    parts, end = [], 0
    for found in IBAN.finditer(text):
        if is_iban(found[0]):
            parts += [PHONE.sub(mask_phone, text[end : found.start()]), found[0]]
            end = found.end()
    return "".join([*parts, PHONE.sub(mask_phone, text[end:])])


def mask_phone(found: re.Match[str]) -> str:
    """Return [PHONE] for as many digits as a telephone number has, else what was found."""
    return "[PHONE]" if 7 <= sum(c.isdigit() for c in found[0]) <= 15 else found[0]


def mask_identifiers(text: str) -> str:
    """Return the text with [ID] for each identifier whose checksum or form is right."""
    text = IBAN.sub(lambda m: "[ID]" if is_iban(m[0]) else m[0], text)
    text = CARD.sub(lambda m: "[ID]" if is_luhn(m[0]) else m[0], text)
    for pattern in (UUID, MAC, SSN):
        text = pattern.sub("[ID]", text)
    return IP.sub(lambda m: "[ID]" if is_address(m[0]) else m[0], text)


def is_iban(text: str) -> bool:
    """Say whether letters and digits, the first four put last, leave 1 when divided by 97."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def is_luhn(text: str) -> bool:
    """Say whether the digits, every second from the right doubled, add up to a multiple of ten."""
    digits = [int(c) for c in text if c.isdigit()][::-1]
    doubled = (d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(digits))
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_address(text: str) -> bool:
    """Say whether this is an IP address, and not a time such as 10:30:00."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 4:
        return True
    digits = any(c.isdigit() for c in text)  # "a::b" is C++
    return text.count(":") > 2 or ("::" in text.strip(":") and (digits or len(text) > 8))
