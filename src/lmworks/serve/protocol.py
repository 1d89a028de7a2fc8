"""HTTP as the server reads it: uvicorn's protocol over httptools, with the bounds that it does not set itself.

httptools reads a request in a small part of the time that h11 takes, which decides what a crowd that is turned away
costs; but it takes a head of any length, a request that never ends, and any number of connections.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from lmworks.base.optional import require

require("httptools", extra="serve")
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol  # noqa: E402

MOST_HEAD = 64 * 1024  # bytes before a body
MOST_RAW = 8_000_000  # of a whole request, with the lengths of its chunks and what comes after them
FILES = 100  # that the server needs beside its connections
FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
OFFER = re.compile(rb"(?i)(?<=\n)upgrade:[^\r\n]*\r\n")  # of another protocol, such as h2c
RECEIVED = 30.0  # seconds in which a request must have come in whole, counted from its first byte


def most_connections() -> int:
    """Return how many connections this process may hold: as many as it may open files, less some, and 10,000."""
    try:
        import resource
    except ImportError:  # Windows
        return 1000
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 10_000 if files == resource.RLIM_INFINITY else max(FILES, min(10_000, files - FILES))


MOST_CONNECTIONS = most_connections()


class Joined:
    """A transport that sends an answer's head with the body that follows at once: who is killed sends both or neither.

    Whoever asks for it, such as a proxy, may then ask another server; half an answer could not be taken back.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.transport, self.loop, self.head = transport, loop, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        """Send, but for a head, which waits for the end of this turn of the loop."""
        if self.head:
            head, self.head = self.head, b""
            self.transport.writelines((head, data))
        elif data.startswith(b"HTTP/"):
            self.head = data
            self.loop.call_soon(self.flush)
        else:
            self.transport.write(data)

    def flush(self) -> None:
        """Send what waits."""
        if self.head:
            self.write(b"")

    def close(self) -> None:
        """Send what waits, and close."""
        self.flush()
        self.transport.close()


def without_offer(data: bytes) -> bytes:
    """Return a head, and what follows it, without the offer to speak another protocol: nobody takes it up here.

    Java's client and `curl --http2` offer HTTP/2 with each first request; httptools then leaves its body away.
    """
    at = data.find(b"\r\n\r\n")
    end = len(data) if at < 0 else at + 2
    return OFFER.sub(b"", data[:end]) + data[end:] if b"pgrade:" in data[:end].lower() else data


class Protocol(HttpToolsProtocol):
    """One connection."""

    deadline: asyncio.TimerHandle | None = None
    taken = 0  # bytes of the request that is coming in
    began = head = whole = False  # a request began in this piece; its head is there; all of it is

    def connection_made(self, transport: Any) -> None:
        """Make room: a connection that waits for its next request goes first; where there is none, this one."""
        super().connection_made(Joined(transport, self.loop))  # type: ignore[arg-type]
        self.expect()
        if len(self.connections) > MOST_CONNECTIONS:
            others: Any = (one for one in self.connections if one is not self)
            idle = next((one for one in others if one.cycle is None or one.cycle.response_complete), self)
            if idle is self:
                self.transport.write(FULL)
            idle.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.relax()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a piece in, up to the most of a request."""
        self.began = False
        super().data_received(data if self.head and not self.whole else without_offer(data))
        self.taken = 0 if self.began or self.whole else self.taken + len(data)
        if self.taken > (MOST_RAW if self.head else MOST_HEAD) and not self.transport.is_closing():
            if self.cycle is not None and self.cycle.response_started and not self.whole:
                self.transport.close()
            else:
                self.send_400_response("The request is too large.")

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        super().on_message_begin()
        self.began, self.head, self.whole = True, False, False
        self.expect()

    def on_headers_complete(self) -> None:
        """Note that its head is there."""
        self.head = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that all of it is."""
        self.whole = True
        self.relax()
        super().on_message_complete()

    def expect(self) -> None:
        """Give the client a time to send."""
        self.relax()
        self.deadline = self.loop.call_later(RECEIVED, self.hang_up)

    def relax(self) -> None:
        """Wait for nothing."""
        if self.deadline is not None:
            self.deadline.cancel()

    def hang_up(self) -> None:
        """End a connection whose client does not send what it began."""
        if not self.transport.is_closing():
            self.transport.close()
