"""A served model that knows its limits: what each answer says, what a strange input gets, and drift, seen and told."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import trustme
from monitored import german, make_news_classifier, news
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, server

from lmworks.base.errors import InputError
from lmworks.base.files import read_json, write_json
from lmworks.cli import main
from lmworks.evaluation.monitor import Monitor, Seen, attach, read_monitor
from lmworks.export.onnx_folder import export_graphs
from lmworks.runtime.predictor import load
from lmworks.serve.app import make_app
from lmworks.serve.monitor import Watch, Watching, append
from lmworks.serve.monitor_alerts import Target, read_target, send
from lmworks.serve.service import describe
from lmworks.verbs.monitoring import fit_monitor
from lmworks.verbs.monitoring_check import NUMBERS, check_monitor

WINDOW = 80
NAME = re.compile(r"\blmworks_\w+")


@dataclass
class Receiver:
    """Whoever alerts are sent to."""

    url: str
    handler: type[BaseHTTPRequestHandler]
    bodies: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A listener on loopback that keeps what comes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(302 if self.path == "/elsewhere" else 200)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{listening.server_port}", Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield found
    listening.shutdown()
    listening.server_close()


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`news` with a monitor, and `plain`, the same without."""
    found = tmp_path_factory.mktemp("watched")
    make_news_classifier(data_folder, found / "made")
    export_graphs(found / "made", found / "plain", dtypes=("fp32",))
    fit_monitor(found / "plain", found / "known.csv", found / "news", validation=found / "held.csv", false_alarms=0.1)
    return found


@pytest.fixture(scope="module")
def watched(place: Path, receiver: Receiver) -> Iterator[Running]:
    """A server whose strange inputs go to the other model."""
    how = Watching("fallback=plain", read_target(f"{receiver.url}/alerts"), place / "drift.jsonl", WINDOW)
    with server(place / "news", place / "plain", watching=how) as one:
        yield one


