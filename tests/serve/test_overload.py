"""More than the server can do: it answers what it can, turns the rest away, and stays reachable."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import slack, start

SECONDS = float(os.environ.get("LMWORKS_LOAD_SECONDS", "60"))
CROWD = Path(__file__).with_name("crowd.py")
BARE = """
import asyncio
async def answer(reader, writer):
    while await reader.readuntil(b"\\r\\n\\r\\n"):
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def bare() -> Iterator[str]:
    """Yield the address of a server that does nothing: what a probe takes on this machine just now."""
    process = subprocess.Popen(
        [sys.executable, "-c", BARE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()


def p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


def p50(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def probe(host: str, port: int, path: str) -> float:
    """Return the seconds that a probe takes, with a connection of its own as an orchestrator makes it."""
    began = time.monotonic()
    with socket.create_connection((host, port), timeout=30) as wire:
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        assert wire.recv(100).startswith(b"HTTP/1.1 200")
    return time.monotonic() - began


@pytest.mark.slow
def test_four_times_too_much_for_a_minute_is_turned_away_in_order(classifier: Path, reviews: list[str]) -> None:
    """Counted with a crowd that costs little, and says what; the probe is held against a server that does nothing.

    What others take of the machine is taken from the server as well: answers are also counted by the processor time
    that the server and its engine had for them, which is nearly the same on a busy machine as on a quiet one.
    """
    process, base = start(str(classifier), "--queue", "32")
    host, port = base.removeprefix("http://").split(":")
    own = psutil.Process(process.pid)
    both = [own, *own.children()]
    live: list[float] = []
    nothing: list[float] = []

    def used() -> float:
        return sum(one.cpu_times().user + one.cpu_times().system for one in both)

    def ask(rate: float, seconds: float, connections: int) -> dict[str, Any]:
        words = [sys.executable, str(CROWD), host, port, "/classify", f"{rate}", f"{seconds}", f"{connections}"]
        before, began = used(), time.monotonic()
        crowd = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        crowd.stdin.write("\n".join(reviews))
        crowd.stdin.close()
        while crowd.poll() is None:
            if rate:
                live.append(probe(host, int(port), "/health/live"))
                nothing.append(probe(other_host, int(other_port), "/"))
            time.sleep(0.05)
        with crowd:
            found = json.loads(crowd.stdout.read())
        spent = (used() - before) / (time.monotonic() - began)
        return {**found, "server": spent, "per_processor_second": found["answers_per_second"] / spent}

    try:
        with bare() as other:
            other_host, other_port = other.removeprefix("http://").split(":")
            ask(0, 2, 30)  # warm
            before = ask(0, max(5.0, SECONDS / 6), 30)
            rate = 4 * before["answers_per_second"]
            over = ask(rate, SECONDS, 256)
            ended = time.monotonic()
            for _ in range(20):
                assert httpx.post(f"{base}/classify", json={"text": "a fine film"}, timeout=30).status_code == 200
            assert time.monotonic() - ended < 5 * slack()
            after = ask(0, max(5.0, SECONDS / 6), 30)
        usual = (before["answers_per_second"] + after["answers_per_second"]) / 2
        reached = over["answers_per_second"] / usual
        work = 2 * over["per_processor_second"] / (before["per_processor_second"] + after["per_processor_second"])
        print(f"asked {over['asked_per_second']:.0f}/s, answered {over['answers_per_second']:.0f}/s of {usual:.0f}/s "
              f"({reached:.2f}), {work:.2f} of the usual answers a processor second; {over['statuses']}")  # fmt: skip
        print(f"processors: server {over['server']:.2f}, crowd {over['processor']:.2f} (saturated: "
              f"{before['server']:.2f}, {before['processor']:.2f}); load {os.getloadavg()[0]:.1f}")  # fmt: skip
        print(f"probe p50 {p50(live):.4f} p99 {p99(live):.4f}, a bare server's {p50(nothing):.4f}, {p99(nothing):.4f}")
        assert over["statuses"].keys() <= {"200", "429", "503"}
        assert over["statuses"]["429"] > over["sent"] / 2
        assert (over["unanswered"], over["without_retry_after"]) == (0, 0)
        assert set(before["statuses"]) == set(after["statuses"]) == {"200"}
        assert p99(live) < 0.1 + p99(nothing)
        assert work > 0.8, "to turn away takes little from those who are answered"
        assert reached > 0.65 / slack()  # what refusals and their crowd take of two processors is gone
        counts = httpx.get(f"{base}/metrics").text
        assert "lmworks_requests_waiting 0.0" in counts
        assert "lmworks_engine_restarts_total 0.0" in counts
    finally:
        process.kill()
        process.communicate()
