"""The server from outside: the page's files, health, metrics, starting and ending."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, running, server, start
from tiny_page import copy_folder, made_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.cli import main
from lmworks.serve.app import listen, make_app, serve
from lmworks.serve.service import describe


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """The server over the tiny model."""
    with running(made_folder()) as address:
        yield address


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_page_comes_with_what_threads_need(base: str) -> None:
    """C17: threads in WebAssembly need COOP and COEP, on the page and on every script."""
    page = json.loads((made_folder() / "web/page.json").read_text())
    kinds = {
        ".wasm": "application/wasm",
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".json": "application/json",
    }
    for name in ["", "index.html", "sw.js", "web/app.js", "web/worker.js", *page["files"]]:
        answer = httpx.get(f"{base}/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["content-type"].startswith(kinds.get(Path(name).suffix, "")), name
        assert answer.content == (made_folder() / (name or "index.html")).read_bytes()


def test_caches_ask_again_unless_the_address_has_the_hash(base: str) -> None:
    first = httpx.get(f"{base}/web/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = httpx.get(f"{base}/web/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "immutable" in httpx.get(f"{base}/web/app.js?v=1").headers["cache-control"]
    head = httpx.head(f"{base}/onnx/model.onnx")
    assert int(head.headers["content-length"]) == (made_folder() / "onnx/model.onnx").stat().st_size
    part = httpx.get(f"{base}/onnx/model.onnx", headers={"Range": "bytes=0-9"})
    assert (part.status_code, len(part.content)) == (206, 10)


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/web/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/%2e%2e%2fsecret.txt",
        "/web/%2e%2e/%2e%2e/secret.txt",
        "/..%5csecret.txt",
        "//secret.txt",
        "/training/metrics.jsonl",
        "/%74raining/metrics.jsonl",
        "/web/../training/metrics.jsonl",
        "/training/",
        "/web/",
        "/web",
        "/onnx",
        "/.hidden",
        "/link.txt",
        "/web/page.json%00.txt",
        "/web/page.json%00",
    ],
)
def test_nothing_outside_the_page_is_served(path: str, guarded: str) -> None:
    """Raw requests: a client library would tidy the path first."""
    connection = http.client.HTTPConnection(urlsplit(guarded).netloc, timeout=10)
    connection.putrequest("GET", path, skip_host=False)
    connection.endheaders()
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status == 404
    assert error["message"].startswith("there is no file")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with secrets beside, inside and linked from its folder."""
    place = tmp_path_factory.mktemp("escape")
    folder = copy_folder(place / "model")
    (place / "secret.txt").write_text("secret")
    (folder / ".hidden").write_text("secret")
    (folder / "link.txt").symlink_to(place / "secret.txt")
    with running(folder) as address:
        yield address


