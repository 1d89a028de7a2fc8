"""Our server on a free loopback port, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from lmworks.runtime.base import Runtime
from lmworks.serve.app import listen, make_app


@contextmanager
def running(folder: Path, runtime: Runtime | None = None, *, ready: bool = True) -> Iterator[str]:
    """Yield the base address of a running server; with `ready`, once the model has answered."""
    listening = listen("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(make_app(folder, runtime), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{base}/health/{'ready' if ready else 'live'}").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        yield base
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
