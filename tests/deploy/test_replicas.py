"""Two servers of one folder behind HAProxy, with the configuration that `lmworks deploy docker` writes."""

from __future__ import annotations

import csv
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import lmworks
from lmworks.base.errors import LmworksError
from lmworks.serve.refusals import refusal
from lmworks.serve.slots import LateError
from lmworks.serve.supervisor import Down
from lmworks.verbs.deploying import deploy_docker

TEXTS = ["a gorgeous, witty, seductive movie", "it 's slow -- very , very slow", "a waste of good performances ."]
COUNT = re.compile(r'lmworks_request_duration_seconds_count\{route="/classify",status="200"\} ([\d.]+)')
CLIENTS = 6


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def image(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replicas") / "image"
    deploy_docker(graphs, out, name="intents", port=free_port())
    return out


class Replica:
    """A server that may be killed and come back at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "lmworks", "serve", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.DEVNULL)

    def ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def answered(self) -> int:
        found = COUNT.search(httpx.get(f"http://127.0.0.1:{self.port}/metrics").text)
        return int(float(found.group(1))) if found else 0


class Proxy:
    """HAProxy with a configuration that names our replicas; its own statistics come by a socket."""

    def __init__(self, image: Path, replicas: Sequence[Any], work: Path) -> None:
        text = (image / "haproxy.cfg").read_text()
        [port] = re.findall(r"bind :(\d+)", text)
        for number, replica in enumerate(replicas, 1):
            text, done = re.subn(rf"intents-{number}:{port}", f"127.0.0.1:{replica.port}", text)
            assert done == 1
        self.url, self.place = f"http://127.0.0.1:{port}", work / "told"
        (work / "haproxy.cfg").write_text(text.replace(f"bind :{port}", f"bind 127.0.0.1:{port}"))
        (work / "more.cfg").write_text(f"global\n    stats socket {self.place}\n")
        self.process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(work / "haproxy.cfg"), "-f", str(work / "more.cfg")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def servers(self) -> dict[str, dict[str, str]]:
        """Return what HAProxy knows of each server."""
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(self.place))
            one.sendall(b"show stat\n")
            told = b"".join(iter(lambda: one.recv(65536), b"")).decode()
        rows = csv.DictReader(io.StringIO(told.removeprefix("# ")))
        return {row["svname"]: row for row in rows if row["pxname"] == "servers"}

    def until(self, name: str, status: str) -> float:
        """Wait until a server is UP or DOWN for the proxy; return how long that took."""
        started = time.monotonic()
        while not self.servers()[name]["status"].startswith(status):
            assert time.monotonic() - started < 60, f"{name} is never {status}"
            time.sleep(0.02)
        return time.monotonic() - started


@contextmanager
def proxied(graphs: Path, image: Path, work: Path) -> Iterator[tuple[Proxy, list[Replica]]]:
    replicas = [Replica(graphs), Replica(graphs)]
    proxy = Proxy(image, replicas, work)
    try:
        while not proxy.place.exists():
            assert proxy.process.poll() is None, "HAProxy ended"
            time.sleep(0.02)
        for name in ("first", "second"):
            proxy.until(name, "UP")
        yield proxy, replicas
    finally:
        for process in (proxy.process, *(one.process for one in replicas)):
            process.kill()
            process.wait()


class Crowd:
    """Clients that ask on and on, each on a connection of its own, and never ask a question twice."""

    def __init__(self, url: str, known: list[str]) -> None:
        self.url, self.known, self.over = url, known, threading.Event()
        self.seen: Counter[Any] = Counter()
        self.seconds: list[float] = []
        self.threads = [threading.Thread(target=self.ask, args=(number,)) for number in range(CLIENTS)]

    def ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.over.is_set():
                number += 1
                started = time.perf_counter()
                try:
                    answer = client.post("/classify", json={"text": TEXTS[number % len(TEXTS)]})
                except httpx.TransportError as error:
                    self.seen[f"{type(error).__name__}: {error}"] += 1
                    continue
                self.seconds.append(time.perf_counter() - started)
                said = answer.json()["answers"][0]["label"] if answer.status_code == 200 else None
                right = said == self.known[number % len(TEXTS)]
                self.seen["right" if right else answer.status_code if said is None else "wrong"] += 1

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(90)


@pytest.fixture(scope="module")
def known(graphs: Path) -> list[str]:
    return [best.label for [best, *_] in lmworks.predict(graphs, TEXTS, runtime="onnx", dtype="fp32")]


def test_one_of_two_ends_under_load_and_comes_back(graphs: Path, image: Path, known: list[str], tmp_path: Path) -> None:
    """One is killed, the other told to end: nobody notices, and the probe says who may be asked."""
    with proxied(graphs, image, tmp_path) as (proxy, replicas):
        told, lost = [], 0
        with Crowd(proxy.url, known) as crowd:
            for name, number, code in (("first", signal.SIGKILL, -9), ("second", signal.SIGTERM, 0)):
                one, other = replicas if name == "first" else reversed(replicas)
                time.sleep(0.4)
                lost, downs = lost + one.answered(), int(proxy.servers()[name]["chkdown"])
                one.process.send_signal(number)
                noticed = proxy.until(name, "DOWN")
                assert one.process.wait(40) == code
                assert not one.ready() and other.ready() and proxy.servers()[name]["status"] == "DOWN"
                one.start()
                back = proxy.until(name, "UP")
                assert one.ready() and int(proxy.servers()[name]["chkdown"]) == downs + 1
                told.append(f"{number.name}: seen after {noticed:.2f} s, ready {back:.2f} s after its start")
            time.sleep(0.4)
        asked = sum(crowd.seen.values())
        assert crowd.seen == {"right": asked}, crowd.seen
        served = [one.answered() for one in replicas]
        assert min(served) > 0 and lost > 0 and sum(served) + lost <= asked  # an answer is counted where it was made
        told.append(f"{asked} asked, asked again {proxy.servers()['BACKEND']['wretr']}")
    print("\n" + "; ".join([*told, f"slowest {1000 * max(crowd.seconds):.0f} ms"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_losses_lose_no_request(graphs: Path, image: Path, known: list[str], tmp_path: Path) -> None:
    """Both in turns, ten times, always under load."""
    with proxied(graphs, image, tmp_path) as (proxy, replicas), Crowd(proxy.url, known) as crowd:
        for turn in range(10):
            name, replica = ("first", "second")[turn % 2], replicas[turn % 2]
            replica.process.send_signal((signal.SIGKILL, signal.SIGTERM)[turn // 2 % 2])
            proxy.until(name, "DOWN")
            replica.process.wait(40)
            replica.start()
            proxy.until(name, "UP")
            time.sleep(0.5)
        crowd.__exit__()
        told = proxy.servers()["BACKEND"]
        print(f"\n10 losses: {dict(crowd.seen)}; asked again {told['wretr']}, {told['wredis']}")
        assert crowd.seen == {"right": sum(crowd.seen.values())}


class Stub:
    """A server that is ready, and answers every question with one status."""

    def __init__(self, status: int) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self, code: int) -> None:
                self.send_response(code)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.answer(200)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                asked.append(self.path)
                self.answer(status)

            def log_message(self, *_: Any) -> None: ...

        self.asked, self.server = asked, ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize(("error", "again"), [(Down("away"), True), (LateError("late"), False)], ids=["away", "late"])
def test_a_request_that_took_too_long_is_not_put_again(
    image: Path, tmp_path: Path, error: LmworksError, again: bool
) -> None:
    """It would take as long there; a server that is away has not begun."""
    status = refusal(error).status
    stubs = [Stub(status), Stub(status)]
    proxy = Proxy(image, stubs, tmp_path)
    try:
        while not proxy.place.exists():
            time.sleep(0.02)
        for name in ("first", "second"):
            proxy.until(name, "UP")
        assert httpx.post(f"{proxy.url}/generate", content=b"{}").status_code == status
    finally:
        proxy.process.kill()
        proxy.process.wait()
        for stub in stubs:
            stub.server.shutdown()
            stub.server.server_close()
    assert (sum(len(stub.asked) for stub in stubs) > 1) is again


def test_the_proxy_and_its_servers_are_described_together(image: Path) -> None:
    """HAProxy takes the file as it is written, and compose names what it asks."""
    services = yaml.safe_load((image / "replicas.yaml").read_text())["services"]
    done = subprocess.run(["haproxy", "-c", "-f", str(image / "haproxy.cfg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    text = (image / "haproxy.cfg").read_text()
    assert set(re.findall(r"^    server \w+ ([\w-]+):", text, re.MULTILINE)) == set(services) - {"proxy"}
    [port] = re.findall(r"bind :(\d+)", text)
    assert services["proxy"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["restart"] == "unless-stopped"