# -- starting --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_an_input_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            serve(make_app([describe(made_folder())]), port=port)
    assert "--port" in caught.value.fix
    with pytest.raises(InputError, match="port"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(InputError, match="address"):
        listen("no.such.host.invalid", 0)


def test_a_folder_that_cannot_be_served_is_said_before_listening(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        describe(tmp_path / "nothing")
    with pytest.raises((InputError, FormatError)):
        describe(tmp_path)
    with pytest.raises(InputError, match="name of its own"):
        make_app([describe(made_folder()), describe(copy_folder(tmp_path / "a" / made_folder().name))])


def test_a_models_name_is_that_of_the_folder_or_of_the_link_to_it(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "current").symlink_to(made_folder())
    assert describe(tmp_path / "current").name == "current", "where it leads changes with each release"
    monkeypatch.chdir(made_folder() / "onnx")
    assert describe("..").name == made_folder().resolve().name


def test_what_cannot_work_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        ((), "no model to serve"), ((str(made_folder()), "--drift-log", str(tmp_path / "no/x")), "no such folder"),
        ((str(made_folder()), "--drift-log", str(tmp_path)), "the log is a folder"),
    ):  # fmt: skip
        assert main(["serve", *options, "--port", "0"]) == 2
        assert said in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_never_ready_and_says_why(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "broken")
    (folder / "onnx" / "model.onnx").write_bytes(b"nothing")
    with server(folder, ready=False) as one:
        for _ in range(1000):
            reason = httpx.get(f"{one.base}/health/ready").json()["reason"]
            if "not usable" in reason:
                break
            time.sleep(0.02)
        assert reason == "broken is not usable"
        assert httpx.get(f"{one.base}/health/live").status_code == 200
        assert [httpx.head(f"{one.base}/health/{name}").status_code for name in ("live", "ready")] == [200, 503]
        answer = one.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 500
        assert "model.onnx" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_without_torch_and_ends_when_told_to(number: signal.Signals, tmp_path: Path) -> None:
    """C38: a server of an exported model installs no torch, neither here nor in the engine's process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'onnx'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        process, base = start(str(made_folder()))
    try:
        body = {"prompt": "Who", "max_tokens": 2}
        assert httpx.post(f"{base}/v1/completions", json=body, timeout=30).status_code == 200
        process.send_signal(number)
        assert process.wait(15) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "", "no traceback"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("where", "number"), [("fastapi", signal.SIGTERM), ("fastapi", signal.SIGINT), ("engine", signal.SIGINT)]
)
def test_told_to_end_while_it_starts_it_goes_at_once(where: str, number: signal.Signals, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the engine as well: neither ends in a traceback."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "def wait():\n"
        "    os.write(2, b'HERE\\n')\n"
        "    time.sleep(2)\n"
        "class Waiting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fastapi':\n"
        "            wait()\n"
        f"if {where!r} == 'fastapi':\n"
        "    sys.meta_path.insert(0, Waiting())\n"
        "elif 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lmworks", "serve", str(made_folder()), "--port", "0"], stderr=subprocess.PIPE,
        text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        while (line := process.stderr.readline()) != "HERE\n":
            assert line.startswith("Serving"), line
        os.killpg(process.pid, number)
        assert process.wait(15) == 0
        assert process.stderr.read() == "", "no traceback"
    finally:
        process.kill()
        process.communicate()


def test_every_flag_reaches_the_server(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-sixteen-letters\n")
    process, base = start(
        str(made_folder()), "--api-key-file", str(keys), "--rate", "3", "--queue", "7", "--timeout", "9",
        "--slots", "2", "--threads", "1", "--dtype", "int8", "--lazy", "--grace", "1",
    )  # fmt: skip
    try:
        right = {"Authorization": "Bearer a-key-of-sixteen-letters"}
        assert httpx.get(f"{base}/info").status_code == 401
        told = httpx.get(f"{base}/info", headers=right).json()
        assert told["max_concurrent_requests"] == 7
        assert told["models"][0]["state"] == "cold"
        body = {"prompt": "Who", "max_tokens": 3, "stream": False}
        assert httpx.post(f"{base}/generate", json=body, headers=right, timeout=60).status_code == 200
        time.sleep(0.5)
        assert httpx.get(f"{base}/info", headers=right).json()["models"][0]["dtype"] == "int8"
        statuses = [httpx.get(f"{base}/info", headers=right).status_code for _ in range(6)]
        assert 429 in statuses
        time.sleep(1.2)
        metrics = httpx.get(f"{base}/metrics", headers=right).text
        assert f'lmworks_slots_total{{model="{made_folder().name}"}} 2.0' in metrics
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        process.communicate()


@pytest.mark.parametrize(
    "options",
    [["--port", "70000"], ["--queue", "0"], ["--slots", "0"], ["--timeout", "0"], ["--rate", "-1"], ["--grace", "-1"],
     ["--api-key-file", "/no/such/file"], ["--dtype", "int9"], ["--threads", "0"]],
)  # fmt: skip
def test_a_bad_flag_ends_in_one_message(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(made_folder()), *options]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.strip()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "broken")
    (folder / "onnx" / "model.onnx").write_bytes(b"nothing")
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", "serve", str(folder), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "model.onnx cannot be loaded" in done.stderr and "Traceback" not in done.stderr


# -- what is counted -------------------------------------------------------------------------------------------------


def test_metrics_count_requests_and_tokens_and_hold_no_text(served: Running) -> None:
    served.post("/classify", {"text": "a very secret text"})
    httpx.get(f"{served.base}/predict/another%20secret")
    served.post("/v1/completions", {"prompt": "Who", "max_tokens": 5, "temperature": 0})
    time.sleep(0.5)  # the engine tells what it counted with its next sign of life
    answer = httpx.get(f"{served.base}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "secret" not in answer.text
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    routes = ("lmworks_request_duration_seconds_count", ("route", "/classify"), ("status", "200"))
    assert found[routes] >= 1
    assert ("lmworks_request_duration_seconds_count", ("route", "/predict/{text:path}"), ("status", "200")) in found
    writer = ("model", made_folder().name)
    assert found["lmworks_generated_tokens_total", writer] >= 5
    assert found["lmworks_slots_total", writer] == 8
    assert found["lmworks_batch_rows_total", ("model", "sentiment")] >= 2
    assert found["lmworks_ready",] == 1
    assert found["lmworks_memory_bytes", ("process", "engine")] > 1e7


def test_info_tells_what_is_served_and_its_limits(served: Running) -> None:
    told = httpx.get(f"{served.base}/info").json()
    assert told["model_id"] == "sentiment"
    assert told["max_input_length"] == 256
    tasks = {model["name"]: model["task"] for model in told["models"]}
    assert tasks["names"] == "token-classification" and tasks["minilm"] == "feature-extraction"
    assert all(model["runtime"] == "onnx" and model["dtype"] == "fp32" for model in told["models"])


def test_a_lazy_model_is_loaded_when_it_is_asked_for() -> None:
    with server(made_folder(), ready=False, settings={"warm": False}) as one:
        one.wait()
        assert httpx.get(f"{one.base}/info").json()["models"][0]["state"] == "cold"
        assert one.post("/v1/completions", {"prompt": "Who", "max_tokens": 2}).status_code == 200
        assert httpx.get(f"{one.base}/info").json()["models"][0]["state"] == "ready"
