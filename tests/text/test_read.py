"""Files and folders to documents, and one clear message for everything that cannot be read."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from selectolax.lexbor import LexborHTMLParser

from lmworks.base.errors import InputError
from lmworks.text.html import main_text
from lmworks.text.read import Document, read_documents


def write(folder: Path, **files: str | bytes) -> Path:
    """Write files named NAME_ENDING -> NAME.ENDING."""
    for key, content in files.items():
        path = folder / key.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_folder_is_read_recursively_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, b_txt="two", a_md="# one", sub__c_TXT="three", notes_docx="no", sub__d_jsonl='{"text": "four"}\n')
    write(tmp_path, e_txt="")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("secret")
    (tmp_path / "loop").symlink_to(tmp_path)
    documents = read_documents(tmp_path)
    assert [(d.name, d.text) for d in documents] == [
        ("a.md", "# one"),
        ("b.txt", "two"),
        ("e.txt", ""),
        ("sub/c.TXT", "three"),
        ("sub/d.jsonl:1", "four"),
    ]


def test_the_encoding_is_reported(tmp_path: Path) -> None:
    write(tmp_path, a_txt="Всеобщая декларация прав человека и гражданина. Принята единогласно.".encode("cp1251"))
    (document,) = read_documents(tmp_path / "a.txt")
    assert document.text.startswith("Всеобщая")
    assert document.encoding == "cp1251"


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("wanted", ["Body", "body", None])
def test_tables_by_column(ending: str, wanted: str | None, tmp_path: Path) -> None:
    texts = ['plain, with "quotes"\tand a tab', "two\nlines", "", '"all quoted"', "a;b|c"]
    name = wanted.title() if wanted else "TEXT "
    path = tmp_path / f"t.{ending}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        if ending == "jsonl":
            file.writelines(json.dumps({"id": i, name: text}) + "\n" for i, text in enumerate(texts))
        else:
            writer = csv.writer(file, delimiter="," if ending == "csv" else "\t")
            writer.writerows([["id", name], *enumerate(texts)])
    assert [d.text for d in read_documents(path, column=wanted)] == texts


def test_what_parts_the_fields_is_not_looked_for_in_quotes(tmp_path: Path) -> None:
    write(tmp_path, a_csv=b'"one, two, ""three"", four";label\n"five, six";1\n')
    assert [d.text for d in read_documents(tmp_path / "a.csv", column="1")] == ['one, two, "three", four', "five, six"]


def test_tsv_is_taken_literally_when_its_tabs_add_up(tmp_path: Path) -> None:
    """Corpora such as Tatoeba's hold lone quotes; read as csv, whole lines would vanish into one field."""
    write(tmp_path, a_tsv='id\ttext\n1\t"Hi!" she said.\n2\t"No.\n3\t"He said ""yes"""\n4\tnel\x85line\n'.encode())
    texts = [d.text for d in read_documents(tmp_path / "a.tsv")]
    assert texts == ['"Hi!" she said.', '"No.', 'He said "yes"', "nel\x85line"]
    assert read_documents(tmp_path / "a.tsv")[1].name == "a.tsv:3"


