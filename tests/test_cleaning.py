"""`lmworks clean`: what is mended, what is refused, and that the output is whole or absent."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import zstandard
from large_corpus import make_corpus, run_measured
from selectolax.lexbor import LexborHTMLParser

from lmworks.base.errors import InputError
from lmworks.base.files import STAGED
from lmworks.cli import main
from lmworks.verbs.cleaning import clean

TWINS = {  # a file in a legacy encoding -> the same text in UTF-8; what is left out is in UNEQUAL
    "Chinese_Mandarin-GB2312": "Chinese_Mandarin-UTF8",
    "Chinese_Mandarin-HZ": "Chinese_Mandarin-UTF8",
    "Czech-Latin2": "Czech_Cesky-UTF8",
    "Czech-Latin2-err": "Czech_Cesky-UTF8",
    "Greek_Ellinika-Greek": "Greek_Ellinika-UTF8",
    "Hebrew_Ivrit-Hebrew": "Hebrew_Ivrit-UTF8",
    "Hungarian_Magyar-Latin2": "Hungarian_Magyar-UTF8",
    "Hungarian_Magyar-Unicode": "Hungarian_Magyar-UTF8",
    "Japanese_Nihongo-EUC": "Japanese_Nihongo-UTF8",
    "Japanese_Nihongo-JIS": "Japanese_Nihongo-UTF8",
    "Japanese_Nihongo-SJIS": "Japanese_Nihongo-UTF8",
    "Russian_Russky-Cyrillic": "Russian_Russky-UTF8",
    "Serbian_Srpski-Cyrillic": "Serbian_Srpski-UTF8",
    "Turkish_Turkce-Turkish": "Turkish_Turkce-UTF8",
    "Ukrainian-Cyrillic": "Ukrainian-UTF8",
}
UNEQUAL = {  # why there is no twin to be equal to
    "Arabic_Alarabia-Arabic": "no twin",
    "English-Latin1": "no twin",
    "French_Francais-Latin1": "no twin",
    "German_Deutsch-Latin1": "no twin",
    "Esperanto-T61": "T.61 is an encoding that neither Python nor charset-normalizer has",
    "Hungarian_Magyar-Latin1": "Latin-1 has no ő and ű; the file has ô and û",
    "Serbian_Srpski-Latin2": "in Latin letters, its twin in Cyrillic",
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    with zstandard.open(path, "rt", encoding="utf-8") if path.suffix == ".zst" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mojibake_of_ftfy(data_folder: Path, tmp_path: Path) -> None:
    """Every case outside ftfy's known failures, through the verb, character by character."""
    cases = [
        case
        for path in sorted((data_folder / "dirty" / "mojibake").glob("*.json"))
        if path.stem != "known-failures"
        for case in json.loads(path.read_text("utf-8"))
    ]
    assert len(cases) == 151
    dirty = write_lines(tmp_path / "in.jsonl", [{"text": case["original"], "label": case["label"]} for case in cases])
    report = clean([dirty], tmp_path / "out.jsonl", steps="mojibake")
    wanted = [{"text": case.get("fixed-encoding", case["fixed"]), "label": case["label"]} for case in cases]
    assert read_rows(tmp_path / "out.jsonl") == wanted
    assert report.values["steps"][0]["documents"] == sum(
        case["original"] != row["text"] for case, row in zip(cases, wanted, strict=True)
    )


