"""Long, packed and broken files, standard input, parquet: the same documents, or one message."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lmworks.base.errors import InputError
from lmworks.text import open as opening
from lmworks.text import stream as streaming
from lmworks.text.formats import read_rows
from lmworks.text.open import open_text
from lmworks.text.read import read_documents
from lmworks.text.stream import Record, cut, list_files, stream_documents

RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах.\n"


def read_all(path: Path, **options: str) -> list[Record]:
    return list(stream_documents(list_files([path]), **options))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file of more than 4,000 bytes count as long."""
    monkeypatch.setattr(opening, "WHOLE", 4000)
    monkeypatch.setattr(opening, "CHUNK", 1000)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("text", "encoding", "found"),
    [
        (RUSSIAN * 200, "utf-8", "utf-8"),
        (RUSSIAN * 200, "utf-8-sig", "utf-8"),
        (RUSSIAN * 200, "cp1251", "cp1251"),
        (RUSSIAN * 200, "utf-16", "utf-16-le"),
        ("x" * 999 + "é" * 3000, "utf-8", "utf-8"),  # a letter is torn between two chunks
    ],
)
def test_a_long_file_has_the_encoding_of_a_short_one(text: str, encoding: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    stream, name = open_text(path)
    with stream:
        assert stream.read() == text
    assert name == found
    stream, _ = open_text(path, encoding=encoding.removesuffix("-sig"))  # named, its mark is still no character
    with stream:
        assert stream.read() == text


def french(data: Path) -> str:
    """Return a French text that cp1252 can write."""
    return (data / "udhr" / "fra.txt").read_text("utf-8").replace("\u2010", "-")


@pytest.mark.usefixtures("short")
def test_the_first_accent_may_come_late(data_folder: Path, tmp_path: Path) -> None:
    text = "plain English first\n" * 1000 + french(data_folder)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("cp1252"))
    assert [(d.text, d.encoding) for d in read_all(path)] == [(text, "cp1252")]


@pytest.mark.usefixtures("short")
def test_what_ceases_to_be_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 9000 + b"\0" + b"b" * 9000)
    with pytest.raises(InputError, match=r"a\.txt is not text[\s\S]*a zero byte at byte 9,000"):
        open_text(path)
    path.write_bytes(RUSSIAN.encode() * 100 + b"\xff" + RUSSIAN.encode() * 100)
    with pytest.raises(InputError, match=r"does not go on as utf-8[\s\S]*--encoding"):
        read_all(path, encoding="utf-8")


def test_an_encoding_can_be_named_if_it_exists(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Ő".encode("cp1250"))
    assert read_all(path, encoding="cp1250") == [Record("a.txt", "Ő", "cp1250")]
    with pytest.raises(InputError, match=r'no encoding "cp1252x"[\s\S]*did you mean "cp1252"'):
        read_all(path, encoding="cp1252x")
    with pytest.raises(InputError, match="no encoding"):
        read_all(path, encoding="zlib_codec")  # a codec of Python's, but of bytes
    with pytest.raises(InputError, match=r"a\.txt is not ascii"):
        read_all(path, encoding="ascii")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("long", [False, True])
def test_packed_files(packed: str, long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        monkeypatch.setattr(opening, "WHOLE", 1000)
    lines = "".join(json.dumps({"text": f"{RUSSIAN} {i}", "n": i}) + "\n" for i in range(500)).encode()
    pack = gzip.compress if packed == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(pack(lines[:700]) + pack(lines[700:]))  # both may be written in pieces
    documents = read_all(tmp_path)
    assert [(d.text, d.row) for d in documents] == [
        (f"{RUSSIAN} {i}", {"text": f"{RUSSIAN} {i}", "n": i}) for i in range(500)
    ]
    assert [d.text for d in read_documents(tmp_path)] == [d.text for d in documents]
    assert [row["n"] for _, row in read_rows(path, "text-classification")] == list(range(500))
    for broken in (path.read_bytes()[:-9], b"this is not packed at all"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=rf"cannot be read[\s\S]*a\.jsonl{packed}|not JSON"):
            read_all(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"body": f"{RUSSIAN} {i}" if i % 7 else None, "label": i % 3} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    documents = read_all(tmp_path, column="Body")
    assert [d.row for d in documents] == [row for row in rows if row["body"]]
    assert documents[0].name == "a.parquet:2" and documents[0].text == rows[1]["body"]
    assert [row for _, row in read_rows(path, "text-classification")] == rows
    with pytest.raises(InputError, match=r"which column[\s\S]*body, label"):
        read_all(path)
    with pytest.raises(InputError, match="does not hold text"):
        read_all(path, column="label")


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    give(RUSSIAN.encode("cp1251") * 5)
    (document,) = read_all(Path("-"))
    assert (document.text, document.encoding) == (RUSSIAN * 5, "cp1251")
    give(b'{"text": "a"}\n{"text": "b"}\n')
    assert [d.name for d in read_all(Path("-"), stdin_ending=".jsonl")] == ["stdin:1", "stdin:2"]
    for ending, separator in ((".csv", ";"), (".tsv", "\t")):
        give(f'text{separator}label\na "b{separator}1\n'.replace('"', '"' * (ending == ".tsv")).encode())
        (document,) = read_all(Path("-"), stdin_ending=ending)
        assert document.row == {"text": 'a "b' if ending == ".tsv" else "a b", "label": "1"}
    monkeypatch.setattr(opening, "WHOLE", 100)
    give(RUSSIAN.encode() * 100)
    assert "".join(d.text for d in read_all(Path("-"))) == RUSSIAN * 100


@pytest.mark.usefixtures("short")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe, text = tmp_path / "pipe", RUSSIAN * 2000
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text.encode(),))
    writer.start()
    assert "".join(d.text for d in read_all(pipe)) == text
    writer.join()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    for path, said in ((tmp_path / "link.txt", "is a link to"), (Path("--kindd"), "there is no option --kindd")):
        with pytest.raises(InputError, match=said):
            list_files([path])


