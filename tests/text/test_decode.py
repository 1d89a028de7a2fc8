"""Bytes to text: real files in legacy encodings, byte order marks, torn ends, binary data."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

import numpy as np
import pytest

from lmworks.base.errors import InputError
from lmworks.text.decode import DAMAGED, decode
from lmworks.text.open import open_text

# the file -> the codec that it is really in
LEGACY = {
    "Arabic_Alarabia-Arabic": "cp1256",
    "Chinese_Mandarin-GB2312": "gb2312",
    "Chinese_Mandarin-HZ": "hz",
    "Czech-Latin2": "cp1250",
    "French_Francais-Latin1": "cp1252",
    "German_Deutsch-Latin1": "latin-1",
    "Greek_Ellinika-Greek": "cp1253",
    "Hebrew_Ivrit-Hebrew": "cp1255",
    "Hungarian_Magyar-Latin2": "iso8859-2",
    "Japanese_Nihongo-EUC": "euc_jp",
    "Japanese_Nihongo-JIS": "iso2022_jp",
    "Japanese_Nihongo-SJIS": "shift_jis",
    "Russian_Russky-Cyrillic": "cp1251",
    "Serbian_Srpski-Cyrillic": "cp1251",
    "Turkish_Turkce-Turkish": "cp1254",
    "Ukrainian-Cyrillic": "cp1251",
}


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_encodings_are_detected(name: str, data_folder: Path) -> None:
    data = (data_folder / "dirty" / "encodings" / name).read_bytes()
    text, encoding = decode(data, name)
    assert text == codecs.getincrementaldecoder(LEGACY[name])().decode(data)
    assert encoding != "utf-8"


def test_every_utf8_twin_reads_as_utf8(data_folder: Path) -> None:
    """NLTK cut these files at 10,000 bytes, some within a character; and Czech's is not UTF-8 at all."""
    seen = 0
    for path in sorted((data_folder / "dirty" / "encodings").glob("*-UTF8")):
        text, encoding = decode(path.read_bytes(), path.name)
        if path.name.startswith("Czech"):
            assert text.startswith("VŠEOBECNÁ DEKLARACE LIDSKÝCH PRÁV")
        else:
            assert encoding == "utf-8"
            assert "\ufffd" not in text and not text.startswith("\ufeff")
            seen += 1
    assert seen == 10
    data = (data_folder / "dirty/encodings/Hungarian_Magyar-Unicode").read_bytes()
    assert decode(data, "x")[1] == "utf-16-le"
    assert decode(data, "x")[0].startswith("Az Emberi Jogok")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_order_marks(encoding: str) -> None:
    text = "naïve 東京 \U0001f600\n"
    assert decode(("\ufeff" + text).encode(encoding), "x") == (text, encoding)


def test_utf16_without_a_mark() -> None:
    text = "Plain English, saved as Unicode.\r\n" * 3
    assert decode(text.encode("utf-16-le"), "x") == (text, "utf-16-le")
    assert decode(text.encode("utf-16-be"), "x") == (text, "utf-16-be")


def test_a_torn_last_character_is_left_out_only_from_utf8() -> None:
    assert decode("東京".encode()[:-1], "x") == ("東", "utf-8")
    text, encoding = decode(b"Un petit caf\xe9", "x")  # would be torn UTF-8 too, but nothing else in it is UTF-8
    assert text.startswith("Un petit caf") and len(text) == 13
    assert encoding != "utf-8"


def test_a_page_may_declare_its_encoding() -> None:
    page = '<html><head><META http-equiv=x content="text/html; charset=KOI8-R"></head>Привет'.encode("koi8-r")
    text, encoding = decode(page, "x.html")
    assert text.endswith("Привет")
    assert encoding == "koi8-r"


