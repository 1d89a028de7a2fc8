"""Labelled data of every format against what the files themselves say, and one clear message for each fault."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from nltk.tokenize.treebank import TreebankWordDetokenizer

from lmworks.base.errors import FormatError, InputError
from lmworks.text.formats import write_out
from lmworks.text.labelled import Labelled, check_labels, read_labelled

CLASSES, TAGS, QA = "text-classification", "token-classification", "question-answering"


def put(folder: Path, name: str, content: str | list[Any], encoding: str = "utf-8") -> Path:
    """Write a file: text as it is, a list as one JSON object a line."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(text.encode(encoding))
    return path


def test_sst2_without_a_header(data_folder: Path) -> None:
    for name, count in (("train", 6920), ("dev", 872), ("test", 1821)):
        data = read_labelled(data_folder / "sst2" / f"{name}.tsv", CLASSES, header=False)
        lines = (data_folder / "sst2" / f"{name}.tsv").read_text().splitlines()
        assert [f"{x}\t{y}" for x, y in zip(data.examples, data.references, strict=True)] == lines
        assert (len(data), data.labels) == (count, ("0", "1"))


def test_sst2_read_as_if_it_had_a_header_says_so(data_folder: Path) -> None:
    with pytest.raises(InputError) as error:
        read_labelled(data_folder / "sst2" / "train.tsv", CLASSES)
    assert "a stirring , funny" in error.value.found and "--no-header" in error.value.fix
    assert "train.tsv, line 2" in error.value.where


def test_ag_news(data_folder: Path) -> None:
    path = data_folder / "ag_news" / "test.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    joined = read_labelled(path, CLASSES, text_column="2+3", label_column="1", header=False)
    assert joined.examples == [f"{title} {text}" for _, title, text in rows]
    assert joined.labels == ("1", "2", "3", "4") and Counter(joined.references) == dict.fromkeys("1234", 1900)
    pairs = read_labelled(path, CLASSES, text_column="2,3", label_column="1", header=False)
    assert pairs.examples == [(title, text) for _, title, text in rows]
    three = read_labelled(path, CLASSES, text_column="1,2+3", label_column="1", header=False)
    assert three.examples[5] == (rows[5][0], f"{rows[5][1]} {rows[5][2]}")

    noisy = data_folder / "ag_news" / "train_10k_noisy.csv"
    with noisy.open(newline="") as file:
        table = list(csv.DictReader(file))
    given, true = read_labelled(noisy, CLASSES), read_labelled(noisy, CLASSES, label_column="gt")
    assert given.examples == true.examples == [row["text"] for row in table]
    assert given.references == [row["label"] for row in table] and true.references == [row["gt"] for row in table]
    assert given.labels == true.labels == ("0", "1", "2", "3")


def test_wnut(data_folder: Path) -> None:
    for name, sentences, words in (("train", 3394, 62730), ("dev", 1009, 15733), ("test", 1287, 23394)):
        path = data_folder / "wnut17" / f"{name}.conll"
        data = read_labelled(path, TAGS)
        pairs = zip(data.examples, data.references, strict=True)
        written = [f"{word}\t{tag}" for words, tags in pairs for word, tag in zip(words, tags, strict=True)]
        assert written == [line for line in path.read_text().split("\n") if line.strip()]
        assert (len(data), sum(map(len, data.examples))) == (sentences, words)
        assert len(data.labels) == 13 and data.labels[0] == "O"


@pytest.mark.parametrize("name", ["eng.train", "x.txt", "x.tsv"])
def test_conll_of_four_columns(name: str, tmp_path: Path) -> None:
    text = (
        "-DOCSTART- -X- -X- O\n\n# sent_id = 1\nU.N. NNP B-NP B-ORG\nofficial  NN I-NP O\n\n\n"
        "# # O O\nEkeus\u00a0R. NNP B-NP B-PER\r\n"
    )
    data = read_labelled(put(tmp_path, name, "\ufeff" + text), TAGS)
    assert data.examples == [("U.N.", "official"), ("#", "Ekeus\u00a0R.")]
    assert data.references == [("B-ORG", "O"), ("O", "B-PER")]
    assert data.labels == ("B-ORG", "O", "B-PER")