def test_long_texts_are_cut_where_a_reader_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streaming, "LONGEST_PART", 300)
    rng = random.Random(0)
    text = "".join(rng.choice(["word ", "longer\n", "end.\n\n", "x"]) for _ in range(5000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    parts = read_all(path)
    assert "".join(d.text for d in parts) == text
    assert all(d.text.endswith("\n\n") and len(d.text) <= 300 for d in parts[:-1])
    assert [d.name for d in parts[:2]] == ["a.txt:1", "a.txt:2"]
    path.write_text("x" * 1000)  # nowhere to cut
    assert [len(d.text) for d in read_all(path)] == [300, 300, 300, 100]


def test_units(tmp_path: Path) -> None:
    record = Record("a", "one\ntwo\r\n\r\n \nthree\n\n\n\n", "utf-8")
    assert [(d.name, d.text) for d in cut(record, "paragraph")] == [("a:1", "one\ntwo"), ("a:2", "three")]
    assert [d.text for d in cut(record, "line")] == ["one", "two", "three"]
    assert cut(record, "file") == [record]
    row = Record("a", "one\n\ntwo", "utf-8", {"text": "one\n\ntwo"})
    assert cut(row, "line") == [row]  # rows of tables are documents already


def test_one_line_of_fifty_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain text it is cut at blanks; as a row it is one document, up to a limit."""
    path = tmp_path / "a.txt"
    path.write_text("word " * 10_000_000)
    parts = read_all(path)
    assert sum(len(d.text) for d in parts) == 50_000_000 and all(d.text.endswith("word ") for d in parts)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 1_000_000}) + "\n")
    assert [len(d.text) for d in read_all(path)] == [5_000_000]
    monkeypatch.setattr(opening, "LONGEST_LINE", 1_000_000)
    with pytest.raises(InputError, match=r"a line is too long[\s\S]*a\.jsonl, line 1"):
        read_all(path)


def test_old_macintosh_tables_and_mixed_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\r1,one\r2,"two\rlines"\r\n3,three\n')
    assert [d.text for d in read_all(tmp_path / "a.csv")] == ["one", "two\rlines", "three"]


def test_a_zst_file_that_was_cut_off_is_an_error_and_a_long_window_is_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = "".join(json.dumps({"text": f"{RUSSIAN} {rng.random()}"}) + "\n" for _ in range(20_000)).encode()
    packed, path = zstandard.ZstdCompressor().compress(lines), tmp_path / "a.jsonl.zst"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="ended before its last frame did"):
        read_all(path)
    far = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)  # as zstd --long=30
    writer = zstandard.ZstdCompressor(compression_params=far).compressobj()
    path.write_bytes(writer.compress(lines) + writer.flush())
    assert len(read_all(path)) == 20_000
