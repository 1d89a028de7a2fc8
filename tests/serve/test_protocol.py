"""What the server does with connections: those that send too much, too slowly or nothing, and those it turns away."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from serving import Running, server
from tiny_page import made_folder

from lmworks.serve import protocol
from lmworks.serve.guard import MOST_BYTES
from lmworks.serve.supervisor import Ticket

ASK = json.dumps({"text": "a"}).encode()
HEAD = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    """A server in whose engine one request may be at a time."""
    with server(made_folder(), most=1) as one:
        yield one


@contextmanager
def full(one: Running) -> Iterator[None]:
    """Hold the only place in the engine."""
    tickets = one.supervisor.tickets
    tickets[0] = Ticket(0, ())
    try:
        yield
    finally:
        del tickets[0]


def connect(one: Running) -> socket.socket:
    host, port = one.base.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read(wire: socket.socket) -> http.client.HTTPResponse:
    """Return the next answer on a connection, read to its end."""
    answer = http.client.HTTPResponse(wire)
    answer.begin()
    answer.body = answer.read()  # type: ignore[attr-defined]
    return answer


def read_all(wire: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while part := wire.recv(1000):
            found += part
    return found


@pytest.mark.parametrize("cut", [0, 20, 200])
def test_an_offer_of_another_protocol_costs_no_body(cut: int, narrow: Running) -> None:
    """Java's client offers HTTP/2 with each first request; it is answered in the protocol that it is written in."""
    more = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nUpgrade: h2c\r\n"
    body = json.dumps({"inputs": "a"}).encode()
    whole = HEAD + more + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with connect(narrow) as wire:
        for part in (whole, whole, LIVE):
            wire.sendall(part[:cut])
            time.sleep(0.05 * bool(cut))
            wire.sendall(part[cut:])
            answer = read(wire)
            assert answer.status == 200, answer.body  # type: ignore[attr-defined]


def test_what_is_turned_away_is_not_read_and_the_connection_stays(narrow: Running) -> None:
    with full(narrow):
        with connect(narrow) as wire:
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ASK))
            refused = read(wire)  # before a byte of the body was sent
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert json.loads(refused.body)["error"]["code"] == "busy"  # type: ignore[attr-defined]
            assert refused.headers["x-content-type-options"] == "nosniff"
            wire.sendall(ASK + LIVE)
            assert read(wire).status == 200, "the body was passed over, not taken for a request"
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ASK) + ASK)
            assert read(wire).status == 429
        for more in (b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
            with connect(narrow) as wire:
                wire.sendall(HEAD + more)
                refused = read(wire)
                assert (refused.status, refused.headers["connection"]) == (429, "close")
                assert read_all(wire) == b""
        with connect(narrow) as wire:
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (MOST_BYTES + 1))
            assert read(wire).status == 413
        assert httpx.get(f"{narrow.base}/predict/a").status_code == 429
        assert {httpx.get(narrow.base + path).status_code for path in ("/info", "/metrics", "/v1/models")} == {200}
    assert narrow.post("/tokenize", {"inputs": "a"}).status_code == 200


def test_a_body_that_comes_slowly_keeps_nobody_out(narrow: Running) -> None:
    with connect(narrow) as slow:
        slow.sendall(HEAD + b"Content-Length: 20\r\n\r\n{")
        time.sleep(0.1)
        assert narrow.post("/tokenize", {"inputs": "a"}).status_code == 200


def test_many_at_once_are_answered_or_turned_away(narrow: Running) -> None:
    body = json.dumps({"inputs": "a"}).encode()
    wires = [connect(narrow) for _ in range(40)]
    try:
        for wire in wires:
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        found = [read(wire).status for wire in wires]
    finally:
        for wire in wires:
            wire.close()
    assert set(found) <= {200, 429}
    assert 200 in found