def test_xquad_answers_stand_where_they_should(data_folder: Path) -> None:
    for language in ("en", "ru", "zh"):
        path = data_folder / "xquad" / f"xquad.{language}.json"
        data = read_labelled(path, QA)
        assert len(data) == 1190 and data.labels == ()
        for (_, context), answers in zip(data.examples, data.references, strict=True):
            assert answers and all(context[start : start + len(text)] == text for text, start in answers)
        questions = [
            q["question"] for a in json.loads(path.read_text())["data"] for p in a["paragraphs"] for q in p["qas"]
        ]
        assert [question for question, _ in data.examples] == questions


def test_qamr_makes_sentences_and_offsets(data_folder: Path) -> None:
    for name, count in (("dev", 18908), ("test", 18770)):
        path = data_folder / "qamr" / f"{name}.tsv"
        data = read_labelled(path, QA)
        assert len(data) == count
        tokens = dict(
            line.split("\t", 1) for line in (path.parent / "wiki-sentences.tsv").read_text().splitlines() if line
        )
        whole = corrected = 0
        for line, (question, context), ((answer, start),) in zip(
            path.read_text().splitlines(), data.examples, data.references, strict=True
        ):
            fields = line.split("\t")
            assert question == fields[5] and context[start : start + len(answer)] == answer
            words, places = tokens[fields[0]].split(" "), [int(i) for i in fields[6].split(" ")]
            people = [places, *([int(i) for i in f.split(":")[1].split(" ")] for f in fields[7:] if f[-1:].isdigit())]
            spans = [one for one in people if one == list(range(one[0], one[-1] + 1))]
            if spans:  # the writer of the question comes first, then the two who checked it
                whole += spans[0] is places
                corrected += spans[0] is not places
                expected, _, _ = write_out(words[spans[0][0] : spans[0][-1] + 1])
                assert answer.replace(" ", "") == expected.replace(" ", "")
        assert whole > 0.97 * count and corrected > 100
    context, ((answer, _),) = data.examples[0][1], data.references[0]
    assert "-LRB-" not in context and " ," not in context and answer


def test_sentences_are_written_as_nltk_writes_them(data_folder: Path) -> None:
    lines = (data_folder / "qamr" / "wiki-sentences.tsv").read_text().splitlines()
    sentences = [line.split("\t", 1)[1].split(" ") for line in random.Random(0).sample(lines, 400)]
    plain = [s for s in sentences if not {"``", "''", "`", "'", "#", "..."} & set(s)]
    detokenizer = TreebankWordDetokenizer()
    same = sum(
        write_out(s)[0] == detokenizer.detokenize(s, convert_parentheses=True).replace(" ' ", "' ") for s in plain
    )
    assert len(plain) > 200 and same > 0.9 * len(plain)
    sentence, starts, words = write_out("`` I do n't , '' he -LRB- Bo 's -RRB- said .".split())
    assert sentence == "“I don't,” he (Bo's) said."
    assert all(sentence.startswith(word, start) for word, start in zip(words, starts, strict=True))


def test_clinc_by_split(data_folder: Path) -> None:
    path = data_folder / "clinc150" / "data_full.json"
    raw = json.loads(path.read_text())
    train = read_labelled(path, CLASSES, split="train")
    assert list(zip(train.examples, train.references, strict=True)) == [tuple(row) for row in raw["train"]]
    assert len(train.labels) == 150 and train.labels[0] == raw["train"][0][1]
    assert check_labels(train, read_labelled(path, CLASSES, split="val")).labels != ()
    both = read_labelled(path, CLASSES, split="train+oos_train")
    assert len(both) == 15_100 and both.labels == (*train.labels, "oos")
    with pytest.raises(InputError, match=r'"oos" does not occur in the training data') as error:
        check_labels(train, read_labelled(path, CLASSES, split="test+oos_test"))
    assert "example 4501" in error.value.where
    for split, says in ((None, "which split"), ("tain", "tain")):
        with pytest.raises(InputError, match=says) as error:
            read_labelled(path, CLASSES, split=split)
        assert "oos_test (1,000 rows)" in error.value.found
    assert 'did you mean "train"' in error.value.fix


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "list"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_table_in_every_format(ending: str, encoding: str, tmp_path: Path) -> None:
    rows = [
        {"text": 'plain, "quoted"', "label": "Größe", "id": "1"},
        {"text": "two\nlines\tand a tab", "label": "1.5", "id": "2"},
        {"text": "Привет" + " x" * 100_000, "label": "Größe", "id": "3"},
    ]
    path = tmp_path / f"data.{ending.replace('list', 'json')}"
    with path.open("w", encoding=encoding, newline="") as file:
        if ending in ("csv", "tsv"):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
        elif ending == "list":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = read_labelled(path, CLASSES)
    assert data.examples == [row["text"] for row in rows]
    assert data.references == ["Größe", "1.5", "Größe"] and data.labels == ("Größe", "1.5")
    assert read_labelled(path, CLASSES, text_column="Text", label_column="id").labels == ("1", "2", "3")