def metrics(one: Running, name: str, **labels: str) -> float:
    """Return the sum of the samples of this name with these labels."""
    families = text_string_to_metric_families(httpx.get(f"{one.base}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def windows(one: Running, count: int) -> list[dict[str, Any]]:
    """Wait for so many comparisons; return them."""
    for _ in range(600):
        found = httpx.get(f"{one.base}/drift").json()["models"]["news"]["comparisons"]
        if len(found) >= count:
            return list(found)
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} comparisons")


def test_each_answer_says_how_sure_it_is(watched: Running, place: Path, data_folder: Path) -> None:
    texts = [text for text, _ in news(data_folder)[1300:1312]] + german(data_folder)[:8]
    predictor = load(place / "news", runtime="onnx")
    attach(predictor, read_monitor(place / "news"))
    known = predictor(texts, check=True)
    assert {one.ood for one in known} == {True, False}
    answers = watched.post("/classify", {"text": texts, "model": "news"}).json()["answers"]
    for one, answer in zip(known, answers, strict=True):
        assert answer["confidence"] == (None if one.ood else pytest.approx(one.confidence, abs=1e-5)), "of whose label?"
        assert answer["ood_score"] == pytest.approx(one.ood_score, abs=1e-5)
        assert (answer["ood"], answer.get("answered_by")) == (one.ood, "plain" if one.ood else None)
        assert answer["label"] == one.labels[0].label, "the other model is the same one"
    said = watched.post("/predict", {"input_text": texts[0]}).json()
    assert (said["prediction"], said["ood"]) == (answers[0]["label"], answers[0]["ood"])
    assert "ood" not in watched.post("/classify", {"text": texts, "model": "plain"}).json()["answers"][0]
    hub = watched.post("/models/news", {"inputs": texts[0]}).json()
    assert set(hub[0][0]) == {"label", "score"}, "other interfaces keep their shapes"


def test_drift_is_seen_counted_logged_and_told(
    watched: Running, place: Path, receiver: Receiver, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = httpx.get(f"{watched.base}/drift").json()["models"]["news"]["requests"]
    rows = news(data_folder)[1400 : 1400 + 2 * WINDOW]
    for i in range(0, len(rows), 40):
        watched.post("/classify", {"text": [text for text, _ in rows[i : i + 40]]})
    quiet = windows(watched, (before + len(rows) - WINDOW) // (WINDOW // 4))
    assert not any(one["drift"] for one in quiet[4:]) and receiver.bodies == []
    assert main(["monitor", "check", watched.base]) == 0
    labelled = place / "held.csv"
    assert main(["monitor", "check", watched.base, "--data", str(labelled), "--json"]) == 0
    german_texts = german(data_folder)[:40] * 2
    for i in range(0, len(german_texts), 40):
        watched.post("/classify", {"text": german_texts[i : i + 40]})
    total = before + len(rows) + 400 + len(german_texts)
    last = windows(watched, (total - WINDOW) // (WINDOW // 4))[-1]
    assert "features" in last["drift"] and last["out_of_domain"] > 0.3
    state = httpx.get(f"{watched.base}/drift").json()["models"]["news"]
    assert state["drift"] and state["requests"] == total
    for _ in range(100):
        if receiver.bodies:
            break
        time.sleep(0.05)
    assert [(one["alert"], one["model"]) for one in receiver.bodies] == [("drift", "news")], "told once, when it begins"
    assert metrics(watched, "lmworks_drift", model="news") == 1
    assert metrics(watched, "lmworks_drift_p", test="features") < 1e-5
    assert metrics(watched, "lmworks_answers_total", model="news") == total
    assert metrics(watched, "lmworks_out_of_domain_total", model="news") > 30
    html = place / "check.html"
    capsys.readouterr()
    assert main(["monitor", "check", watched.base, "--html", str(html)]) == 1
    assert "DRIFT" in capsys.readouterr().out and "<svg" in html.read_text()
    assert main(["monitor", "check", str(place / "drift.jsonl"), "--json"]) == 1
    assert total - WINDOW // 2 < json.loads(capsys.readouterr().out)["models"]["news"]["requests"] <= total
    kept = (place / "drift.jsonl").read_text() + json.dumps(state) + json.dumps(receiver.bodies)
    assert not any(word in kept for word in ("Menschen", rows[0][0][:20])), "no text is recorded"


def test_the_dashboard_names_what_the_server_tells(watched: Running) -> None:
    watched.post("/classify", {"text": "a text"})
    text = httpx.get(f"{watched.base}/metrics").text
    told = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    declared = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    board = read_json(Path(__file__).parents[2] / "docs/grafana.json")
    asked = {name for panel in board["panels"] for one in panel["targets"] for name in NAME.findall(one["expr"])}
    assert len(board["panels"]) > 10
    for name in asked:
        family = re.sub("_(bucket|count|sum)$", "", name)
        assert name in told or family in declared, f"{name} is not in /metrics"
    assert {"lmworks_drift", "lmworks_out_of_domain_total", "lmworks_confidence_bucket"} <= asked


def test_accuracy_on_a_labelled_sample(watched: Running, place: Path) -> None:
    same = check_monitor(watched.base, data=place / "held.csv").values["accuracy"]
    facts = read_json(place / "news/monitor.json")
    assert not same["fallen"] and same["accuracy"] == pytest.approx(facts["accuracy"], abs=0.02)
    assert same["expected"] == facts["accuracy_kept"], "the other model might be wrong"
    lines = (place / "held.csv").read_text("utf-8").splitlines()
    turned = [line.rsplit(",", 1)[0] + ",Sports" for line in lines[1:]]
    (place / "wrong.csv").write_text("\n".join([lines[0], *turned]), "utf-8")
    assert check_monitor(watched.base, data=place / "wrong.csv").values["fallen"]
    (place / "others.csv").write_text("\n".join([*lines[:20], lines[20].rsplit(",", 1)[0] + ",Sport"]), "utf-8")
    with pytest.raises(InputError, match="not one of the model's") as caught:
        check_monitor(watched.base, data=place / "others.csv")  # no answer could be right: nothing has fallen
    assert caught.value.found == "Sport" and "example 20" in caught.value.where


def test_who_abstains_says_null(place: Path, data_folder: Path) -> None:
    with server(place / "news", watching=Watching("abstain")) as one:
        answers = one.post("/classify", {"text": german(data_folder)[:8]}).json()["answers"]
        assert any(answer["ood"] for answer in answers)
        for answer in answers:
            assert (answer["label"] is None) == answer["ood"] == (answer["labels"] == [])
        kept = check_monitor(one.base, data=place / "held.csv").values["accuracy"]
        assert kept["accuracy"] == pytest.approx(kept["expected"], abs=0.005) and not kept["fallen"]


def test_confidence_that_is_almost_one_does_not_differ_from_itself() -> None:
    """The reference keeps four bytes a number: what rounds to 1 there must be rounded in a window too."""
    rng = np.random.default_rng(0)
    sure, rest = 1 - rng.random(800) * 1e-9, {"score": np.zeros(400, np.float32), "length": np.ones(400, np.float32)}
    facts = {"reference": {"classes": {"a": 200, "b": 200}, "texts": 400}}
    watch = Watch("m", Monitor(facts, {"confidence": sure[:400].astype(np.float32), **rest}), 200)
    seen = [Seen([], i % 2, float(p), 0.0, False, 1, None) for i, p in enumerate(sure[400:600])]
    assert watch.compare(200, seen)["drift"] == []


def test_a_stale_monitor_and_senseless_policies_stop_the_server(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "news", tmp_path / "news")
    config = read_json(tmp_path / "news/config.json")
    write_json(tmp_path / "news/config.json", {**config, "note": "changed"})
    with pytest.raises(Exception, match="belongs to another model"):
        make_app([describe(tmp_path / "news")])
    good, plain = describe(place / "news"), describe(place / "plain")
    for policy, specs, said in (
        ("guess", [good], "no such policy"), ("fallback", [good], "no such policy"),
        ("abstain", [plain], "knows its limits"), ("fallback=news", [good], "stand in for itself"),
        ("fallback=other", [good, plain], "must be a classifier"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            make_app(specs, watching=Watching(policy))
    with pytest.raises(InputError, match="nothing is watched"):
        (tmp_path / "nothing").mkdir()
        with server(place / "plain", ready=False, settings={"warm": False}) as one:
            check_monitor(one.base)


@pytest.mark.parametrize("url", [
    "http://example.com/", "http://8.8.8.8/", "http://169.254.169.254/latest", "ftp://127.0.0.1/", "127.0.0.1:80",
    "http://user:word@127.0.0.1/", "http://[2001:4860:4860::8888]/", "http://0.0.0.0/", "http://127.0.0.1:99999/",
])  # fmt: skip
def test_alerts_stay_nearby(url: str) -> None:
    """C35: a service that can be told to call any address is a hole in the network."""
    with pytest.raises(InputError):
        read_target(url)


def test_what_goes_wrong_with_an_alert_is_said(receiver: Receiver) -> None:
    assert read_target("http://10.1.2.3:81/a?b=c") == Target("10.1.2.3", 81, "10.1.2.3:81", "/a?b=c", False)
    nearby = read_target(f"{receiver.url}/elsewhere")
    before = len(receiver.bodies)
    assert "302" in send(nearby, {}) and len(receiver.bodies) == before + 1, "no redirect is followed"
    receiver.bodies.pop()
    assert "Error" in send(Target("127.0.0.1", 9, "localhost", "/", False), {})


def test_an_alert_may_go_by_https_to_whom_the_certificate_names(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")

    def try_it(certificate: trustme.LeafCert, host: str) -> str:
        secure = HTTPServer(("127.0.0.1", 0), receiver.handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        secure.handle_error = lambda *_: None  # a client that turns away is what is tested
        threading.Thread(target=secure.serve_forever, daemon=True).start()
        try:
            return send(read_target(f"https://{host}:{secure.server_port}/alerts"), {"alert": host})
        finally:
            secure.shutdown()
            secure.server_close()

    named, before = authority.issue_cert("127.0.0.1"), len(receiver.bodies)
    assert "CERTIFICATE_VERIFY_FAILED" in try_it(named, "127.0.0.1"), "nobody vouches for it"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert try_it(named, "127.0.0.1") == ""
    assert receiver.bodies.pop() == {"alert": "127.0.0.1"}
    assert "mismatch" in try_it(authority.issue_cert("elsewhere.test"), "127.0.0.1")
    assert len(receiver.bodies) == before


def test_a_log_that_cannot_be_written_is_said_and_counted(
    place: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "gone" / "drift.jsonl"
    texts = [text for text, _ in news(data_folder)[1400:1440]]
    with server(place / "news", watching=Watching(log=log, window=40)) as one:
        one.post("/classify", {"text": texts})
        windows(one, 1)
        for _ in range(100):
            if metrics(one, "lmworks_drift_undelivered_total", to="log"):
                break
            time.sleep(0.05)
        assert metrics(one, "lmworks_drift_undelivered_total", to="log") == 1
        assert "the log could not be written: FileNotFoundError" in capsys.readouterr().err
        log.parent.mkdir()
        one.post("/classify", {"text": texts[:10]})
        windows(one, 2)
        for _ in range(100):
            if log.exists() and log.read_text():
                break
            time.sleep(0.05)
        assert json.loads(log.read_text())["requests"] == 50
        assert metrics(one, "lmworks_drift_undelivered_total", to="log") == 1


def test_a_slow_log_stops_nobody(place: Path, data_folder: Path, tmp_path: Path) -> None:
    """A pipe that nobody reads: to open it waits for a reader."""
    log = tmp_path / "pipe"
    os.mkfifo(log)
    texts = [text for text, _ in news(data_folder)[1400:1440]]
    with server(place / "news", watching=Watching(log=log, window=40)) as one:
        one.post("/classify", {"text": texts})
        windows(one, 1)
        began = time.monotonic()
        assert one.post("/classify", {"text": texts[:5]}).status_code == 200
        assert httpx.get(f"{one.base}/health/live", timeout=5).status_code == 200
        assert time.monotonic() - began < 5
        with log.open() as reader:
            assert json.loads(reader.readline())["requests"] == 40


def test_half_a_line_of_a_lost_process_is_passed_over(tmp_path: Path) -> None:
    log, numbers = tmp_path / "log", {"requests": 40, "window": 40}
    row = {"model": "a", "drift": ["length"], **numbers, "tests": {"length": {"p": 1e-9, "statistic": 0.5}}}
    row |= dict.fromkeys(NUMBERS, 1)
    whole = json.dumps(row)
    assert append(log, whole) == ""
    for cut in range(1, len(whole)):  # also of a line that is being written just now
        log.write_text(f"{whole}\n{whole[:cut]}")
        assert len(check_monitor(str(log)).values["models"]["a"]["comparisons"]) == 1, whole[:cut]
        append(log, whole)
        assert len(check_monitor(str(log)).values["models"]["a"]["comparisons"]) == 2, whole[:cut]


@pytest.mark.parametrize(
    "text", ["", "no json", '{"model": "a"}', '{"model": "a", "drift": [], "requests": "x", "tests": {}}']
)
def test_what_is_no_log(text: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(InputError):
        check_monitor(str(tmp_path / "log"))
    with pytest.raises(InputError):
        check_monitor(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="cannot be asked"):
        check_monitor("http://127.0.0.1:9")