def test_a_head_without_end_is_not_kept(narrow: Running) -> None:
    for start in (b"GET /", HEAD + b"X-Long: ", HEAD):
        with connect(narrow) as wire:
            with suppress(ConnectionError):
                wire.sendall(start)
                for _ in range(4 * protocol.MOST_HEAD // 6000):
                    wire.sendall(b"X: 1\r\n" * 1000 if start == HEAD else b"a" * 6000)
                    time.sleep(0.002)
            assert read_all(wire)[:12] in (b"HTTP/1.1 400", b"")


def test_a_request_that_never_ends_is_ended(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RECEIVED", 0.3)
    for start in (b"", b"GET /health", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"):
        with connect(narrow) as wire:
            began = time.monotonic()
            wire.sendall(start)
            assert read_all(wire) == b""
            assert 0.2 < time.monotonic() - began < 5
    with connect(narrow) as wire:  # a kept connection waits as long as ever
        wire.sendall(LIVE)
        assert read(wire).status == 200
        time.sleep(0.5)
        wire.sendall(LIVE)
        assert read(wire).status == 200


def test_a_connection_that_waits_makes_room(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 8)
    idle = []
    try:
        for _ in range(30):
            idle.append(connect(narrow))
            with connect(narrow) as wire:
                wire.sendall(LIVE)
                assert read(wire).status == 200
        closed = 0
        for wire in idle:
            wire.settimeout(0.05)
            with suppress(TimeoutError):
                closed += read_all(wire) == b""
        assert closed >= 22
    finally:
        for wire in idle:
            wire.close()


def test_where_no_connection_waits_the_next_is_turned_away(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 4)
    busy = [connect(narrow) for _ in range(4)]
    try:
        for wire in busy:
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ASK))
        time.sleep(0.2)
        with connect(narrow) as wire:
            refused = read(wire)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        for wire in busy:
            wire.sendall(ASK)
            assert read(wire).status == 400, "they are answered: /tokenize wants other names"
    finally:
        for wire in busy:
            wire.close()


def test_while_the_engine_is_away_nobody_is_read(narrow: Running) -> None:
    os.kill(narrow.supervisor.process.pid or 0, signal.SIGSTOP)
    narrow.wait(ready=False)
    until = time.monotonic() + 5
    while True:  # from the next look on
        with connect(narrow) as wire:
            wire.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(ASK))
            wire.settimeout(0.3)
            with suppress(TimeoutError):
                refused = read(wire)
                break
        assert time.monotonic() < until
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert json.loads(refused.body)["error"]["code"] == "not_ready"  # type: ignore[attr-defined]
    narrow.wait()
    assert narrow.post("/tokenize", {"inputs": "a"}).status_code == 200


def test_an_answer_comes_in_one_piece(narrow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed has sent all of it or nothing: a proxy may ask another one, half an answer is lost."""
    sent: list[bytes] = []

    class Noted:
        """The true transport, and what it was given at once."""

        def __init__(self, transport: Any) -> None:
            self.transport = transport

        def __getattr__(self, name: str) -> Any:
            return getattr(self.transport, name)

        def write(self, data: bytes) -> None:
            sent.append(data)
            self.transport.write(data)

        def writelines(self, parts: tuple[bytes, ...]) -> None:
            self.write(b"".join(parts))

    joined = protocol.Joined
    monkeypatch.setattr(protocol, "Joined", lambda transport, loop: joined(Noted(transport), loop))
    with connect(narrow) as wire:
        for _ in range(20):
            wire.sendall(LIVE)
            assert wire.recv(65536).startswith(b"HTTP/1.1 200")
    assert len(sent) == 20
    for answer in sent:
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"status": "live"}


class Told:
    """A transport that remembers what it is given."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        self.written.append(b"".join(parts))

    def close(self) -> None:
        self.written.append(b"closed")


def test_a_head_waits_for_the_body_that_follows_at_once_and_no_longer() -> None:
    async def use() -> list[bytes]:
        told = Told()
        joined = protocol.Joined(told, asyncio.get_running_loop())
        joined.write(b"HTTP/1.1 200 OK\r\n\r\n")
        joined.write(b"one")
        joined.write(b"two")
        joined.write(b"HTTP/1.1 201 Created\r\n\r\n")
        await asyncio.sleep(0.01)  # a stream's first piece may come late
        joined.write(b"three")
        joined.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        joined.close()
        await asyncio.sleep(0.01)
        return told.written

    assert asyncio.run(use()) == [
        b"HTTP/1.1 200 OK\r\n\r\none", b"two", b"HTTP/1.1 201 Created\r\n\r\n", b"three",
        b"HTTP/1.1 204 No Content\r\n\r\n", b"closed",
    ]  # fmt: skip