@pytest.mark.parametrize(
    ("values", "references", "labels"),
    [
        (["b", "a", "b"], ["b", "a", "b"], ("b", "a")),
        ([10, 2, 0], ["10", "2", "0"], ("0", "2", "10")),
        ([True, False], ["true", "false"], ("true", "false")),
        ([0.5, 2, 1e3], [0.5, 2.0, 1000.0], ()),
        (["1.5", "2.0"], ["1.5", "2.0"], ("1.5", "2.0")),
        ([["joy", "fear"], [], ["fear"]], [("joy", "fear"), (), ("fear",)], ("joy", "fear")),
        ([[3, 1], [2]], [("3", "1"), ("2",)], ("1", "2", "3")),
    ],
)
def test_kinds_of_labels(values: list[Any], references: list[Any], labels: tuple[str, ...], tmp_path: Path) -> None:
    data = read_labelled(put(tmp_path, "x.jsonl", [{"text": "t", "label": v} for v in values]), CLASSES)
    assert (data.references, data.labels) == (references, labels)


def test_numbers_in_a_table_are_numbers_only_if_one_has_a_point(tmp_path: Path) -> None:
    train = read_labelled(put(tmp_path, "a.csv", "text,label\nx,1\ny,2.5\n"), CLASSES)
    assert train.references == [1.0, 2.5] and train.labels == ()
    whole = read_labelled(put(tmp_path, "b.csv", "text,label\nx,1\ny,12\n"), CLASSES)
    assert whole.references == ["1", "12"] and whole.labels == ("1", "12")
    assert check_labels(train, whole).references == [1.0, 12.0]
    names = read_labelled(put(tmp_path, "c.csv", "text,label\nx,1.5\ny,good\n"), CLASSES)
    with pytest.raises(InputError, match=r'"1\.5" does not occur'):
        check_labels(train, names)
    with pytest.raises(InputError, match=r'"1\.0" does not occur'):
        check_labels(whole, train)


def test_pairs_and_their_usual_names(tmp_path: Path) -> None:
    rows = [{"premise": "A man.", "hypothesis": "A human.", "label": 0, "p,q": "one"}]
    path = put(tmp_path, "nli.jsonl", rows)
    assert read_labelled(path, CLASSES).examples == [("A man.", "A human.")]
    assert read_labelled(path, CLASSES, text_column="hypothesis,premise").examples == [("A human.", "A man.")]
    assert read_labelled(path, CLASSES, text_column="p,q").examples == ["one"]  # a column's own name wins
    glue = put(tmp_path, "rte.tsv", "sentence1\tsentence2\tlabel\nA.\tB.\tentailment\n")
    assert read_labelled(glue, CLASSES).examples == [("A.", "B.")]


@pytest.mark.parametrize("tokens", ["tokens", "words"])
@pytest.mark.parametrize("tags", ["ner_tags", "tags"])
def test_sentences_of_rows(tokens: str, tags: str, tmp_path: Path) -> None:
    row = {tokens: ["Ada", "met", "Bo's"], tags: ["B-PER", "O", "B-PER"]}
    expected = ([("Ada", "met", "Bo's")], [("B-PER", "O", "B-PER")], ("B-PER", "O"))
    for path in (
        put(tmp_path, "a.jsonl", [row]),
        put(tmp_path, "a.csv", f'{tokens},{tags}\n"[""Ada"", ""met"", ""Bo\'s""]","[\'B-PER\', \'O\', \'B-PER\']"\n'),
        put(tmp_path, "a.tsv", f"{tokens}\t{tags}\nAda met Bo's\tB-PER O B-PER\n"),
    ):
        data = read_labelled(path, TAGS)
        assert (data.examples, data.references, data.labels) == expected
    numbers = put(tmp_path, "n.jsonl", [{"tokens": ["a", "b"], "ner_tags": [10, 9]}])
    assert read_labelled(numbers, TAGS).labels == ("9", "10")


