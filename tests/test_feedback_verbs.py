"""Feedback from the command line: counted, decided, exported, moved between databases, and trained on."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from databases import Server, Sqlite
from sqlalchemy import select, update

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_languages

from lmworks.base.errors import FormatError, InputError, Interrupted
from lmworks.base.files import read_json
from lmworks.cli import main
from lmworks.serve.feedback import ANSWERS, FEEDBACK, Store, make_answer, set_state
from lmworks.serve.feedback_database import open_engine
from lmworks.text.labelled import read_labelled
from lmworks.verbs.feedback import copy_feedback, forget_feedback, review_feedback, take_feedback
from lmworks.verbs.finetuning import finetune

Filled = tuple[str, list[str]]
GIVEN = (  # model, text, what the model said, what people said
    ("news", "rain tomorrow", "Sports", "World"), ("news", "a goal", "Sports", "Sports"),
    ("news", "shares fell", "World", "Business"), ("news", "shares fell", "World", "Sports"),
    ("mood", "ünïcode\nin two lines", None, "good"), ("pairs", ("one", "two"), "same", "other"),
)  # fmt: skip


class StopAfterTheFirstStep:
    """Ctrl-C that comes at once."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: Any) -> None:
        return None


def fill(url: str) -> list[str]:
    """Keep some feedback; return its ids."""
    store, ids = Store(url, create=True), []
    for model, text, said, label in GIVEN:
        answer = make_answer(model, text, said, None if said is None else 0.1 + 0.2)
        with store.begin() as connection:
            store.put(connection, ANSWERS, [answer])
            ids.append(store.give(connection, answer, label).id)
    store.close()
    return ids


