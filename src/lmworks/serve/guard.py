"""Who may ask, how often, and how much: keys, rates, bodies and the queue, looked at before any of a body is read.

Keys are compared by their SHA-256 in constant time, all of them, so the time says nothing. Only the probes and the
playground's own files are open. To turn a request away while the queue is full takes ready-made bytes: a crowd that is
refused must not take the processor from those who are answered.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.serve.refusals import AWAY, BUSY, Refused

require("fastapi", extra="serve")
from starlette.exceptions import HTTPException  # noqa: E402

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health/live", "/health/ready")
ADMIN = "/challenger"  # asks no engine: it must work while one is down, and it has a key of its own
IN_ADDRESS = "/predict/"  # the one route that asks the engine without a body
MOST_BYTES = 1_000_000  # of a request's body
MOST_HEADERS = 64
CLIENTS = 10_000  # whose rates are remembered
KEY = re.compile(r"[\x21-\x7e]{16,512}")


def read_keys(path: str | Path) -> list[bytes]:
    """Return the digests of the keys in a file, one a line; '#' begins a comment. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such file of keys", where=str(path))
    keys = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    for number, key in enumerate(keys, 1):
        if not KEY.fullmatch(key):
            raise InputError(
                "a key cannot be used", where=f"{path}, key {number}", expected="16 or more letters, no spaces",
                fix="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
            )  # fmt: skip
    if not keys:
        raise InputError("the file holds no key", where=str(path), expected="a key a line")
    return [digest(key) for key in keys]


def digest(key: str) -> bytes:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the digest of the key that a request gives."""
    given = {name: value for name, value in headers if name in (b"authorization", b"x-api-key")}
    text = given.get(b"authorization", b"").decode("latin-1")
    key = text[7:] if text[:7].lower() == "bearer " else given.get(b"x-api-key", b"").decode("latin-1")
    return digest(key.strip())


class Rates:
    """So many requests a second for each client, and as many at once (a token bucket each)."""

    def __init__(self, rate: float, burst: int | None = None) -> None:
        self.rate, self.burst = rate, float(burst or max(1, round(rate)))
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> what is left, when

    def wait(self, client: str) -> float:
        """Take one; return 0, or the seconds until there is one again."""
        now = time.monotonic()
        left, since = self.buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self.buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self.buckets) > CLIENTS:
            self.buckets.popitem(last=False)
        return wait


class Guard:
    """The outermost part of the application."""

    def __init__(
        self, app: App, *, keys: list[bytes] | None = None, rates: Rates | None = None, refuse: Any, done: Any,
        leaving: Callable[[], bool] = lambda: False, public: frozenset[str] = frozenset(),
        most: int, waiting: Callable[[], int], down: Callable[[], bool], headers: Mapping[str, str] | None = None,
        trace: Callable[[Scope], AbstractContextManager[Callable[[str, int], None]]] | None = None,
    ) -> None:  # fmt: skip
        """`refuse(scope, receive, send, refused, headers)` answers; `done(route, status, seconds)` counts.

        Where `most` requests are in here, or `waiting()` in the engine, one more is turned away, with `headers`; where
        the engine is `down()`, everybody.
        `trace(scope)` surrounds a request that is no probe, and is told its route and status.
        """
        self.app, self.keys, self.rates, self.refuse, self.done = app, keys, rates, refuse, done
        self.leaving = leaving  # whether the server is about to end
        self.public = public  # paths that need no key beside the probes
        self.most, self.waiting, self.down, self.trace = most, waiting, down, trace
        self.asking = 0  # requests for the engine that came in whole and have no answer yet
        self.busy, self.away = (
            [
                ready_made(one, {**(headers or {}), **more}, path)
                for path in ("", "/v2")
                for more in ({}, {"Connection": "close"})
            ]
            for one in (BUSY, AWAY)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or turn it away."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.leaving():  # the client shall not send its next request on a connection that is about to end
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            if self.trace is None or scope["path"] in OPEN:
                await self.answer(scope, receive, note)
            else:
                with self.trace(scope) as end:
                    try:
                        await self.answer(scope, receive, note)
                    finally:
                        end(route_of(scope), status)
        finally:
            self.done(route_of(scope), status, time.perf_counter() - started)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask the application, or answer in its place."""
        try:
            client = self.check(scope)
        except Refused as refused:
            await self.refuse(scope, receive, send, refused, {"WWW-Authenticate": "Bearer"})
            return
        wait = 0.0 if self.rates is None or scope["path"] in OPEN else self.rates.wait(client)
        if wait:
            often = Refused(429, "too many requests", code="rate_limit_exceeded", type="rate_limit_error")
            await self.refuse(scope, receive, send, often, {"Retry-After": f"{math.ceil(wait)}"})
            return
        try:
            check_size(scope)
        except Refused as refused:
            await self.refuse(scope, receive, send, refused, {"Connection": "close"})
            return
        asks = scope["method"] == "POST" and not scope["path"].startswith(ADMIN)
        asks |= scope["path"].startswith(IN_ADDRESS)
        if asks and ((down := self.down()) or self.asking >= self.most or self.waiting() >= self.most):
            which = 2 * scope["path"].startswith("/v2/") + is_open_ended(scope)
            for message in (self.away if down else self.busy)[which]:
                await send(message)
            return
        bounded = Bounded(receive, self, asks)
        try:
            await self.app(scope, bounded, send)
        finally:
            self.asking -= bounded.counted

    def check(self, scope: Scope) -> str:
        """Return who asks. Raises Refused (401) without a right key, where there are keys."""
        client = str((scope.get("client") or ("unknown",))[0])
        if self.keys is None or scope["path"] in OPEN or scope["path"] in self.public:
            return client
        found = read_key(scope["headers"])
        right = [hmac.compare_digest(found, known) for known in self.keys]
        if not any(right):
            raise Refused(401, "this needs a key: Authorization: Bearer KEY", code="invalid_api_key")
        return found.hex()


