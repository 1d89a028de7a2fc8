"""Chromium over a page's folder, every host but 127.0.0.1 unreachable, and a static server for the folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect

from lmworks.export.verify_js import CHROMIUM_FLAGS, find_chromium
from lmworks.export.web import TYPES, headers_for

DONE = 60_000  # milliseconds
SIZES = ((390, 844), (1280, 800))  # a phone and a desktop
HARMLESS = ("certificate.json", "404")  # a folder that was never verified has no certificate
expect.set_options(timeout=DONE)


def launch(playwright: Playwright, *more: str, without: tuple[str, ...] = ()) -> Browser:
    """Start Chromium with the flags that `verify` uses, which make every host but 127.0.0.1 unreachable."""
    flags = [flag for flag in CHROMIUM_FLAGS if flag not in ("--headless", *without)]
    return playwright.chromium.launch(executable_path=str(find_chromium()), args=[*flags, *more])


class Visit:
    """A page in a browser context of its own, with everything that it asked for and complained about."""

    def __init__(self, context: BrowserContext) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.hear(message.text, message.location))

    def hear(self, text: str, place) -> None:
        """Keep an error, unless it is that of a missing certificate."""
        if not (HARMLESS[1] in text and place["url"].endswith(HARMLESS[0])):
            self.complaints.append(text)

    def open(self, address: str) -> Page:
        """Go to the page and wait until it is built."""
        self.page.goto(address if "://" in address and address.endswith(".html") else f"{address}/")
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self.page


def choose(page: Page, value: str) -> None:
    """Choose a precision or a device."""
    page.check(f'input[value="{value}"]')


def workers(page: Page, expected: int) -> int:
    """Return how many workers of ours live, waiting a little for `expected`."""
    for _ in range(100):
        found = sum("web/worker.js" in worker.url for worker in page.workers)
        if found == expected:
            break
        page.wait_for_timeout(50)
    return found


def shoot(page: Page, name: str, tmp_path: Path) -> None:
    """Take pictures at both sizes, light and dark, and see that nothing sticks out."""
    folder = Path(os.environ.get("LMWORKS_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            path = folder / f"{name}-{width}x{height}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
            corner = Image.open(path).convert("L").getpixel((2, 2))
            assert (corner > 200) == (scheme == "light"), "the page's own colour follows the scheme"


class Quiet(ThreadingHTTPServer):
    """Says nothing when a browser hangs up."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass


@contextmanager
def served(folder: Path, *, headers: bool = True) -> Iterator[str]:
    """Yield the address of a folder; what is in it is read anew for each request."""
    with serving(folder, headers=headers) as (address, _):
        yield address


@contextmanager
def serving(folder: Path, *, headers: bool = True) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """Yield the address and the server, for tests that end it; without `headers`, as a host that knows none of ours."""

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = TYPES

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def end_headers(self) -> None:
            address = urlsplit(self.path)
            sent = headers_for(Path(address.path), versioned="v=" in address.query) if headers else {}
            for name, value in sent.items():
                if name != "Content-Type":
                    self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()