def test_tatoeba_pairs_have_names_though_no_header(data_folder: Path) -> None:
    folder = data_folder / "conlang" / "tokipona"
    documents = read_documents(folder, column="tp")
    rows = (folder / "tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()
    assert [d.text for d in documents[: len(rows)]] == [row.split("\t")[3] for row in rows]
    assert len(rows) == 20_209
    assert read_documents(folder / "tatoeba-en-tp.tsv", column="EN")[0].text == "I have to go to sleep."
    with pytest.raises(InputError, match="columns id_en, en, id_tp, tp"):
        read_documents(folder)


def test_a_number_picks_a_column_without_a_header(data_folder: Path, tmp_path: Path) -> None:
    documents = read_documents(data_folder / "ag_news" / "test.csv", column="3")
    assert len(documents) == 7600
    assert documents[0].text.startswith("Unions representing workers")
    write(tmp_path, a_csv="0;1;2\nx;y;z\n")  # here "2" is a name
    assert [d.text for d in read_documents(tmp_path / "a.csv", column="2")] == ["z"]


def test_a_wrong_column_lists_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, a_csv="id,label,body\n1,x,hello\n", b_jsonl='{"body": "x"}\n\n{"boody": "y"}\n')
    with pytest.raises(InputError, match=r'no column "bodi"[\s\S]*id, label, body[\s\S]*did you mean "body"\?'):
        read_documents(tmp_path / "a.csv", column="bodi")
    with pytest.raises(InputError, match=r"which column holds the text\?[\s\S]*id, label, body"):
        read_documents(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"b\.jsonl, line 3"):
        read_documents(tmp_path / "b.jsonl", column="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text\n"open\n', r"a\.csv, line"),
        ("a.csv", "id,text\n1,a,b\n", r"line 2[\s\S]*3 fields"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"not JSON[\s\S]*line 2"),
        ("a.jsonl", "[1]\n", r"not a JSON object[\s\S]*line 1"),
        ("a.jsonl", '{"text": 3}\n', r"does not hold text[\s\S]*int"),
        ("a.jsonl", '{"text": null}\n', "no text here"),
        ("a.txt", "", "no text here"),
        ("a.txt", " \n\t\n", "no text here"),
        ("a.csv", "text\n", "no text here"),
        ("a.json", "{}", r"\.json files are not read"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a\.txt is not text"),
        ("a.html", "<script>x</script>", "no text here"),
    ],
)
def test_bad_files_end_in_one_message(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        read_documents(tmp_path / name)


def test_bad_folders_end_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no text files here[\s\S]*nothing"):
        read_documents(tmp_path)
    write(tmp_path, a_pdf="x", b_xyz="x")
    with pytest.raises(InputError, match=r"\.pdf, \.xyz; \.pdf: export it"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match=r'no file or folder[\s\S]*did you mean "a\.pdf"'):
        read_documents(tmp_path / "a.pdff")
    write(tmp_path, a_txt="x")

    def denied(path: Path, *_: str) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"this file cannot be read[\s\S]*a\.txt"):
        read_documents(tmp_path)


def test_an_unknown_ending_is_text_when_named(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("hello")
    assert read_documents(tmp_path / "README") == [Document("README", "hello")]


def test_html_main_text_against_readability(data_folder: Path) -> None:
    """Word F1 with what Mozilla's Readability extracts, page by page."""
    pages = sorted((data_folder / "dirty" / "html").glob("*/source.html"))
    assert len(pages) == 19
    for page in pages:
        expected = LexborHTMLParser((page.parent / "expected.html").read_text("utf-8")).text(separator=" ")
        (document,) = read_documents(page)
        a, b = (Counter(re.findall(r"\w+", text)) for text in (expected, document.text))
        assert 2 * (a & b).total() / (a.total() + b.total()) > 0.95, page.parent.name


def test_html_layout() -> None:
    page = (
        "<title>no</title><body><nav>menu</nav><h1>T</h1>intro <b>bold</b> x<p>one<br>two<p style='display: none'>no"
        "<pre>a\n  b\n</pre><ul><li>x<li>y &amp; z</ul><ul><li><a>1</a><li><a>2</a><li><a>3</a></ul>tail"
    )
    assert main_text(page) == "T\n\nintro bold x\n\none\ntwo\n\na\n  b\n\nx\n\ny & z\n\ntail"
    assert main_text("") == ""
    assert len(main_text("<div>" * 5000 + "deep")) == 4  # neither recursion nor quadratic time


def test_html_article_beats_the_rest() -> None:
    page = f"<body><div>Read also this</div><article><p>{'word ' * 50}</p></article><div>Comments</div>"
    assert main_text(page) == ("word " * 50).strip()
    assert "Read also" in main_text(page.replace("word " * 50, "x"))  # a short article is not the main text
