"""Our server on a free loopback port, in a thread; its engine is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lmworks.serve.app import configure, listen, make_app
from lmworks.serve.service import describe
from lmworks.serve.supervisor import Supervisor


@dataclass
class Running:
    """A server, by its address and from the inside."""

    base: str
    supervisor: Supervisor
    service: Any = None

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """POST a body as JSON."""
        return httpx.post(f"{self.base}{path}", json=body, timeout=60, **more)

    def wait(self, ready: bool = True, seconds: float = 60) -> float:
        """Wait until the server is ready, or not; return how long that took."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if (httpx.get(f"{self.base}/health/ready").status_code == 200) is ready:
                return time.monotonic() - started
            time.sleep(0.02)
        raise AssertionError(f"ready is not {ready} after {seconds} s")


@contextmanager
def server(
    *folders: Path, ready: bool = True, settings: dict[str, Any] | None = None, **options: Any
) -> Iterator[Running]:
    """Yield a running server of these folders; with `ready`, once it answers. `settings` are those of the models."""
    listening = listen("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    app = make_app([describe(folder, **(settings or {})) for folder in folders], **options)
    uvicorn_server = uvicorn.Server(configure(app, grace=1))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    running = Running(base, app.state.service.supervisor, app.state.service)
    try:
        for _ in range(1000):
            try:
                httpx.get(f"{base}/health/live")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        if ready:
            running.wait()
        yield running
    finally:
        uvicorn_server.should_exit = True
        thread.join(10)
        listening.close()


def start(*options: str, ready: bool = True) -> tuple[subprocess.Popen[str], str]:
    """Start `lmworks serve` as a process; return it with its address, with `ready` once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lmworks", "serve", *options, "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "http://127.0.0.1:" in line, line
    base = line.split(" at ")[1].split("/ ")[0].rstrip("/")
    until = time.monotonic() + 60
    while ready:
        try:
            if httpx.get(f"{base}/health/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "never ready"
        time.sleep(0.05)
    return process, base


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Yield the base address of a server for the page of a folder; its model is not loaded before it is asked."""
    with server(folder, ready=False, settings={"warm": False}) as one:
        yield one.base


def slack() -> float:
    """Return how much longer things may take because others use the machine as well; 1 on a quiet one."""
    return max(1.0, 3 * (os.getloadavg()[0] - 4) / (os.cpu_count() or 1))
