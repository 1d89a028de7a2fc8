"""A challenger shadows a model and takes its place: under load, through kills and restarts, never a wrong folder."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from databases import Sqlite
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from serving import Running, server, slack, start

sys.path.insert(0, str(Path(__file__).parents[1]))
from monitored import TOPICS, make_news_classifier, news

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_json
from lmworks.export.onnx_folder import export_graphs
from lmworks.export.receipt import write_receipt
from lmworks.serve import challengers
from lmworks.serve.app import make_app
from lmworks.serve.guard import digest
from lmworks.serve.service import describe
from lmworks.verbs.monitoring import fit_monitor

KEY, ADMIN = "a-key-of-a-client-0", "the-key-of-the-admin"
CLIENTS, TURNS, TEXTS = 4, 20, 5
HTTP = httpx.Client(timeout=100)
AFTER = {name: TOPICS[(i + 1) % len(TOPICS)] for i, name in enumerate(TOPICS)}  # what the challenger says instead


@pytest.fixture(scope="module", autouse=True)
def connections() -> Iterator[None]:
    """Close them at the end."""
    yield
    HTTP.close()


@pytest.fixture(scope="module")
def made(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `news`, which has a monitor, and `pool`: `other`, which says the next topic, and unusable ones."""
    place = tmp_path_factory.mktemp("challenged")
    pool = place / "pool"
    torch = make_news_classifier(data_folder, place / "torch")
    shutil.copytree(torch, place / "rolled")
    weights = load_file(place / "rolled/model.safetensors")
    weights |= {f"classifier.{part}": weights[f"classifier.{part}"].roll(1, 0) for part in ("weight", "bias")}
    save_file(weights, place / "rolled/model.safetensors", {"format": "pt"})
    shutil.copytree(torch, place / "renamed")
    config = read_json(torch / "config.json")
    config["id2label"]["0"] = "Weather"
    write_json(
        place / "renamed/config.json", {**config, "label2id": {v: int(k) for k, v in config["id2label"].items()}}
    )
    pool.mkdir()
    for source, folder in (("torch", place / "news"), ("rolled", pool / "other"), ("renamed", pool / "labels")):
        export_graphs(place / source, folder, dtypes=("fp32",))
    shutil.copytree(pool / "other", pool / "limitless")
    shutil.copytree(place / "news", place / "unwatched")
    for folder in (place / "news", pool / "other"):
        fit_monitor(folder, place / "known.csv", validation=place / "held.csv")
    for name in ("damaged", "broken", "linked"):
        shutil.copytree(pool / "other", pool / name)
    graph = bytearray((pool / "damaged/onnx/model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (pool / "damaged/onnx/model.onnx").write_bytes(graph)
    (pool / "broken/onnx/model.onnx").write_bytes(b"no graph at all")
    (pool / "broken/monitor.json").unlink()
    shutil.copytree(pool / "broken", place / "pool_of_unwatched/broken")
    for folder in (pool / "broken", place / "pool_of_unwatched/broken"):
        write_receipt(folder, {})
    (pool / "linked/vocab.txt").unlink(missing_ok=True)
    (pool / "linked/vocab.txt").symlink_to("/etc/passwd")
    (pool / "link").symlink_to(place / "news")
    return place


@pytest.fixture(scope="module")
def texts(data_folder: Path) -> list[str]:
    """News that no model has learnt."""
    return [text for text, _ in news(data_folder)[2000:2400]]


def pool_of(made: Path, tmp_path: Path) -> Path:
    """Return a folder of its own with the one good challenger."""
    (tmp_path / "pool").mkdir()
    shutil.copytree(made / "pool/other", tmp_path / "pool/other")
    return tmp_path / "pool"


@pytest.fixture(scope="module")
def one(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that may be challenged."""
    store = tmp_path_factory.mktemp("kept") / "feedback.db"
    with server(made / "news", challengers=made / "pool", admin=[digest(ADMIN)], feedback=store) as running:
        running.store = store  # type: ignore[attr-defined]
        yield running


def admin(one: Running | str, what: str = "", key: str = ADMIN, **body: Any) -> httpx.Response:
    """Ask as the administrator."""
    base = one if isinstance(one, str) else one.base
    return HTTP.post(f"{base}/challenger{what}", json=body, headers={"Authorization": f"Bearer {key}"})


def state(one: Running | str) -> dict[str, Any]:
    """Return what is told of the model."""
    base = one if isinstance(one, str) else one.base
    answer = HTTP.get(f"{base}/challenger", headers={"Authorization": f"Bearer {ADMIN}"})
    return dict(answer.json()["models"]["news"])


def ask(one: Running | str, texts: list[str]) -> list[str]:
    """Return the labels of texts."""
    base = one if isinstance(one, str) else one.base
    said: list[str] = []
    for i in range(0, len(texts), 50):
        answer = HTTP.post(f"{base}/classify", json={"text": texts[i : i + 50]})
        assert answer.status_code == 200, answer.text
        said += [found["label"] for found in answer.json()["answers"]]
    return said


def metric(one: Running, name: str, **labels: str) -> float:
    """Return the sum of the samples of this name with these labels."""
    families = text_string_to_metric_families(HTTP.get(f"{one.base}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def post(one: Running, path: str, body: Any) -> httpx.Response:
    """Ask as a client."""
    return HTTP.post(f"{one.base}{path}", json=body)


def until(true: Any, seconds: float = 30) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds * slack()
    while not true():
        assert time.monotonic() < end, "never true"
        time.sleep(0.02)


class Clients:
    """Clients that ask without a pause, each on a connection of its own, and keep what they got."""

    def __init__(self, one: Running, texts: list[str], *, again: bool = False) -> None:
        self.base, self.texts, self.again, self.ending = one.base, texts, again, False
        self.said: list[tuple[float, float, int, list[str]]] = []  # asked, answered, status, labels
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        until(lambda: len(self.said) > CLIENTS)
        return self

    def __exit__(self, *_: Any) -> None:
        self.ending = True
        for thread in self.threads:
            thread.join(60)

    def run(self, number: int) -> None:
        with httpx.Client(base_url=self.base, timeout=60) as client:
            turn = number
            while not self.ending:
                part = [self.texts[(turn * TEXTS + i) % len(self.texts)] for i in range(TEXTS)]
                asked = time.monotonic()
                answer = client.post("/classify", json={"text": part})
                while self.again and answer.status_code == 503 and time.monotonic() < asked + 30:
                    time.sleep(0.1)
                    answer = client.post("/classify", json={"text": part})
                labels = [found["label"] for found in answer.json().get("answers", [])]
                self.said.append((asked, time.monotonic(), answer.status_code, self.kinds(part, labels)))
                turn += CLIENTS

    known: dict[str, str] = {}

    def kinds(self, part: list[str], labels: list[str]) -> list[str]:
        """Return whose answer each is."""
        return ["first" if label == self.known[text] else "other" if label == AFTER[self.known[text]] else "none"
                for text, label in zip(part, labels, strict=True)]  # fmt: skip

    def check(self) -> dict[str, int]:
        """See that nothing was lost or mixed; return how many answers each version gave."""
        assert {status for _, _, status, _ in self.said} == {200}
        assert all(len(kinds) == TEXTS and len(set(kinds)) == 1 for *_, kinds in self.said), "an answer of one version"
        found = [kinds[0] for *_, kinds in self.said]
        return {name: found.count(name) for name in ("first", "other", "none")}


def test_who_may_challenge(one: Running, made: Path) -> None:
    for key in ("the-key-of-the-admim", KEY, ADMIN + "0"):
        assert admin(one, key=key, folder="other").status_code == 401
        assert admin(one, "/switch", key=key).status_code == 401
    assert HTTP.get(f"{one.base}/challenger").status_code == 401
    assert state(one)["state"] == "none" and state(one)["current"] == "news"
    with server(made / "news", ready=False, settings={"warm": False}) as plain:
        assert admin(plain, folder="other").status_code in (404, 405), "without a key file there is no such route"
        assert HTTP.get(f"{plain.base}/challenger").status_code == 404
        assert "/challenger" not in HTTP.get(f"{plain.base}/openapi.json").json()["paths"]
    options: dict[str, Any] = {"ready": False, "settings": {"warm": False}, "keys": [digest(KEY)]}
    with server(made / "news", challengers=made / "pool", admin=[digest(ADMIN)], **options) as locked:
        assert admin(locked, key=KEY, folder="other").status_code == 401, "a client's key is no admin's"
        assert state(locked)["state"] == "none"
    halves: tuple[dict[str, Any], ...] = ({"challengers": made / "pool"}, {"admin": [digest(ADMIN)]})
    for half in halves:
        with pytest.raises(InputError, match="need each other"):
            make_app([describe(made / "news")], **half)
    with pytest.raises(InputError, match="no such folder"):
        make_app([describe(made / "news")], challengers=made / "gone", admin=[digest(ADMIN)])


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        *((name, "no such challenger") for name in ("../news", "..", ".", "/etc", "pool/../../news", "other/", "\n")),
        *((name, "no such challenger") for name in ("other/onnx", "a\0b", "link", "gone", "a" * 150)),
        ("damaged", "not those of its lmworks.json"), ("labels", "other labels"), ("limitless", "its limits"),
        ("linked", "holds no links"), ("broken", "limits"),
    ],
)  # fmt: skip
def test_what_cannot_take_over_is_refused(one: Running, texts: list[str], folder: str, why: str) -> None:
    answer = admin(one, folder=folder)
    assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text
    assert len(answer.text) < 500 and "root:" not in answer.text
    assert state(one)["state"] == "none" and ask(one, texts[:1])
    for what in ("/switch", "/back"):
        assert admin(one, what).status_code == 409


def test_bad_bodies_are_refused(one: Running) -> None:
    for body in ({}, {"folder": ""}, {"folder": "other", "share": 1.5}, {"folder": "other", "more": 1}, {"folder": 3}):
        assert admin(one, **body).status_code == 400, body
    assert admin(one, folder="other", model="gone").status_code == 404


def test_a_challenger_that_cannot_be_loaded_leaves_the_champion_alone(made: Path, texts: list[str]) -> None:
    with server(made / "unwatched", challengers=made / "pool_of_unwatched", admin=[digest(ADMIN)]) as plain:
        before = post(plain, "/classify", {"text": texts[:3]}).json()
        answer = admin(plain, folder="broken")
        assert answer.status_code == 400 and "cannot be loaded" in answer.json()["error"]["message"], answer.text
        assert post(plain, "/classify", {"text": texts[:3]}).json() == before
        assert plain.supervisor.restarts == 0 and plain.service.challengers.engines == []


def test_a_shadow_is_compared_then_switched_to_and_back(one: Running, texts: list[str]) -> None:
    first = ask(one, texts[:40])
    assert len(set(first)) == len(TOPICS)
    answer = admin(one, folder="other", share=1)
    assert answer.status_code == 200 and answer.json()["state"] == "shadow", answer.text
    for i in range(20):
        assert ask(one, [texts[i]]) == first[i : i + 1], "the champion answers"
        until(lambda n=i: state(one)["shadow"]["texts"] == n + 1)
    told = state(one)["shadow"]
    assert (told["agreement"], told["agrees"], told["differs"], told["failed"]) == (0.0, 0, 20, 0)
    assert metric(one, "lmworks_shadow_total", model="news", result="differs") == 20
    assert metric(one, "lmworks_shadow_seconds_count", version="challenger") == 20
    assert 0 < told["seconds"]["current"]["p50"] <= told["seconds"]["current"]["p95"] < 5
    assert set(told["out_of_domain"]) == {"current", "challenger"} and None not in told["out_of_domain"].values()
    assert HTTP.get(f"{one.base}/drift").json()["models"]["news"]["requests"] >= 60
    asked = metric(one, "lmworks_batch_rows_total", model="news")
    before = post(one, "/classify", {"text": texts[0]}).json()["answers"][0]

    assert admin(one, "/back").status_code == 409, "nothing was switched yet"
    answer = admin(one, "/switch")
    assert (answer.status_code, answer.json()["state"], answer.json()["current"]) == (200, "switched", "other")
    assert ask(one, texts[:40]) == [AFTER[label] for label in first]
    assert [row["id"] for row in HTTP.get(f"{one.base}/v1/models").json()["data"]] == ["news"]
    after = post(one, "/classify", {"text": texts[0]}).json()
    assert after["model"] == "news" and set(after["answers"][0]) == set(before)
    assert HTTP.get(f"{one.base}/drift").json()["models"]["news"]["requests"] == 41, "a new reference begins anew"
    until(lambda: metric(one, "lmworks_batch_rows_total", model="news") >= asked + 41)  # it never falls
    # feedback belongs to the answer that was given, whoever answers by now
    given = {"old": before, "new": after["answers"][0]}
    agrees = {name: post(one, "/feedback", {"id": row["id"], "label": first[0]}).json() for name, row in given.items()}
    assert {name: row["agrees"] for name, row in agrees.items()} == {"old": True, "new": False}
    rows = dict(Sqlite(one.store).ask("SELECT id, label FROM lmworks_answers"))  # type: ignore[attr-defined]
    assert rows[before["id"]] == first[0] and rows[after["answers"][0]["id"]] == AFTER[first[0]]
    assert {row["model"] for row in agrees.values()} == {"news"}
    assert post(one, "/feedback", {"text": "x", "label": "Weather"}).status_code == 400

    assert admin(one, "/switch").status_code == 409 and admin(one, folder="other").status_code == 409
    assert admin(one, "/back").json()["state"] == "standby" and ask(one, texts[:40]) == first
    assert admin(one, "/stop").json()["state"] == "none" and ask(one, texts[:40]) == first
    assert HTTP.get(f"{one.base}/health/ready").status_code == 200


def test_a_shadow_that_hangs_delays_nobody(one: Running, texts: list[str]) -> None:
    assert admin(one, folder="other", share=1).status_code == 200
    shadow = one.service.challengers.engines[-1].process.pid
    os.kill(shadow, signal.SIGSTOP)
    try:
        ask(one, texts[:1])
        began = time.monotonic()
        for i in range(30):
            ask(one, [texts[i]])
        assert time.monotonic() - began < 3 * slack()
        told = state(one)["shadow"]
        assert told["dropped"] > 20 and told["texts"] == 0, told
    finally:
        os.kill(shadow, signal.SIGKILL)
    until(lambda: ask(one, texts[:1]) and state(one)["shadow"]["texts"] > 0)  # its engine is replaced, beside ours
    assert one.supervisor.restarts == 0
    assert admin(one, "/stop").status_code == 200


def test_no_request_is_lost_in_twenty_switches(one: Running, texts: list[str]) -> None:
    Clients.known = dict(zip(texts, ask(one, texts), strict=True))
    assert admin(one, folder="other", share=0.5).status_code == 200
    spans: list[tuple[float, float, str]] = []  # from the answer of a switch until the next is asked for
    with Clients(one, texts) as clients:
        for turn in range(TURNS):
            what = "/switch" if turn % 2 == 0 else "/back"
            assert admin(one, what).status_code == 200
            since = time.monotonic()
            mine = Clients.kinds(clients, texts[:3], ask(one, texts[:3]))
            assert set(mine) == {"other" if turn % 2 == 0 else "first"}, "the very next request"
            time.sleep(0.15)
            spans.append((since, time.monotonic(), "other" if turn % 2 == 0 else "first"))
    shares = clients.check()
    assert shares["first"] > TURNS and shares["other"] > TURNS and shares["none"] == 0, shares
    within = 0
    for asked, answered, _, kinds in clients.said:
        for since, end, who in spans:
            if since <= asked and answered <= end:
                within += 1
                assert kinds[0] == who
    assert within > TURNS
    assert admin(one, "/stop").status_code == 200


def test_an_engine_that_is_killed_during_a_switch(one: Running, texts: list[str]) -> None:
    Clients.known = dict(zip(texts, ask(one, texts), strict=True))
    assert admin(one, folder="other", share=0).status_code == 200
    engines = one.service.challengers.engines
    before = engines[-1]
    answers: list[httpx.Response] = []
    with Clients(one, texts) as clients:  # the one that is to take over dies while it is loaded
        switching = threading.Thread(target=lambda: answers.append(admin(one, "/switch")))
        switching.start()
        until(lambda: engines[-1] is not before and hasattr(engines[-1], "process") and engines[-1].process.pid)
        os.kill(engines[-1].process.pid, signal.SIGKILL)
        switching.join(60)
    assert answers[0].status_code == 400 and "cannot be loaded" in answers[0].text
    assert clients.check() == {"first": len(clients.said), "other": 0, "none": 0}
    assert state(one)["state"] == "shadow"
    with Clients(one, texts, again=True) as clients:  # the champion dies while another takes over
        switching = threading.Thread(target=lambda: answers.append(admin(one, "/switch")))
        switching.start()
        os.kill(one.supervisor.process.pid, signal.SIGKILL)
        switching.join(60)
        assert answers[1].status_code == 200, answers[1].text
        until(lambda: clients.said and clients.said[-1][3][:1] == ["other"])
        os.kill(engines[-1].process.pid, signal.SIGKILL)  # the new one, as soon as it answers: it comes back as itself
        one.wait(ready=False)
        one.wait()
        until(lambda: clients.said[-1][0] > time.monotonic() - 5)
    shares = clients.check()
    assert shares["other"] > 0 and shares["none"] == 0
    assert ask(one, texts[:5]) == [AFTER[Clients.known[text]] for text in texts[:5]]
    until(lambda: one.supervisor.ready)  # the former's engine was replaced as well
    assert admin(one, "/back").status_code == 200 and admin(one, "/stop").status_code == 200


def test_a_full_disk_changes_nothing(one: Running, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(one, texts[:5])
    assert admin(one, folder="other", share=0).status_code == 200

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(challengers, "write_json", full)
        for what in ("/switch", "/stop"):
            assert admin(one, what).status_code == 507
    assert state(one)["state"] == "shadow" and ask(one, texts[:5]) == first
    assert admin(one, "/stop").status_code == 200


def test_the_way_back_needs_no_disk(
    one: Running, made: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(one, texts[:5])
    assert admin(one, folder="other", share=0).status_code == 200 and admin(one, "/switch").status_code == 200
    monkeypatch.setattr(challengers, "AGAIN", 0.2)

    def kept() -> Any:
        return read_json(made / "pool/challengers.json")["models"]["news"]["current"]

    (made / "pool").rename(made / "pool.away")
    try:
        assert state(one)["folders"] == [] and admin(one, folder="limitless").status_code == 400
        assert admin(one, "/back").status_code == 200 and ask(one, texts[:5]) == first
        assert "challengers.json cannot be written" in state(one)["problem"]
    finally:
        (made / "pool.away").rename(made / "pool")
    assert kept() == "other"
    until(lambda: not state(one)["problem"])
    assert kept() == "" and admin(one, "/stop").status_code == 200


def test_only_what_was_checked_answers(made: Path, texts: list[str], tmp_path: Path) -> None:
    pool = pool_of(made, tmp_path)

    def put(source: Path) -> None:
        shutil.rmtree(pool / "other")
        shutil.copytree(source, pool / "other")

    with server(made / "news", challengers=pool, admin=[digest(ADMIN)]) as one:
        first = ask(one, texts[:5])
        assert admin(one, folder="other", share=0).status_code == 200
        put(made / "news")  # whole and usable, and not what was shadowed
        for doing in ("shadow", "failed"):
            assert state(one)["state"] == doing
            answer = admin(one, "/switch")
            assert answer.status_code == 400 and "not those that were checked" in answer.text, answer.text
            if doing == "shadow":
                os.kill(one.service.challengers.engines[-1].process.pid, signal.SIGKILL)
                until(lambda: state(one)["state"] == "failed")
        put(made / "pool/other")
        assert admin(one, "/switch").status_code == 200
        write_receipt(pool / "other", {"certificate": "of verify"})  # that is no other model
        os.kill(one.service.challengers.engines[-1].process.pid, signal.SIGKILL)
        one.wait(ready=False)
        one.wait()
        assert ask(one, texts[:5]) == [AFTER[label] for label in first]
        put(made / "pool/labels")
        os.kill(one.service.challengers.engines[-1].process.pid, signal.SIGKILL)
        until(lambda: state(one)["current"] == "news")
        assert "other cannot be served, news answers: the challenger's files are not" in state(one)["problem"]
        assert ask(one, texts[:5]) == first


def test_nobody_waits_for_a_shadow_after_a_restart(
    made: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(made, tmp_path)
    kept = {"current": "", "other": "gone", "switched": False, "share": 0.5}
    write_json(pool / "challengers.json", {"format": 1, "models": {"news": kept}})
    with server(made / "news", challengers=pool, admin=[digest(ADMIN)]) as one:
        until(lambda: state(one)["state"] == "failed")
        assert "gone" in state(one)["problem"]
    write_json(pool / "challengers.json", {"format": 1, "models": {"news": {**kept, "other": "other"}}})
    loading, load = threading.Event(), challengers.Challengers.load

    async def slow(*given: Any, **more: Any) -> Any:
        version = await load(*given, **more)
        while not loading.is_set():
            await asyncio.sleep(0.02)
        return version

    monkeypatch.setattr(challengers.Challengers, "load", slow)
    with server(made / "news", challengers=pool, admin=[digest(ADMIN)]) as one:
        engines = one.service.challengers.engines
        until(lambda: engines and state(one)["state"] == "loading")
        assert admin(one, "/stop").status_code == 200 and state(one)["state"] == "none"
        loading.set()
        until(lambda: not engines)  # it comes too late
        assert state(one)["state"] == "none" and ask(one, texts[:1])


def test_a_restart_keeps_the_switch(made: Path, texts: list[str], tmp_path: Path) -> None:
    pool = pool_of(made, tmp_path)
    (tmp_path / "admin.txt").write_text(ADMIN)
    words = (str(made / "news"), "--challengers", str(pool), "--admin-key-file", str(tmp_path / "admin.txt"))
    process, base = start(*words)
    try:
        first = ask(base, texts[:8])
        assert admin(base, folder="other").status_code == 200 and admin(base, "/switch").status_code == 200
    finally:
        process.kill()  # not even told to end
        process.wait(20)
        assert process.stderr is not None
        process.stderr.close()
    kept = json.loads((pool / "challengers.json").read_text())["models"]["news"]
    assert kept == {"current": "other", "other": "", "switched": True, "share": 0.1}
    with server(made / "news", challengers=pool, admin=[digest(ADMIN)]) as again:
        assert ask(again, texts[:8]) == [AFTER[label] for label in first]
        assert state(again)["state"] == "switched"
        until(lambda: admin(again, "/back").status_code == 200)  # once the former is loaded, too
        assert ask(again, texts[:8]) == first
        assert admin(again, "/switch").status_code == 200
    shutil.rmtree(pool / "other")
    with server(made / "news", challengers=pool, admin=[digest(ADMIN)]) as without:
        assert ask(without, texts[:8]) == first, "somebody must answer"
        assert "other cannot be served, news answers: there is no such challenger" in state(without)["problem"]
    (pool / "challengers.json").write_text('{"models": {"news": {"current": "../news"}}}')
    with pytest.raises(FormatError, match="not what a server wrote"):
        make_app([describe(made / "news")], challengers=pool, admin=[digest(ADMIN)])