@pytest.fixture(params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path: Path, postgres: Server) -> Filled:
    """A database with some feedback, and its ids."""
    url = f"sqlite:///{tmp_path}/feedback.db" if request.param == "sqlite" else postgres.make().url
    return url, fill(url)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A verb's answer as JSON."""

    def run(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_feedback_is_listed_decided_and_exported(filled: Filled, said: Callable[..., Any], tmp_path: Path) -> None:
    url, ids = filled
    listed = said("feedback", "list", url)
    assert (listed["new"], listed["accepted"], listed["rejected"]) == (6, 0, 0)
    assert [row["id"] for row in listed["waiting"]] == ids, "in the order in which it came"
    assert listed["counts"][0] == {"model": "mood", "label": "good", "state": "new", "count": 1, "agree": 0}
    sports = {"model": "news", "label": "Sports", "state": "new", "count": 2, "agree": 1}
    assert sports in listed["counts"] and len(listed["counts"]) == 5
    assert len(said("feedback", "list", url, "--model", "news")["waiting"]) == 4

    out = tmp_path / "out.jsonl"
    assert main(["feedback", "export", url, "-o", str(out)]) == 2 and not out.exists(), "nothing is accepted yet"
    assert main(["feedback", "review", url, "--accept", ids[0], "f" * 16]) == 2
    assert said("feedback", "list", url)["accepted"] == 0, "an unknown id changes nothing"
    decided = said("feedback", "review", url, "--accept", ids[0], ids[2], "--reject", ids[1])
    assert (decided["accepted"], decided["rejected"]) == (2, 1)
    exported = said("feedback", "export", url, "-o", str(out))
    assert (exported["examples"], exported["contradicting"]) == (2, [])
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows == [{"text": "rain tomorrow", "label": "World"}, {"text": "shares fell", "label": "Business"}]
    assert said("feedback", "review", url, "--accept", "all")["accepted"] == 3
    exported = said("feedback", "export", url, "-o", str(out), "--model", "news")
    assert exported["contradicting"] == [{"text": "shares fell", "labels": ["Business", "Sports"]}]
    assert read_labelled(out, "text-classification").examples == ["rain tomorrow"]
    said("feedback", "review", url, "--reject", ids[2])
    for model, examples in (("mood", ["ünïcode\nin two lines"]), ("pairs", [("one", "two")])):
        said("feedback", "export", url, "-o", str(out), "--model", model, "--all")
        assert read_labelled(out, "text-classification").examples == examples
    for words in (("--accept", ids[0], "--reject", ids[0]), ("--accept", "all", "--reject", "all"), ()):
        assert main(["feedback", "review", url, *words]) == 2


def test_what_is_old_is_forgotten_but_for_what_waits(
    filled: Filled, said: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Old: two silent answers, one accepted, one rejected, one that waits. Young: the rest."""
    url, ids = filled
    monkeypatch.setattr("lmworks.verbs.feedback.PART", 2)
    store = Store(url)
    silent = [make_answer("news", f"a secret {number}", "World", 0.5) for number in range(3)]
    day = 1_700_000_000.0
    with store.begin() as connection:
        store.put(connection, ANSWERS, silent)
        set_state(connection, ids[:1], "accepted")
        set_state(connection, ids[1:2], "rejected")
        old = [silent[0]["id"], silent[1]["id"]]
        for id in ids[:3]:
            connection.execute(update(FEEDBACK).where(FEEDBACK.c.id == id).values(received=day - 5))
            old.append(connection.execute(select(FEEDBACK.c.answer).where(FEEDBACK.c.id == id)).scalar_one())
        connection.execute(update(ANSWERS).where(ANSWERS.c.id.in_(old)).values(asked=day - 10))
    if store.file is not None:
        assert b"a secret 0" in store.file.read_bytes() + Path(f"{store.file}-wal").read_bytes()

    def left() -> tuple[set[str], set[str]]:
        with store.begin(reads=True) as connection:
            return ({row.id for row in connection.execute(select(ANSWERS.c.id))},
                    {row.id for row in connection.execute(select(FEEDBACK.c.id))})  # fmt: skip

    answers, feedback = left()
    assert len(answers) == 9 and feedback == set(ids)
    for wrong in ("yesterday", "2999-01-01"):
        assert main(["feedback", "forget", url, "--before", wrong]) == 2
    words = ("feedback", "forget", url, "--before", "2023-11-14T22:13:20")  # which is that day, in seconds
    told = said(*words[:-1], "2023-11-14T22:13:05")
    assert (told["answers"], told["feedback"]) == (0, 0) and left() == (answers, feedback)
    told = said(*words)
    assert (told["answers"], told["feedback"]) == (2, 0) and left() == (answers - set(old[:2]), feedback)
    told = said(*words, "--all")
    assert (told["answers"], told["feedback"]) == (2, 2)
    assert left() == (answers - set(old[:4]), feedback - set(ids[:2]))
    if store.file is not None:
        log = Path(f"{store.file}-wal")
        held = store.file.read_bytes() + (log.read_bytes() if log.exists() else b"")
        assert b"a secret 0" not in held and b"a goal" not in held and b"a secret 2" in held
    store.close()


def test_what_a_reader_holds_is_not_said_to_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite keeps what somebody may still read."""
    url = str(tmp_path / "feedback.db")
    review_feedback(url, accept=fill(url))
    monkeypatch.setattr("lmworks.serve.feedback.open_engine", partial(hurried, open_engine))
    now = datetime.now(UTC).isoformat()

    def there() -> bool:
        return any(b"a goal" in path.read_bytes() for path in tmp_path.iterdir())

    with closing(sqlite3.connect(url, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM lmworks_answers").fetchone() == (6,)
        told = forget_feedback(url, now, decided=True)
        assert told.values["answers"] == 6 and told.values["waits_for_reader"] is True and there()
        assert "as somebody reads there" in told.notes[0]
        reader.execute("COMMIT")
        told = forget_feedback(url, now, decided=True)
        assert told.values["waits_for_reader"] is False and told.notes == () and not there()


def hurried(make: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """Wait a moment only."""
    return make(given[0], 0.2, **more)


def test_a_person_decides_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    url = str(tmp_path / "feedback.db")
    fill(url)

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("a\nwhat?\nr\n\ns\nq\n"))
    assert main(["feedback", "review", url]) == 0
    shown = capsys.readouterr()
    assert "1 accepted, 1 rejected" in shown.out
    assert "news said: Sports" in shown.err and "feedback: World" in shown.err and "mood" in shown.err
    assert [row[0] for row in Sqlite(Path(url)).ask("SELECT state FROM lmworks_feedback ORDER BY received")] == [
        "accepted", "rejected", "new", "new", "new", "new"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", Terminal("a\n"))  # and then it is closed
    assert main(["feedback", "review", url]) == 0
    assert Sqlite(Path(url)).ask("SELECT count(*) FROM lmworks_feedback WHERE state = 'accepted'") == [(2,)]


def test_both_databases_hold_the_same_after_a_copy(tmp_path: Path, postgres: Server, monkeypatch: Any) -> None:
    first, second, third = Sqlite(tmp_path / "a.db"), postgres.make(), Sqlite(tmp_path / "b.db")
    ids = fill(first.url)
    review_feedback(first.url, accept=ids[:1])
    tables = [f"SELECT * FROM lmworks_{name} ORDER BY id" for name in ("answers", "feedback")]
    monkeypatch.setattr("lmworks.verbs.feedback.PART", 4)

    put, calls = Store.put, []

    def stopped(*given: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(*given, **more)

    monkeypatch.setattr(Store, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        copy_feedback(first.url, second.url)
    assert second.ask("SELECT count(*) FROM lmworks_answers") == [(4,)], "whole parts"
    for source, target in ((first, second), (second, third), (first, second)):
        values = copy_feedback(source.url, target.url).values
        assert (values["answers"], values["feedback"], values["came_since"]) == (6, 6, 0)
        for table in tables:
            assert target.ask(table) == first.ask(table)
    review_feedback(second.url, reject=ids[1:2])
    review_feedback(first.url, accept=ids[2:3])
    copy_feedback(first.url, second.url)
    states = dict(second.ask("SELECT id, state FROM lmworks_feedback"))
    assert [states[id] for id in ids[:4]] == ["accepted", "rejected", "accepted", "new"], "no decision is lost"

    sent = ("UPDATE lmworks_feedback SET received = received + 5", "UPDATE lmworks_answers SET asked = asked - 5")
    with second.server.connect(second.name) as connection:
        for order in sent:  # the same was sent to both
            connection.execute(order)  # type: ignore[arg-type]
        assert copy_feedback(first.url, second.url).values["feedback"] == 6
        connection.execute("UPDATE lmworks_answers SET text = 'changed' WHERE model = 'mood'")
    with pytest.raises(FormatError, match="differs"):
        copy_feedback(first.url, second.url)
    with pytest.raises(InputError, match="to another one"):
        copy_feedback(first.url, str(first.path))


def test_what_is_not_there(tmp_path: Path, postgres: Server) -> None:
    for verb, more in (("list", []), ("review", ["--accept", "all"]), ("export", ["-o", str(tmp_path / "o.jsonl")])):
        assert main(["feedback", verb, str(tmp_path / "none.db"), *more]) == 2
        assert main(["feedback", verb, postgres.make().url, *more]) == 2
    assert list(tmp_path.iterdir()) == [], "who only looks makes nothing"


@pytest.mark.usefixtures("one_thread")
def test_accepted_feedback_is_trained_on(data_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make_languages(tmp_path, data_folder, 60)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()]
    lines = [row for pair in zip(lines[:60], lines[60:], strict=True) for row in pair]  # both languages in turn
    url = str(tmp_path / "feedback.db")
    store = Store(url, create=True)
    with store.begin() as connection:
        for row in lines[:24]:
            answer = make_answer("body", row["text"])
            store.put(connection, ANSWERS, [answer])
            set_state(connection, [store.give(connection, answer, row["label"]).id], "accepted")
    store.close()
    knobs: dict[str, Any] = {"task": "text-classification", "epochs": 2, "lr": 2e-3, "batch_size": 4, "dtype": "fp32",
                             "validation": tmp_path / "validation.jsonl"}  # fmt: skip

    def tune(out: str, train: Path | None, **more: Any) -> dict[str, Any]:
        return finetune(tmp_path / "body", train, tmp_path / out, **knobs, **more).values

    (tmp_path / "same.jsonl").write_text(take_feedback(url, "body"), "utf-8")
    rows = [json.loads(line) for line in (tmp_path / "same.jsonl").read_text("utf-8").splitlines()]
    assert rows == [{"text": row["text"], "label": row["label"]} for row in lines[:24]]
    tune("file", tmp_path / "same.jsonl")

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="everything is saved"):
        patch.setattr("lmworks.training.trainer.StopRequest", StopAfterTheFirstStep)
        tune("fed", None, from_feedback=url)
    review_feedback(url, reject=[id for (id,) in Sqlite(Path(url)).ask("SELECT id FROM lmworks_feedback LIMIT 9")])
    tune("fed", None, from_feedback=url, resume=True)  # with what it began with
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("file", "fed")]
    assert weights[0] == weights[1]
    receipt = read_json(tmp_path / "fed/lmworks.json")
    assert receipt["from_feedback"] == 24
    assert not (tmp_path / "fed.partial").exists()
    left = [path for path in (tmp_path / "fed").rglob("*") if path.is_file()]
    said = lines[0]["text"].encode()
    assert not any(said in path.read_bytes() for path in left), "a model that is given away holds no texts"

    (tmp_path / "both.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in lines[24:]) + take_feedback(url, "body"), "utf-8"
    )
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines[24:]), "utf-8")
    tune("one", tmp_path / "both.jsonl")
    tune("two", tmp_path / "rest.jsonl", from_feedback=url)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()

    with pytest.raises(InputError, match="nothing to train on"):
        tune("none", None)
    with pytest.raises(InputError, match="one classifier"):
        finetune(tmp_path / "body", None, tmp_path / "none", task="fill-mask", from_feedback=url)
    fill(url)
    review_feedback(url, accept=["all"])
    with pytest.raises(InputError, match="several models"):
        take_feedback(url, "other")
    with pytest.raises(InputError, match="does not occur in the training data"):
        (tmp_path / "body").rename(tmp_path / "mood")
        finetune(tmp_path / "mood", tmp_path / "rest.jsonl", tmp_path / "none", from_feedback=url, **knobs)