def test_questions_of_rows_and_of_squad_2(tmp_path: Path) -> None:
    context, asked = "Ada met Bob.", {"id": "q1", "question": "Who?", "context": "Ada met Bob."}
    both = (("Ada", 0), ("Bob", 8))
    forms: list[tuple[Any, Any]] = [
        ({"text": ["Ada", "Bob"], "answer_start": [0, 8]}, both),
        ([{"text": "Ada", "answer_start": 0}, {"text": "Bob", "answer_start": 8}], both),
        ({"text": [], "answer_start": []}, ()),
        ([], ()),
    ]
    for answers, expected in forms:
        data = read_labelled(put(tmp_path, "q.jsonl", [{**asked, "answers": answers}]), QA)
        assert (data.examples, data.references) == ([("Who?", context)], [expected])
    questions = [
        {"id": 1, "question": "Who?", "is_impossible": False, "answers": [{"text": "Ada", "answer_start": 0}]},
        {"id": 2, "question": "Why?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]},
    ]
    squad = {"version": "v2.0", "data": [{"title": "A", "paragraphs": [{"context": context, "qas": questions}]}]}
    for indent in (None, 1):
        data = read_labelled(put(tmp_path, "squad.json", json.dumps(squad, indent=indent)), QA)
        assert data.examples == [("Who?", context), ("Why?", context)]
        assert data.references == [(("Ada", 0),), ()]


def test_texts_to_go_on_from(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"prompt": "2+2=", "completion": "4"}, {"messages": messages}, {"text": "once"}]
    path = put(tmp_path, "a.jsonl", rows)
    data = read_labelled(path, "text-generation")
    assert data.examples == [{"prompt": "2+2=", "completion": "4"}, {"messages": messages}, "once"]
    assert data.references == [None] * 3 and data.labels == ()
    one = put(tmp_path, "one.jsonl", [{"messages": messages}])  # a single line, its value a list of objects
    assert read_labelled(one, "text-generation").examples == [{"messages": messages}]
    table = put(tmp_path, "b.csv", "question,reply,text\nwhy?,so.,whole\n")
    assert read_labelled(table, "text-generation").examples == ["whole"]
    asked = read_labelled(table, "text-generation", text_column="question", label_column="reply")
    assert asked.examples == [{"prompt": "why?", "completion": "so."}]
    put(tmp_path, "books/a.txt", "one book")
    put(tmp_path, "books/b.txt", "another")
    assert read_labelled(tmp_path / "books", "text-generation").examples == ["one book", "another"]
    assert read_labelled(tmp_path / "books" / "a.txt", "text-generation").examples == ["one book"]


def test_folders_by_class_and_by_split(tmp_path: Path) -> None:
    for name in ("train/pos/1.txt", "train/neg/2.txt", "test/neg/3.txt"):
        put(tmp_path, name, name)
    train = read_labelled(tmp_path / "train", CLASSES)
    assert (train.examples, train.references) == (["train/neg/2.txt", "train/pos/1.txt"], ["neg", "pos"])
    assert read_labelled(tmp_path, CLASSES, split="test").examples == ["test/neg/3.txt"]
    put(tmp_path, "validation.jsonl", [{"text": "x", "label": "pos"}])
    assert read_labelled(tmp_path, CLASSES, split="validation").references == ["pos"]
    with pytest.raises(InputError, match="no split") as error:
        read_labelled(tmp_path, CLASSES, split="tests")
    assert 'did you mean "test"' in error.value.fix


