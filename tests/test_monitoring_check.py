"""`lmworks monitor check` and `lmworks challenge` from outside: the exact test, and servers that are none of ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.evaluation.significance import fisher_tail
from lmworks.verbs.challenging import challenge
from lmworks.verbs.monitoring_check import FALLEN, check_monitor


@given(st.integers(1, 400), st.integers(1, 400), st.data())
def test_the_exact_test_is_scipys(trials: int, texts: int, data: st.DataObject) -> None:
    right, known = data.draw(st.integers(0, trials)), data.draw(st.integers(0, texts))
    theirs = fisher_exact([[right, known], [trials - right, texts - known]], alternative="less").pvalue
    assert fisher_tail(right, trials, known, texts) == pytest.approx(theirs, rel=1e-7, abs=1e-300)


def test_many_texts_are_no_trouble() -> None:
    theirs = fisher_exact([[88_000, 9_000], [12_000, 1_000]], alternative="less").pvalue
    assert fisher_tail(88_000, 100_000, 9_000, 10_000) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("texts", [50, 300])
def test_accuracy_falls_by_chance_as_seldom_as_said(texts: int) -> None:
    """Nothing has changed: the rate of the fit is an estimate too."""
    rng = np.random.default_rng(0)
    pairs = zip(rng.binomial(texts, 0.9, 600).tolist(), rng.binomial(300, 0.9, 600).tolist(), strict=True)
    assert sum(fisher_tail(right, 300, known, texts) <= FALLEN for known, right in pairs) <= 12


@pytest.fixture
def stranger() -> Iterator[dict[str, Any]]:
    """A server that answers one thing to everybody: `said`, raw."""
    told: dict[str, Any] = {"said": b"{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(told["said"] if told.get("raw") else b"HTTP/1.0 200 OK\r\n\r\n" + told["said"])

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told["url"] = f"http://127.0.0.1:{server.server_port}"
    yield told
    server.shutdown()
    server.server_close()


WINDOW = {"requests": 200, "window": 200, "level": 1e-5, "out_of_domain": 0.1, "drift": [],
          "tests": {"score": {"p": 0.5, "statistic": 0.1}}}  # fmt: skip
MODEL = {"drift": False, "requests": 200, "window": 200, "comparisons": [WINDOW],
         "reference": {"accuracy": 0.9, "accuracy_kept": 0.8, "texts": 50, "false_alarms": 0.1}}  # fmt: skip


def test_who_steps_back_is_held_to_the_accuracy_with_that(stranger: dict[str, Any], tmp_path: Path) -> None:
    """And LABEL_1 is what data call 1."""
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,1\nb,0\n")
    for second, expected, right in (("LABEL_0", 0.9, 1.0), (None, 0.8, 0.5)):
        answers = [{"label": "LABEL_1"}, {"label": second}]
        stranger["said"] = json.dumps({"models": {"a": MODEL}, "answers": answers}).encode()
        found = check_monitor(stranger["url"], data=data).values["accuracy"]
        assert (found["expected"], found["accuracy"]) == (expected, right)


def test_answers_that_are_not_ours_are_told(stranger: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,b\n")
    for said in ({}, {"models": []}, {"models": {"a": {}}}, {"models": {"a": 1}}, {"models": {"a": {"shadow": None}}}):
        stranger["said"] = json.dumps(said).encode()
        for work in (challenge, check_monitor):
            with pytest.raises(InputError, match="no answer of lmworks serve"):
                work(stranger["url"])
    for gone in WINDOW:
        kept = {key: value for key, value in WINDOW.items() if key != gone}
        stranger["said"] = json.dumps({"models": {"a": {**MODEL, "comparisons": [kept]}}}).encode()
        if gone not in ("window", "out_of_domain"):
            with pytest.raises(InputError, match="no answer of lmworks serve"):
                check_monitor(stranger["url"])
    stranger["said"] = json.dumps({"models": {"a": MODEL}}).encode()
    assert check_monitor(stranger["url"]).values["drift"] is False
    with pytest.raises(InputError, match="no answer of lmworks serve"):
        check_monitor(stranger["url"], data=data)  # /classify has no answers
    stranger.update(raw=True, said=b"SSH-2.0-OpenSSH_9\r\n")
    with pytest.raises(InputError, match="cannot be asked"):
        challenge(stranger["url"])


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://127.0.0.1:9/a b", "127.0.0.1:9", "http://[::1"])
def test_addresses_that_are_none_are_told(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("a-key")
    assert main(["challenge", url, "--admin-key-file", str(tmp_path / "key")]) == 2
    assert "cannot be asked" in capsys.readouterr().err
    assert main(["monitor", "check", url]) == 2
