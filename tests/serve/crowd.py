"""A crowd that asks at a rate, whatever the server does, and costs next to nothing: ready-made bytes over bare sockets.

    python crowd.py HOST PORT PATH RATE SECONDS CONNECTIONS < texts     RATE 0: each connection asks again when answered

Prints JSON: how many were sent, answered by status, the answers of the last part of the time, and its own processor
time: what the crowd takes of the machine is known, and kept apart from what the server takes.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections import Counter, deque
from typing import Any

TICK = 0.004  # seconds between two looks at what is due
SETTLED = 0.2  # of the time, until the server is in its stride: answers after it are counted for the rate


class Asker(asyncio.Protocol):
    """A connection, kept as long as the server keeps it."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd, self.rest, self.asked = crowd, b"", False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.crowd.free.append(self)

    def ask(self, request: bytes) -> None:
        self.asked = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        head, blank, body = self.rest.partition(b"\r\n\r\n")
        if not blank:
            return
        low = head.lower()
        start = low.index(b"content-length:") + 15
        end = low.find(b"\r\n", start)
        if len(body) < int(low[start : end if end > 0 else None]):
            return
        self.rest, self.asked = b"", False
        self.crowd.note(int(head[9:12]), b"retry-after" in low)
        if b"connection: close" in low:
            self.transport.close()
        else:
            self.crowd.free.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self.asked:
            self.crowd.note(0, True)
        if self in self.crowd.free:
            self.crowd.free.remove(self)
        self.crowd.open -= 1


class Crowd:
    """All of them."""

    def __init__(self, rate: float, seconds: float, connections: int, requests: list[bytes]) -> None:
        self.rate, self.seconds, self.most, self.requests = rate, seconds, connections, requests
        self.free: deque[Asker] = deque()
        self.statuses: Counter[int] = Counter()
        self.open = self.sent = self.late = self.without_retry = self.settled = 0
        self.settling = 0.0

    def note(self, status: int, retry: bool) -> None:
        self.statuses[status] += 1
        self.settled += status == 200 and time.perf_counter() > self.settling
        self.without_retry += status in (429, 503) and not retry

    async def run(self, host: str, port: int) -> dict[str, Any]:
        loop, draw = asyncio.get_running_loop(), random.Random(0)
        for _ in range(min(self.most, 64) if self.rate else self.most):
            self.open += 1
            await loop.create_connection(lambda: Asker(self), host, port)
        started = due = time.perf_counter()
        self.settling = started + SETTLED * self.seconds
        used = resource.getrusage(resource.RUSAGE_SELF)
        while (now := time.perf_counter()) < started + self.seconds:
            while self.free and not self.rate:
                self.send()
            while self.rate and due <= now:
                due += draw.expovariate(self.rate)
                if self.free:
                    self.send()
                elif self.open < self.most:
                    self.open += 1
                    await loop.create_connection(lambda: Asker(self), host, port)
                    self.send()
                else:
                    self.late += 1
            await asyncio.sleep(TICK)
        after = resource.getrusage(resource.RUSAGE_SELF)
        answered = self.settled
        until = time.perf_counter() + 30
        while sum(self.statuses.values()) < self.sent and time.perf_counter() < until:
            await asyncio.sleep(0.05)
        return {
            "sent": self.sent, "statuses": dict(self.statuses), "unanswered": self.sent - sum(self.statuses.values()),
            "without_retry_after": self.without_retry, "not_sent": self.late, "connections": self.open,
            "answers_per_second": answered / (self.seconds * (1 - SETTLED)),
            "asked_per_second": self.sent / self.seconds,
            "processor": (after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime) / self.seconds,
        }  # fmt: skip

    def send(self) -> None:
        self.free.popleft().ask(self.requests[self.sent % len(self.requests)])
        self.sent += 1


def to_request(path: str, text: str) -> bytes:
    """Return the bytes of a request."""
    body = json.dumps({"text": text}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


if __name__ == "__main__":
    host, port, path, rate, seconds, connections = sys.argv[1:]
    texts = [to_request(path, line.strip()) for line in sys.stdin if line.strip()]
    crowd = Crowd(float(rate), float(seconds), int(connections), texts)
    print(json.dumps(asyncio.run(crowd.run(host, int(port)))))