def test_binary_files_are_refused(data_folder: Path) -> None:
    rng = np.random.default_rng(0)
    image = (data_folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()[:20_000]
    noise = rng.integers(1, 256, 5000).astype(np.uint8).tobytes()  # without a zero
    for data in (image, noise, b"text\0with a zero", b"\0" * 100, b"\xff\xfe" + b"\x00\xd8" * 9):
        with pytest.raises(InputError, match=r"thing\.txt"):
            decode(data, "thing.txt")


def test_without_the_detector_its_pip_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    with pytest.raises(InputError, match=r'pip install "lmworks\[data\]"'):
        decode("café olé".encode("latin-1"), "x")
    assert decode(b"plain", "x") == ("plain", "utf-8")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("café", "latin-1"), ("Temperature: 25 °C", "latin-1"), ("Price: 10 € each", "cp1252"), ("naïve", "latin-1"),
        ("Smörgåsbord: 3 £", "latin-1"), ("“Quoted” – it’s naïve… costs 5 €", "cp1252"), ("Ärger über Öl", "latin-1"),
        ("El niño comió una manzana en el jardín de la señora.", "latin-1"),
        ("L’été dernier, nous avons mangé des crêpes à la plage.", "cp1252"),
        ("Žluťoučký kůň úpěl ďábelské ódy.", "cp1250"), ("Türkiye'de yaşıyorum, çok güzel bir ülke.", "cp1254"),
        ("こんにちは、吾輩は猫である。", "shift_jis"), ("ｶﾀｶﾅ ﾃｽﾄ\n", "shift_jis"), ("人人生而自由", "gbk"),
        ("吾輩は猫である。名前はまだ無い。\n" * 9, "shift_jis"), ("こんにちは世界", "euc_jp"),
    ],
)  # fmt: skip
def test_short_texts_of_one_or_two_accents_are_not_taken_for_chinese(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding), "it")[0] == text


@pytest.mark.parametrize("language", ["deu", "fin", "fra", "isl", "ita", "spa", "swe", "tur"])
@pytest.mark.parametrize("size", [300, 3000])
def test_western_languages_in_one_byte_a_letter(language: str, size: int, data_folder: Path) -> None:
    path = data_folder / "udhr" / f"{language}.txt"
    encoding = "cp1254" if language == "tur" else "cp1252"
    data = path.read_text(encoding="utf-8").encode(encoding, "ignore")[200 : 200 + size]
    assert decode(data, language)[0] == data.decode(encoding)


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("jpn", "shift_jis"), ("jpn", "euc_jp"), ("cmn_hans", "gbk"), ("cmn_hant", "big5"), ("kor", "euc_kr")],
)
def test_a_torn_character_at_the_end_tells_nothing(language: str, encoding: str, data_folder: Path) -> None:
    data = (data_folder / "udhr" / f"{language}.txt").read_text("utf-8").encode(encoding, "ignore")
    for size in (1000, 1001, 2000, 2001):
        whole = codecs.getincrementaldecoder(encoding)().decode(data[:size])
        assert decode(data[:size], language)[0].removesuffix("\n") == whole.removesuffix("\n")


JAPANESE = "日本語のテキストです。これは長い文章です。\n"


def test_one_bad_byte_does_not_turn_a_file_of_utf8_into_something_else(tmp_path: Path) -> None:
    data = (JAPANESE * 50).encode() + b"bad \xff byte\n" + JAPANESE.encode()
    assert decode(data, "it") == (JAPANESE * 50 + "bad ÿ byte\n" + JAPANESE, DAMAGED)
    mixed = ("naïve — résumé\n" * 40).encode() + "café\n".encode("latin-1")
    assert decode(mixed, "it") == ("naïve — résumé\n" * 40 + "café\n", DAMAGED)
    assert decode(b"abc\xed\xa0\x80def\n", "it") == ("abc\ufffddef\n", DAMAGED)
    assert decode("Съешь ещё этих мягких французских булок".encode("cp1251"), "it")[1] == "cp1251"


def test_a_long_file_with_a_bad_byte_at_its_end_stays_utf8(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = JAPANESE * (18_000_000 // len(JAPANESE.encode()))
    path.write_bytes(text.encode() + b"bad \xff byte\n")
    stream, encoding = open_text(path)
    with stream:
        assert (stream.read(), encoding) == (text + "bad ÿ byte\n", DAMAGED)
