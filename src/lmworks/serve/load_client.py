"""A client that is light enough to measure a server with: HTTP/1.1 by h11 over asyncio's streams.

A request costs the client about 0.2 ms of processor time, an eighth of what httpx takes: on one machine a heavy client
would be measured, not the server. Times are of `time.perf_counter`; an answer is read to its end, a stream's pieces are
timed as they come.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from lmworks.base.errors import InputError
from lmworks.base.optional import require

MOST_BYTES = 1 << 20  # read at once
AGENT = "lmworks-loadtest"


@dataclass(frozen=True)
class Target:
    """A server: where it is, and who asks."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""  # of every path
    key: str | None = None

    @property
    def url(self) -> str:
        """The address for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.prefix}"


def read_url(url: str, key: str | None = None) -> Target:
    """Return the target of "http://host:port", also without "http://". Raises InputError."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise InputError("this is no address of a server", found=f"{url}: {error}",
                         expected="such as http://127.0.0.1:8000") from None  # fmt: skip
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise InputError("this is no address of a server", found=url, expected="such as http://127.0.0.1:8000")
    return Target(parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/"), key)


@dataclass
class Answer:
    """What came back, and when: seconds on the clock of `perf_counter`."""

    due: float  # when it was meant to be sent; of a closed loop, when it was
    sent: float = 0.0
    first: float | None = None  # the first piece of a stream's text
    ended: float = 0.0
    status: int = 0  # 0: none came
    wait: float = 0.0  # seconds that Retry-After asks for
    error: str | None = None  # its kind
    tokens: int = 0  # that were written
    body: bytes = field(default=b"", repr=False)  # of what is no stream

    @property
    def latency(self) -> float:
        """Seconds from the moment it was due to the end of the answer."""
        return self.ended - self.due

    def json(self) -> Any:
        """Return the body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Connection:
    """One connection, kept while the server keeps it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.h11 = require("h11", extra="serve")
        self.http: Any = None
        self.fresh = True  # no answer has come on it yet

    async def ask(self, method: str, path: str, body: Any = None, *, due: float | None = None,
                  seconds: float = 60.0) -> Answer:  # fmt: skip
        """Send a request and read the answer; whatever goes wrong is the answer's `error`."""
        now = perf_counter()
        answer = Answer(now if due is None else due, now)
        try:
            async with asyncio.timeout(seconds):
                await self.attempt(answer, method, path, body)
        except (OSError, self.h11.ProtocolError) as error:
            self.close()
            refused = isinstance(error, ConnectionRefusedError)
            late = isinstance(error, TimeoutError)  # which is an OSError
            lost = "connection refused" if refused else "cut off" if answer.status else "connection lost"
            answer.error = "timeout" if late else lost
        answer.ended = perf_counter()
        if answer.error is None and not 200 <= answer.status < 300:
            answer.error = kind_of(answer)
        return answer

    async def attempt(self, answer: Answer, method: str, path: str, body: Any) -> None:
        """Send and receive; a connection that the server closed since its last answer is made anew once."""
        if self.http is None:
            await self.open()
        kept = not self.fresh
        try:
            await self.exchange(answer, method, path, body)
        except (ConnectionError, self.h11.ProtocolError):
            if not kept or answer.status:
                raise
            self.close()
            await self.open()
            await self.exchange(answer, method, path, body)

    async def open(self) -> None:
        """Connect."""
        target = self.target
        context = ssl.create_default_context() if target.secure else None
        self.reader, self.writer = await asyncio.open_connection(target.host, target.port, ssl=context)
        self.http, self.fresh = self.h11.Connection(self.h11.CLIENT), True

    def close(self) -> None:
        """Hang up."""
        if self.http is not None:
            self.writer.close()
            self.http = None

    async def exchange(self, answer: Answer, method: str, path: str, body: Any) -> None:
        """Send one request on this connection and read its answer."""
        target, h11, http = self.target, self.h11, self.http
        data = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", f"{target.host}:{target.port}"), ("User-Agent", AGENT), ("Accept", "*/*")]
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        if target.key is not None:
            headers.append(("Authorization", f"Bearer {target.key}"))
        request = http.send(h11.Request(method=method, target=target.prefix + path, headers=headers))
        self.writer.write(request + (http.send(h11.Data(data=data)) if data else b"") + http.send(h11.EndOfMessage()))
        await self.writer.drain()
        events: Events | None = None
        parts: list[bytes] = []
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await self.reader.read(MOST_BYTES))
            elif isinstance(event, h11.Response):
                answer.status = event.status_code
                given = dict(event.headers)
                answer.wait = seconds_of(given.get(b"retry-after", b""))
                if given.get(b"content-type", b"").startswith(b"text/event-stream"):
                    events = Events(answer)
            elif isinstance(event, h11.Data):
                if events is None:
                    parts.append(bytes(event.data))
                else:
                    events.take(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError
        answer.body, self.fresh = b"".join(parts), False
        if events is not None and not events.done and answer.error is None:
            answer.error = "cut off"
        if http.our_state is h11.MUST_CLOSE or http.their_state is not h11.DONE:
            self.close()
        else:
            http.start_next_cycle()


class Events:
    """Reads server-sent events of OpenAI's routes and of /generate: when the text began, and how many tokens it has."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.rest, self.done = answer, b"", False

    def take(self, data: bytes) -> None:
        """Take in what came."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self.read(line[5:].strip())

    def read(self, data: bytes) -> None:
        """Read one event."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            return
        if not isinstance(event, dict):
            return
        answer = self.answer
        if event.get("error"):
            answer.error = "error in the stream"
        elif event.get("done"):
            self.done, answer.tokens = True, len(event.get("tokens") or ()) or answer.tokens
        elif usage := event.get("usage"):
            answer.tokens = usage.get("completion_tokens") or answer.tokens
        self.done |= any(choice.get("finish_reason") for choice in event.get("choices") or ())  # some say no [DONE]
        if not event.get("done") and (pieces := count_pieces(event)):
            answer.first = answer.first or perf_counter()
            answer.tokens += pieces  # a piece is about a token, until the count is told


def count_pieces(event: dict[str, Any]) -> int:
    """Return how many pieces of text an event brings."""
    if "choices" in event:
        said = (choice.get("text") or (choice.get("delta") or {}).get("content") for choice in event["choices"] or ())
        return sum(map(bool, said))
    return int(bool(event.get("text")))


def kind_of(answer: Answer) -> str:
    """Return what a refusal is called: its status, and the code or type that the server gave it."""
    problem = answer.json()
    problem = problem.get("error") if isinstance(problem, dict) else None
    code = (problem.get("code") or problem.get("type")) if isinstance(problem, dict) else None
    return f"{answer.status} {code}" if isinstance(code, str | int) else str(answer.status)


def message_of(answer: Answer) -> str:
    """Return what the server said was wrong."""
    said = answer.json()
    problem = (said.get("error") or said.get("detail") or said.get("message")) if isinstance(said, dict) else None
    if isinstance(problem, dict):
        problem = problem.get("message")
    return str(problem or answer.error)[:300]


def seconds_of(text: bytes) -> float:
    """Return the seconds of a Retry-After; a date counts as none."""
    return float(text) if text.isdigit() else 0.0
