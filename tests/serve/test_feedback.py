"""Feedback that was acknowledged is there: in SQLite and in PostgreSQL, for crowds, after kills, on full disks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from databases import Server, Sqlite, small_disk
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, server, start

from lmworks.base.errors import FormatError, InputError
from lmworks.serve import feedback_writer
from lmworks.serve.app import make_app
from lmworks.serve.feedback import Store, make_answer
from lmworks.serve.feedback_database import read_url
from lmworks.serve.feedback_writer import Recorder
from lmworks.serve.refusals import Refused
from lmworks.serve.service import describe

WRITERS = 200
JSON = {"Content-Type": "application/json"}
KINDS = ("sqlite", "postgresql")


def make_database(kind: str, folder: Path, postgres: Server) -> Any:
    """Return an empty database."""
    return Sqlite(folder / "feedback.db") if kind == "sqlite" else postgres.make()


@pytest.fixture(scope="module", params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres: Server) -> Any:
    """A database of either kind."""
    return make_database(request.param, tmp_path_factory.mktemp("feedback"), postgres)


@pytest.fixture(scope="module")
def recording(classifier: Path, database: Any) -> Iterator[Running]:
    """A server that keeps feedback there."""
    with server(classifier, feedback=database.url) as one:
        yield one


def metrics(one: Running, name: str, **labels: str) -> float:
    """Return the sum of the samples of this name with these labels."""
    families = text_string_to_metric_families(httpx.get(f"{one.base}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    assert samples, name
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def kept(database: Any) -> set[str]:
    """Return the ids of all feedback that is kept."""
    return {id for (id,) in database.ask("SELECT id FROM lmworks_feedback")}


def test_answers_have_ids_and_feedback_is_kept(recording: Running, database: Any, reviews: list[str]) -> None:
    answers = recording.post("/classify", {"text": reviews[:3]}).json()["answers"]
    said = recording.post("/predict", {"input_text": reviews[3]}).json()
    answers += [said, httpx.get(f"{recording.base}/predict/good").json()]
    ids = [one["id"] for one in answers]
    assert len(set(ids)) == 5 and all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)
    hub = recording.post("/models/sentiment", {"inputs": reviews[0]}).json()
    assert set(hub[0][0]) == {"label", "score"}, "other interfaces keep their shapes, and nothing"
    rows = database.ask("SELECT id, model, text, label, score FROM lmworks_answers ORDER BY asked")
    assert [row[2] for row in rows] == [*reviews[:4], "good"]
    for row, answer in zip(sorted(rows), sorted(answers, key=lambda one: one["id"]), strict=True):
        assert row[:2] == (answer["id"], "sentiment") and row[3:] == (answer["label"], answer["score"])

    right = {"negative": "positive", "positive": "negative"}
    agree = recording.post("/feedback", {"id": ids[0], "label": answers[0]["label"]})
    wrong = recording.post("/feedback", {"id": ids[1], "label": right[answers[1]["label"]]})
    again = recording.post("/feedback", {"id": ids[1], "label": right[answers[1]["label"]]})
    alone = recording.post("/feedback", {"text": "splendid", "label": "positive", "model": "sentiment"})
    assert [one.status_code for one in (agree, wrong, again, alone)] == [201] * 4
    assert [one.json()["agrees"] for one in (agree, wrong, again, alone)] == [True, False, False, None]
    assert wrong.json() == again.json() and wrong.json()["answer"] == ids[1]
    found = database.ask("SELECT id, answer, label, state FROM lmworks_feedback ORDER BY received")
    told = [one.json() for one in (agree, wrong, alone)]
    assert found == [(one["id"], one["answer"], one["label"], "new") for one in told]
    counted = {word: metrics(recording, "lmworks_feedback_total", agrees=word) for word in ("yes", "no", "unknown")}
    assert counted == {"yes": 1, "no": 1, "unknown": 1}, "what is sent twice counts once"
    odd = recording.post("/feedback", {"text": "\0", "label": "positive"})  # what PostgreSQL cannot hold
    half = httpx.post(f"{recording.base}/feedback", content=rb'{"text": "a\ud83d", "label": "negative"}', headers=JSON)
    assert (odd.status_code, half.status_code) == (201, 400)
    assert database.ask("SELECT text FROM lmworks_answers ORDER BY asked")[-1] == ("\ufffd",)


@pytest.mark.parametrize(("body", "status", "said"), [
    ({"id": "0" * 32, "label": "positive"}, 404, "no answer with this id"),
    ({"id": "\0' OR 1=1", "label": "positive"}, 404, "no answer with this id"),
    ({"text": "a", "label": "positve"}, 400, 'did you mean "positive"?'),
    ({"text": "a", "label": "blue"}, 400, "negative, positive"),
    ({"text": "a", "label": "positive", "model": "sentimant"}, 404, "sentimant"),
    ({"text": "a", "id": "b", "label": "positive"}, 400, "give the id of an answer, or a text"),
    ({"label": "positive"}, 400, "give the id of an answer, or a text"),
    ({"id": "a", "label": "positive", "model": "sentiment"}, 400, "says which model"),
    ({"text": "a"}, 400, "label"),
    ({"text": "a", "label": 1}, 400, "label"),
    ({"text": "a", "label": "positive", "state": "accepted"}, 400, "state"),
    ({"text": "a" * 200_001, "label": "positive"}, 400, "text"),
])  # fmt: skip
def test_what_is_no_feedback(recording: Running, database: Any, body: Any, status: int, said: str) -> None:
    before = database.ask("SELECT count(*) FROM lmworks_answers")
    answer = recording.post("/feedback", body)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert database.ask("SELECT count(*) FROM lmworks_answers") == before


def test_a_text_that_is_sent_again_is_kept_once(recording: Running, database: Any) -> None:
    """As by a client that has not heard of the answer."""
    body = {"text": "sent\0again", "label": "positive"}
    before = kept(database)
    told = [recording.post("/feedback", body).json() for _ in range(3)]
    other = recording.post("/feedback", {**body, "label": "negative"}).json()
    pair = recording.post("/feedback", {**body, "pair": "of two"}).json()
    assert told[0] == told[1] == told[2] and other["answer"] == told[0]["answer"] != pair["answer"]
    assert kept(database) - before == {told[0]["id"], other["id"], pair["id"]}
    [(rows,)] = database.ask("SELECT count(*) FROM lmworks_answers WHERE text = 'sent\ufffdagain'")
    assert rows == 2 and len(told[0]["answer"]) == 32


def test_a_crowd_of_writers_loses_nothing(recording: Running, database: Any) -> None:
    before = kept(database)

    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=WRITERS)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            bodies = [{"text": f"text {i}", "label": "positive"} for i in range(WRITERS)]
            return await asyncio.gather(*(client.post(f"{recording.base}/feedback", json=body) for body in bodies))

    answers = asyncio.run(crowd())
    assert {one.status_code for one in answers} == {201}, [one.text for one in answers if one.status_code != 201][:3]
    assert kept(database) - before == {one.json()["id"] for one in answers}
    texts = {text for (text,) in database.ask("SELECT text FROM lmworks_answers")}
    assert {f"text {i}" for i in range(WRITERS)} <= texts


def test_a_database_that_keeps_us_waiting_keeps_nobody_else_waiting(recording: Running, database: Any) -> None:
    answers: list[httpx.Response] = []
    body = {"text": "slowly", "label": "positive"}
    waiting = threading.Thread(target=lambda: answers.append(recording.post("/feedback", body)))
    with database.locked():
        waiting.start()
        time.sleep(0.3)
        for _ in range(5):
            assert httpx.get(f"{recording.base}/health/live", timeout=3).status_code == 200
        assert not answers
    waiting.join(60)
    assert answers[0].status_code == 201


def test_a_database_that_goes_away_comes_back(recording: Running, database: Any) -> None:
    before = kept(database)
    database.stop()
    try:
        for number in range(3):
            gone = recording.post("/feedback", {"text": f"lost {number}", "label": "positive"})
            assert gone.status_code == 503 and gone.headers["retry-after"] == "1"
            assert gone.json()["error"]["code"] == "feedback_unavailable"
        [answer] = recording.post("/classify", {"text": "good"}).json()["answers"]
        assert answer["label"] and answer["id"] is None, "people are answered all the same"
        assert metrics(recording, "lmworks_answers_unkept_total", model="sentiment") == 1
        assert httpx.get(f"{recording.base}/health/ready").status_code == 200
    finally:
        database.start()
    assert kept(database) == before, "nothing was lost"
    until = time.monotonic() + 60
    while (back := recording.post("/feedback", {"text": "back", "label": "positive"})).status_code == 503:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert back.status_code == 201 and kept(database) == before | {back.json()["id"]}
    [answer] = recording.post("/classify", {"text": "good"}).json()["answers"]
    assert recording.post("/feedback", {"id": answer["id"], "label": "positive"}).status_code == 201


@contextlib.asynccontextmanager
async def recorder_of(classifier: Path, place: str | Path) -> AsyncIterator[Recorder]:
    """Yield what a server keeps feedback with."""
    recorder = Recorder(place, [describe(classifier)], CollectorRegistry())
    recorder.writer.start()
    try:
        yield recorder
    finally:
        await asyncio.to_thread(recorder.writer.close)


async def keep(recorder: Recorder) -> str | None:
    """Return the id that an answer gets."""
    answers: list[dict[str, Any]] = [{"label": "positive", "score": 0.5}]
    await recorder.record("sentiment", ["good"], answers)
    return answers[0]["id"]  # type: ignore[no-any-return]


def test_a_file_that_may_not_be_looked_at_is_away(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_writer, "AGAIN", 0.1)
    look, place = Path.stat, tmp_path / "a.db"

    def denied(path: Path, **more: Any) -> Any:
        if path == place:
            raise PermissionError(errno.EACCES, "Permission denied")
        return look(path, **more)

    async def live() -> None:
        async with recorder_of(classifier, place) as recorder:
            assert await keep(recorder)
            with monkeypatch.context() as patch:
                patch.setattr(Path, "stat", denied)
                assert await keep(recorder) is None
                await asyncio.sleep(0.3)  # whoever looks whether it is back goes on
                assert await keep(recorder) is None
            async with asyncio.timeout(20):
                while not await keep(recorder):
                    await asyncio.sleep(0.05)

    asyncio.run(live())


def test_a_server_starts_without_its_database(classifier: Path, postgres: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(feedback_writer, "AGAIN", 0.1)
    database = postgres.make()
    database.stop()

    async def live() -> None:
        async with recorder_of(classifier, database.url) as recorder:
            assert await keep(recorder) is None
            with pytest.raises(Refused, match="away"):
                await recorder.accept("positive", answer=make_answer("sentiment", "good"))
            await asyncio.sleep(0.3)
            database.start()
            async with asyncio.timeout(20):
                while not await keep(recorder):
                    await asyncio.sleep(0.05)
            assert (await recorder.accept("positive", answer=make_answer("sentiment", "good")))["label"] == "positive"

    try:
        asyncio.run(live())
    finally:
        if postgres.process is None or postgres.process.poll() is not None:
            database.start()
    assert len(kept(database)) == 1
    for wrong in (
        database.url + "_of_nobody",
        database.url.replace("lmworks@", "stranger@"),
    ):  # it answers, and refuses
        with pytest.raises(InputError, match="cannot be opened"):
            Recorder(wrong, [describe(classifier)], CollectorRegistry())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_loses_nothing_that_was_acknowledged(
    kind: str, classifier: Path, postgres: Server, tmp_path: Path
) -> None:
    database = make_database(kind, tmp_path, postgres)
    process, base = start(str(classifier), "--feedback", database.url)
    acknowledged: list[str] = []

    def write(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            for i in range(10_000):
                try:
                    sent = client.post(f"{base}/feedback", json={"text": f"{number} {i}", "label": "negative"})
                except httpx.TransportError:
                    return
                assert sent.status_code == 201
                acknowledged.append(sent.json()["id"])

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    try:
        for writer in writers:
            writer.start()
        until = time.monotonic() + 60
        while len(acknowledged) < 100 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    for writer in writers:
        writer.join(60)
    assert len(acknowledged) >= 100
    assert set(acknowledged) <= kept(database)
    orphans = (
        "SELECT count(*) FROM lmworks_feedback f LEFT JOIN lmworks_answers a ON a.id = f.answer WHERE a.id IS NULL"
    )
    assert database.ask(orphans) == [(0,)]
    if kind == "sqlite":
        assert database.ask("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_and_nothing_is_half_written(
    kind: str, classifier: Path, postgres: Server, tmp_path: Path
) -> None:
    size = "1m" if kind == "sqlite" else "11m"  # an empty database of PostgreSQL has 7
    with small_disk((tmp_path if kind == "sqlite" else postgres.folder) / "disk", size) as disk:
        if kind == "sqlite":
            database: Any = Sqlite(disk / "feedback.db")
        else:
            postgres.give(disk)
            with postgres.connect("postgres") as connection:
                connection.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")  # type: ignore[arg-type]
            database = postgres.make("TABLESPACE small")
        try:
            with server(classifier, feedback=database.url) as one, database.connected():
                statuses, ids = [], set()
                for i in range(400):
                    text = "".join(chr(33 + (i * j * j + j) % 7919) for j in range(30_000))  # hard to compress
                    answer = one.post("/feedback", {"text": text, "label": "positive"})
                    statuses.append(answer.status_code)
                    if answer.status_code != 201:
                        break
                    ids.add(answer.json()["id"])
                assert statuses[-1] == 507 and len(ids) > 1, statuses
                assert "disk of the feedback store is full" in answer.json()["error"]["message"]
                assert kept(database) == ids and database.ask("SELECT count(*) FROM lmworks_answers") == [(len(ids),)]
                many = [text[:10_000] + str(i) for i in range(20)]
                answers = one.post("/classify", {"text": many, "long": "truncate"}).json()["answers"]
                assert len(answers) == 20 and {one["id"] for one in answers} == {None}
                assert database.ask("SELECT count(*) FROM lmworks_answers") == [(len(ids),)], "all of a request or none"
                make_room(disk)
                assert one.post("/feedback", {"text": "room", "label": "positive"}).status_code == 201
            if kind == "sqlite":
                assert database.ask("PRAGMA integrity_check") == [("ok",)]
        finally:
            if kind == "postgresql":
                with postgres.connect("postgres") as connection:
                    connection.execute(f"DROP DATABASE {database.name} WITH (FORCE)")
                    connection.execute("DROP TABLESPACE small")


def make_room(disk: Path) -> None:
    """Make the disk larger."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def test_without_a_database_no_text_is_kept(classifier: Path, tagger: Path, tmp_path: Path) -> None:
    with server(classifier) as one:
        assert "id" not in one.post("/classify", {"text": "good"}).json()["answers"][0]
        off = one.post("/feedback", {"text": "good", "label": "positive"})
        assert off.status_code == 404 and "--feedback" in off.json()["error"]["message"]
    with pytest.raises(InputError, match="needs a classifier"):
        make_app([describe(tagger)], feedback=tmp_path / "a.db")


