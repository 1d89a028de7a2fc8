"""Languages of real texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.base.errors import InputError
from lmworks.text.language import identify

CODES = {
    "amh": "am", "arb": "ar", "ben": "bn", "bul": "bg", "ces": "cs", "cmn_hans": "zh", "cmn_hant": "zh", "cym": "cy",
    "dan": "da", "deu": "de", "ell_monotonic": "el", "eng": "en", "epo": "eo", "eus": "eu", "fin": "fi", "fra": "fr",
    "gle": "ga", "heb": "he", "hin": "hi", "hun": "hu", "hye": "hy", "ido": "io", "ina": "ia", "ind": "id",
    "isl": "is", "ita": "it", "jpn": "ja", "kat": "ka", "kor": "ko", "lat": "la", "nld": "nl", "pes_1": "fa",
    "pol": "pl", "por_BR": "pt", "ron": "ro", "rus": "ru", "spa": "es", "swe": "sv", "swh": "sw", "tam": "ta",
    "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi", "yor": "yo", "zul": "zu",
}  # fmt: skip
UNKNOWN = {"ido", "ina"}  # languages that the model does not have


def read(folder: Path, length: int) -> dict[str, list[str]]:
    """Return pieces of so many characters from each language, five at most."""
    texts = {path.stem: " ".join(path.read_text("utf-8").split()) for path in sorted((folder / "udhr").glob("*.txt"))}
    return {name: [t[i : i + length] for i in range(200, len(t) - length, max(length, 1500))][:5]
            for name, t in texts.items()}  # fmt: skip


def accuracy(pieces: dict[str, list[str]], among: tuple[str, ...] = ()) -> float:
    right = [identify(t, among) == CODES[name] for name, ts in pieces.items() if name not in UNKNOWN for t in ts]
    return sum(right) / len(right)


def test_44_languages(data_folder: Path) -> None:
    pieces = read(data_folder, 300)
    assert set(pieces) == set(CODES) and len(pieces) == 46
    assert accuracy(pieces) > 0.97
    assert accuracy(read(data_folder, 60)) > 0.93
    known = tuple(sorted({CODES[name] for name in CODES if name not in UNKNOWN}))
    assert accuracy(pieces, known) > 0.985  # fewer to choose from


def test_too_little_text_is_in_no_language() -> None:
    assert [identify(text) for text in ("", "  \n", "12345 -- 67", "...")] == ["und"] * 4


def test_languages_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(InputError, match=r'does not know "tlh"[\s\S]*ISO 639'):
        identify("nuqneH", ("en", "tlh"))