def test_images_by_folder_and_by_table(tmp_path: Path) -> None:
    for name in ("cats/a.png", "dogs/b.jpg", "dogs/notes.txt"):
        put(tmp_path, name, "x")
    data = read_labelled(tmp_path, "image-classification")
    assert data.examples == [str(tmp_path / "cats" / "a.png"), str(tmp_path / "dogs" / "b.jpg")]
    assert data.references == ["cats", "dogs"] and data.labels == ("cats", "dogs")
    table = put(tmp_path, "metadata.csv", "file_name,label\ndogs/b.jpg,1\ncats/a.png,0\n")
    listed = read_labelled(table, "image-classification")
    assert (listed.examples, listed.labels) == (data.examples[::-1], ("0", "1"))
    table = put(tmp_path, "bad.csv", "image,label\ndogs/c.jpg,1\n")
    with pytest.raises(InputError, match="no such image") as error:
        read_labelled(table, "image-classification")
    assert "line 2" in error.value.where and error.value.found == "dogs/c.jpg"


GOOD = {"text": "x", "label": "a"}
ASKED = {"id": "q7", "question": "Who?", "context": "Ada met Bob."}
FAULTS: list[tuple[str, str | list[Any], str, list[str]]] = [
    ("a.jsonl", [{"text": "x", "lable": "a", "id": 1}], CLASSES, ["text, lable, id", 'did you mean "lable"', "line 1"]),
    ("a.csv", "txt,label\nx,a\n", CLASSES, ["columns txt, label", 'did you mean "txt"', "--text-column", "line 2"]),
    ("a.jsonl", [GOOD, {"text": "y"}], CLASSES, ["a row has no label", "a.jsonl, line 2"]),
    ("a.jsonl", [GOOD, {"text": "y", "label": None}], CLASSES, ["a row has no label", "a.jsonl, line 2"]),
    ("a.csv", "text,label\nx,a\ny\n", CLASSES, ["a row has no label", "a.csv, line 3"]),
    ("a.csv", "text,label\nx\n", CLASSES, ["a row has no label", "a.csv, line 2"]),
    ("a.tsv", "text\tlabel\nx\ta\ny\t\n", CLASSES, ["a row has no label", "a.tsv, line 3"]),
    ("a.csv", "text,label\nx,y,a\n", CLASSES, ["more fields", "line 2", "3 fields"]),
    ("a.jsonl", [GOOD, {"text": " ", "label": "a"}], CLASSES, ['no text in column "text"', "line 2"]),
    ("a.jsonl", [GOOD, {"text": 3, "label": "a"}], CLASSES, ["no text", "line 2", "found: 3"]),
    ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": \n', CLASSES, ["not JSON", "line 2"]),
    ("a.json", '{"train": [["x", "a"]\n', CLASSES, ["not JSON", "a.json"]),
    ("a.json", '{"train": [["x", "a", "b"]]}', CLASSES, ["not a JSON object", "train, row 1"]),
    ("a.jsonl", [GOOD, {"text": "x", "label": ["a"]}], CLASSES, ["different kinds", "line 2"]),
    ("a.jsonl", [GOOD, {"text": "x", "label": 0.5}], CLASSES, ["different kinds", "0.5"]),
    ("a.jsonl", [GOOD, {"text": "x", "label": 1}], CLASSES, ["different kinds", "1, after names", "line 2", "quotes"]),
    ("a.jsonl", [{"text": "x", "label": 1}, GOOD], CLASSES, ["different kinds", "'a', after integers", "line 2"]),
    ("a.jsonl", [{"text": "x", "label": "1"}, GOOD, {"text": "x", "label": 2}], CLASSES, ["2, after names", "line 3"]),
    ("a.jsonl", [{"text": "x", "label": 1}, {"text": "x", "label": True}], CLASSES, ["True, after integers"]),
    ("a.jsonl", [{"text": "x", "label": {"a": 1}}], CLASSES, ["no label", "line 1"]),
    ("a.jsonl", '{"text": "x", "label": NaN}', CLASSES, ["no label", "nan"]),
    ("a.csv", "text,label\nx,0.5\ny,nan\n", CLASSES, ["no number, but the others are", "line 3", "'nan'"]),
    ("a.csv", "text,label\n" + "x,0.5\n" * 30 + "y,o.5\n", CLASSES, ["line 32", "'o.5'; 1 such of 31"]),
    ("a.csv", "text,text,label\nx,y,a\n", CLASSES, ["two columns have the same name", 'call one "text" otherwise']),
    ("a.jsonl", "", CLASSES, ["nothing in this file", "a.jsonl"]),
    ("a.csv", "text,label\n", CLASSES, ["no examples", "a header and no rows"]),
    ("a.txt", "x\ta\n", CLASSES, ["a .txt does not say", ".jsonl"]),
    ("a.parquet", "x", CLASSES, ["this is no parquet file", "a.parquet"]),
    ("a.jsonl", [{"tokens": ["a"], "tags": ["O", "O"]}], TAGS, ["differ in number", "line 1", "1 words and 2 tags"]),
    ("a.jsonl", [{"tokens": [], "tags": []}], TAGS, ["these are no words", "line 1"]),
    ("a.conll", "Ada\tB-PER\nmet\n", TAGS, ["a word without a tag", "a.conll, line 2", "met"]),
    ("a.conll", "Ada\tB-PER\n\n\tO\n", TAGS, ["a tag without a word", "a.conll, line 3"]),
    (
        "a.jsonl",
        [{**ASKED, "answers": [{"text": "Bob", "answer_start": 7}]}],
        QA,
        ["not where it should be", "question q7", "line 1", "' Bo'", "fix: answer_start 8"],
    ),
    ("a.jsonl", [{**ASKED, "answers": [{"text": "Eve", "answer_start": 0}]}], QA, ["question q7", "must hold"]),
    ("a.jsonl", [{**ASKED, "answers": [{"text": "Ada"}]}], QA, ["question q7", "answer_start None"]),
    ("a.jsonl", [{**ASKED, "answers": "Ada"}], QA, ["these are no answers", "question q7"]),
    ("a.jsonl", [{**ASKED, "anwsers": []}], QA, ["which column holds the answers", 'did you mean "anwsers"']),
    ("a.json", '{"data": [{"paragraphs": [{"context": "x"}]}]}', QA, ["not SQuAD's form", "no 'qas'"]),
    ("dev.tsv", "Wiki1k:x:1\t3 4\t76\t0\t3\tHow?\t0 1\t261:0\t60:3\n", QA, ["wiki-sentences.tsv"]),
    ("a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}], "text-generation", ["without an answer"]),
    ("a.jsonl", [{"messages": [{"role": "user"}]}], "text-generation", ["no messages", "line 1"]),
    ("a.jsonl", [{"prompt": "x", "completion": ""}], "text-generation", ['no text in column "completion"']),
    ("a.jsonl", [GOOD], "text-clasification", ['did you mean "text-classification"']),
]


@pytest.mark.parametrize(("name", "content", "task", "says"), FAULTS)
def test_faults_are_named(name: str, content: str | list[Any], task: str, says: list[str], tmp_path: Path) -> None:
    path = put(tmp_path, name, content)
    with pytest.raises((InputError, FormatError)) as error:
        read_labelled(path, task)
    for part in says:
        assert part in str(error.value)


def test_a_missing_file_and_a_split_of_a_file_without_any(tmp_path: Path) -> None:
    path = put(tmp_path, "train.jsonl", [GOOD])
    with pytest.raises(InputError, match=r"there is no file") as error:
        read_labelled(tmp_path / "trian.jsonl", CLASSES)
    assert 'did you mean "train.jsonl"' in error.value.fix
    with pytest.raises(InputError, match="no splits"):
        read_labelled(path, CLASSES, split="train")
    with pytest.raises(InputError, match="no text-classification data"):
        read_labelled(tmp_path, CLASSES)


def test_labels_that_training_has_not_seen() -> None:
    train = Labelled(CLASSES, ["x", "y"], ["positive", "negative"], ("positive", "negative"), "train.csv")
    other = Labelled(CLASSES, ["x", "z"], ["positive", "postive"], ("positive", "postive"), "dev.csv")
    assert check_labels(train, train) is train
    with pytest.raises(InputError, match='the label "postive" does not occur') as error:
        check_labels(train, other)
    assert error.value.where == "dev.csv, example 2: 'z'" and 'did you mean "positive"' in error.value.fix
    tagged = Labelled(TAGS, [("a",)], [("O",)], ("O",), "train.conll")
    strange = Labelled(TAGS, [("a", "b")], [("O", "B-PER")], ("O", "B-PER"), "dev.conll")
    with pytest.raises(InputError, match='"B-PER"'):
        check_labels(tagged, strange)
    with pytest.raises(InputError, match="different tasks"):
        check_labels(train, tagged)