@pytest.mark.parametrize(("url", "said"), [
    ("mysql://a:secret@b/c", "no such database|such a database"), ("sqlite://", "in a file"), ("://", "no URL"),
    ("sqlite:///{}/missing/a.db", "cannot be opened"), ("{}/text", "cannot be opened"),
    ("postgresql://lmworks:secret@127.0.0.1:9/none", "cannot be opened"),
    ("postgresql://lmworks@127.0.0.1:9/none?password=secret&sslpassword=secret", "cannot be opened"),
    ("postgresql://lmworks:secret@127.0.0.1:9x/none", "no URL"), ("postgresql://a/b?port=secret", "no URL"),
    ("postgresql://127.0.0.1:9/b?unknown=1", "cannot be opened"), ("sqlite://a/b", "no file"),
    ("sqlite:///{}/a.db?timeout=abc", "no options"), ("sqlite:///{}/a.db?mode=ro", "no options"),
    ("sqlite:///{}/a%00b.db", "no file"),
])  # fmt: skip
def test_what_is_no_database(url: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but a text of some length\n" * 100)
    with pytest.raises(InputError, match=said) as raised:
        Store(url.format(tmp_path), create=True, seconds=2)
    assert "secret" not in str(raised.value)


def test_another_version_of_the_tables_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "a.db", create=True).close()
    assert (tmp_path / "a.db").stat().st_mode & 0o777 == 0o600, "it will hold people's texts"
    database = Sqlite(tmp_path / "a.db")
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        connection.execute("UPDATE lmworks_schema SET version = 2")
        connection.commit()
    with pytest.raises(FormatError, match="another version"):
        Store(tmp_path / "a.db")
    assert read_url("postgres://a@b/c").drivername == "postgresql+psycopg"