def test_legacy_encodings_equal_their_utf8_twins(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "dirty" / "encodings"
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert {path.name for path in files} == {*TWINS, *TWINS.values(), *UNEQUAL, "Esperanto-UTF8"}
    report = clean(files, tmp_path / "out.jsonl", steps="controls")
    texts = {row["source"]: " ".join(row["text"].split()) for row in read_rows(tmp_path / "out.jsonl")}
    for legacy, twin in TWINS.items():
        shorter = min(len(texts[legacy]), len(texts[twin]))  # all were cut at 10,000 bytes
        assert shorter > 2900 and texts[legacy][:shorter] == texts[twin][:shorter], legacy
    assert sum(report.values["encodings"].values()) == len(files)
    assert {"utf-8", "hz", "cp1251", "cp1253", "cp1255", "cp1256", "utf-16-le"} <= set(report.values["encodings"])


def score(folder: Path, texts: dict[str, str]) -> list[float]:
    """Return the F1 of words with what Mozilla's Readability extracts, page by page."""
    scores = []
    for page in sorted(folder.glob("*/source.html")):
        wanted = LexborHTMLParser((page.parent / "expected.html").read_text("utf-8")).text(separator=" ")
        a, b = (Counter(re.findall(r"\w+", text)) for text in (wanted, texts[page.parent.name]))
        scores.append(2 * (a & b).total() / (a.total() + b.total()))
    return scores


def test_html_main_content(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "dirty" / "html"
    clean([folder], tmp_path / "out.jsonl")
    rows = [row for row in read_rows(tmp_path / "out.jsonl") if row["source"].endswith("source.html")]
    scores = score(folder, {row["source"].split("/")[0]: row["text"] for row in rows})
    assert len(scores) == 19
    assert sum(scores) / 19 > 0.99 and min(scores) > 0.95


@pytest.mark.live
def test_html_main_content_against_trafilatura(data_folder: Path) -> None:
    """pip install trafilatura lxml_html_clean; its mean F1 on these pages is 0.881, ours 0.993."""
    from trafilatura import extract

    from lmworks.text.html import main_text

    folder = data_folder / "dirty" / "html"
    pages = {page.parent.name: page.read_text("utf-8") for page in folder.glob("*/source.html")}
    ours = score(folder, {name: main_text(page) for name, page in pages.items()})
    theirs = score(folder, {name: extract(page) or "" for name, page in pages.items()})
    assert sum(ours) > sum(theirs) and sum(theirs) / 19 > 0.8


def make_dirty(folder: Path) -> list[dict[str, Any]]:
    """Write rows with exact and near duplicates, short and foreign ones; return what is to be left."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    kept, rows = [], []
    for i in range(300):
        text = " ".join(rng.choices(words, k=40))
        kept.append({"n": i, "body": text, "label": i % 3})
        rows.append({"n": i, "body": f"{text} \r\n" if i % 2 else text, "label": i % 3})
        if i % 10 == 0:
            rows.append({"n": -1, "body": f"{text}  ", "label": 7})
        if i % 10 == 5:
            rows.append({"n": -2, "body": f"{text}!", "label": 7})
    rows += [{"n": -3, "body": "short", "label": 0}, {"n": -4, "body": " \x00 ", "label": 0}]
    rng.shuffle(rows)
    rows.sort(key=lambda row: row["n"] < 0)  # the first of each group is the one to keep
    write_lines(folder / "in.jsonl", rows)
    places = {row["n"]: i for i, row in enumerate(rows)}
    return sorted(kept, key=lambda row: places[row["n"]])


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.zst", "out.txt", "out.txt.gz"])
def test_duplicates_and_columns(name: str, tmp_path: Path) -> None:
    kept = make_dirty(tmp_path)
    out = tmp_path / name
    steps = "controls,blanks"
    report = clean([tmp_path / "in.jsonl"], out, steps=steps, dedup="near", column="body", min_chars=10)
    if ".jsonl" in name:
        assert [{**row, "body": row["body"].strip()} for row in read_rows(out)] == kept
    else:
        text = gzip.decompress(out.read_bytes()).decode() if name.endswith(".gz") else out.read_text()
        assert [part.strip() for part in text.split("\n\n") if part.strip()] == [row["body"] for row in kept]
    values = report.values
    assert values["read"]["documents"] == 362 and values["written"]["documents"] == 300
    near = values["removed"]["near duplicate"] + values["removed"]["exact duplicate"]
    assert near == 60 and values["removed"]["too short"] == values["removed"]["empty"] == 1
    assert values["steps"][0]["step"] == "controls" and values["steps"][0]["gone"] == 151  # 150 returns, one zero
    assert not [path for path in tmp_path.iterdir() if STAGED in path.name]
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"exists already[\s\S]*--overwrite"):
        clean([tmp_path / "in.jsonl"], out, column="body")
    clean([tmp_path / "in.jsonl"], out, steps=steps, dedup="near", column="body", min_chars=10, overwrite=True)
    assert out.read_bytes() == before  # the same again, byte for byte
    everything = tmp_path / f"all-{name}"
    assert clean([tmp_path / "in.jsonl"], everything, steps=steps, column="body").values["written"]["documents"] == 361
    if ".jsonl" in name:
        assert len(read_rows(everything)) == 361


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path / "in.jsonl", 1_500_000)
    reports = []
    for workers in (1, 2):
        report = clean([tmp_path / "in.jsonl"], tmp_path / f"{workers}.jsonl", dedup="near", workers=workers).values
        reports.append({k: v for k, v in report.items() if k not in ("out", "workers", "seconds")})
    assert reports[0] == reports[1]
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_languages_are_chosen(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    report = clean([data_folder / "udhr"], out, language="eo,de")
    assert {row["source"]: row["language"] for row in read_rows(out)} == {
        "deu.txt": "de", "epo.txt": "eo", "ido.txt": "eo"
    }  # fmt: skip
    assert report.values["removed"] == {"another language": 43}
    clean([data_folder / "udhr" / "epo.txt"], out, among="en,eo", overwrite=True)
    assert [row["language"] for row in read_rows(out)] == ["eo"]
    with pytest.raises(InputError, match='does not know "xx"'):
        clean([data_folder / "udhr"], tmp_path / "new.jsonl", language="de", among="de,xx")
    assert not (tmp_path / "new.jsonl").exists()


def test_paragraphs_of_a_book(data_folder: Path, tmp_path: Path) -> None:
    """A book's notices are told before it is cut."""
    clean([data_folder / "books" / "botchan.txt"], tmp_path / "out.txt", unit="line", dedup="exact")
    lines = (tmp_path / "out.txt").read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 3700
    assert lines[0] == "BOTCHAN (MASTER DARLING)" and "gutenberg" not in "\n".join(lines).lower()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Ann's mail: ann@example.org!\n\n\n\n\n\nBye"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-16"))))
    page = tmp_path / "report.html"
    words = ["-", "-o", str(tmp_path / "o.txt"), "--steps", "mask-email, lower,blanks", "--report", str(page), "--json"]
    assert main(["clean", *words]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (tmp_path / "o.txt").read_text() == "ann's mail: [email]!\n\n\nbye\n\n"
    assert [(s["step"], s["documents"], s["came"]) for s in values["steps"]] == [
        ("mask-email", 1, 7), ("lower", 1, 7), ("blanks", 1, 0)
    ]  # fmt: skip
    assert values["encodings"] == {"utf-16-le": 1}
    assert "mask-email" in page.read_text()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.txt": b""}, (), "there is no text here"),
        ({"a.txt": b" \n\x00", "b.txt": b"\n"}, (), "a zero byte|no text here"),
        ({"a.txt": b"\xef\xbb\xbf \n"}, (), "there is no text here"),
        ({"a.pdf": b"x"}, (), r"no text files here[\s\S]*export it as plain text"),
        ({"a.txt": b"text\0with a zero"}, (), r"a\.txt is not text[\s\S]*zero byte at byte 4"),
        ({"a.txt": bytes(range(1, 256)) * 9}, (), r"a\.txt is not text|is not"),
        ({"a.csv": b"id,body\n1,x\n"}, (), r"which column holds the text\?[\s\S]*id, body"),
        ({"a.csv": b"id,body\n1,x\n"}, ("--column", "bdy"), r'no column "bdy"[\s\S]*did you mean "body"'),
        ({"a.csv": b"id,text\n1,x\n2\n"}, (), r'a row ends before the column "text"[\s\S]*a\.csv, line 3'),
        ({"a.csv": b"text,text\nx,y\n"}, (), r'two columns have the same name[\s\S]*call one "text" otherwise'),
        ({"a.txt": b"x"}, ("--encoding", "klingon"), 'no encoding "klingon"'),
        ({"a.txt": b"x"}, ("--steps", "nfc,lowr"), r'no cleaning step "lowr"[\s\S]*did you mean "lower"'),
        ({"a.txt": b"x"}, ("--min-chars", "9"), r"nothing is left[\s\S]*1 document too short"),
        ({"a.txt": b"x"}, ("--min-chars", "-3"), "no text is that short"),
        ({"a.txt": b"x"}, ("--workers", "-3"), r"somebody has to work[\s\S]*--workers -3"),
        ({"a.txt": b"x"}, ("--threshold", "1.5", "--dedup", "near"), "out of range"),
        ({"a.parquet": b"PAR1"}, (), "this is no parquet file"),
    ],
)
def test_bad_input_ends_in_one_message(
    files: dict[str, bytes], options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    workers = () if "--workers" in options else ("--workers", "1")
    assert main(["clean", str(folder), "-o", str(tmp_path / "out.jsonl"), *workers, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("lmworks:") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # nothing is left behind


def test_bad_outputs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for out, message in (("a.txt", "one of the inputs"), ("b.csv", "does not say how"), ("", "cannot write to")):
        with pytest.raises(InputError, match=message):
            clean([tmp_path / "a.txt"], tmp_path / out)
    with pytest.raises(InputError, match="no file or folder"):
        clean([tmp_path / "missing"], tmp_path / "out.txt")


def test_lone_surrogates_become_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b", "other": "\\udfff"}\n')
    for steps in ("controls", "lower"):  # none of the steps is needed for it
        clean([tmp_path / "a.jsonl"], tmp_path / "out.jsonl", steps=steps, dedup="near", overwrite=True)
        assert read_rows(tmp_path / "out.jsonl") == [{"text": "a\ufffdb", "other": "\ufffd"}]


def kill_in_the_middle(source: Path, out: Path, wait: float) -> None:
    """Kill `lmworks clean` after so many seconds of work; its workers end with it."""
    command = [sys.executable, "-m", "lmworks", "clean", str(source), "-o", str(out), "--dedup", "near", "--overwrite",
               "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting = out.with_name(f".{out.name}.waiting{STAGED}")
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(wait)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_killed_run_leaves_what_was_there(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    make_corpus(source, 6_000_000)
    kill_in_the_middle(source, out, 0.5)
    assert not out.exists()
    out.write_text("what was there before\n")
    kill_in_the_middle(source, out, 0.0)
    assert out.read_text() == "what was there before\n"
    clean([source], out, overwrite=True)  # and what was left behind is in nobody's way
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["in.jsonl", "out.jsonl"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_half_a_gigabyte_in_flat_memory(tmp_path: Path) -> None:
    """250 and 500 MB: all duplicates found, under 500 MB for all processes together, the same within noise."""
    most = []
    for size in (250, 500):
        source, out = tmp_path / f"{size}.jsonl", tmp_path / f"{size}-clean.jsonl"
        made = make_corpus(source, size * 1_000_000)
        code, output, memory = run_measured(
            sys.executable, "-m", "lmworks", "clean", str(source), "-o", str(out), "--dedup", "near", "--workers", "2",
            "--json",
        )  # fmt: skip
        assert code == 0, output
        values = json.loads(output)
        assert values["removed"] == {"exact duplicate": made.exact, "near duplicate": made.near}
        assert values["written"]["documents"] == made.documents - made.exact - made.near
        most.append(memory)
        print(f"{size} MB of text: {memory:.0f} MB of memory, {values['seconds']:.0f} s")
    assert most[1] < 500 and most[1] < 1.15 * most[0]
    kill_in_the_middle(tmp_path / "500.jsonl", tmp_path / "killed.jsonl", 20)
    assert not (tmp_path / "killed.jsonl").exists()


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog and runs into the wood.\n")
    for said, wrong in (
        ({"threshold": 0.5}, "--threshold is for near duplicates"),
        ({"stdin": "csv"}, "--stdin is for standard input"),
        ({"language": "en", "among": "de,fr"}, "--among rules out"),
        ({"language": "english"}, 'does not know "english"'),
    ):
        with pytest.raises(InputError, match=wrong):
            clean([tmp_path / "a.txt"], tmp_path / "out.jsonl", **said)
    assert clean([tmp_path / "a.txt"], tmp_path / "out.jsonl", language="EN").values["written"]["documents"] == 1


def test_lines_of_an_old_macintosh_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\nthree\r\rfour\r")
    clean([tmp_path / "a.txt"], tmp_path / "lines.txt", unit="line")
    assert (tmp_path / "lines.txt").read_text() == "one\ntwo\nthree\nfour\n"
    clean([tmp_path / "a.txt"], tmp_path / "parts.jsonl", unit="paragraph")
    assert [json.loads(line)["text"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()] == [
        "one\ntwo\nthree",
        "four",
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "x", "n": NaN, "m": {"k": [Infinity, 1]}}\n')
    clean([tmp_path / "b.jsonl"], tmp_path / "b.out.jsonl")
    assert json.loads((tmp_path / "b.out.jsonl").read_text()) == {"text": "x", "n": None, "m": {"k": [None, 1]}}