def route_of(scope: Scope) -> str:
    """Return the route of a request as it was declared: a raw path may hold a text."""
    return str(getattr(scope.get("route"), "path", "other"))


def ready_made(refused: Refused, headers: Mapping[str, str], path: str) -> tuple[MutableMapping[str, Any], ...]:
    """Return the messages of an answer, made once."""
    body = json.dumps(refused.body(path), separators=(",", ":")).encode()
    said = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers, **refused.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in said.items()]
    return (
        {"type": "http.response.start", "status": refused.status, "headers": raw},
        {"type": "http.response.body", "body": body},
    )


def is_open_ended(scope: Scope) -> bool:
    """Whether nobody can say how much of a body still comes: the connection cannot be used for another request."""
    return any(name in (b"transfer-encoding", b"expect") for name, _ in scope["headers"])


def check_size(scope: Scope) -> None:
    """Raise Refused for headers or a stated body that are too large."""
    if len(scope["headers"]) > MOST_HEADERS:
        raise Refused(431, "too many headers")
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value) > MOST_BYTES):
            raise too_large()


def too_large() -> Refused:
    """Return the answer to a body that is too large."""
    return Refused(413, f"the body is larger than {MOST_BYTES:,} bytes", code="request_too_large")


class Bounded:
    """What receives a body, up to its most; beyond it raises Refused. A request counts once its body is there."""

    def __init__(self, receive: Receive, guard: Guard, asks: bool) -> None:
        self.receive, self.guard, self.asks = receive, guard, asks
        self.bytes = 0
        self.counted = False  # a client that sends its body slowly keeps nobody else out

    async def __call__(self) -> MutableMapping[str, Any]:
        """Receive the next part."""
        message = await self.receive()
        self.bytes += len(message.get("body", b""))
        if self.bytes > MOST_BYTES:
            raise HTTPException(413, too_large().message)  # the framework hides any other exception
        if self.asks and not self.counted and not message.get("more_body", False):
            self.guard.asking += 1
            self.counted = True
        return message
