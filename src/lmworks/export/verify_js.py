"""Run the self-test where a model is used from JavaScript: in Node, and in Chromium through the model's own page.

Nothing outside this machine is reached: Chromium is told that every host but 127.0.0.1 does not exist.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lmworks.base.errors import LmworksError
from lmworks.base.threads import thread_count
from lmworks.export.vendor import INSTALL, LIBRARY
from lmworks.export.web import ASSETS, find_served, headers_for

HERE = Path(__file__).parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
CHROMIUM_APPS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
BROWSER_FIX = "install Chromium (on Debian: apt-get install chromium), or name it: LMWORKS_CHROMIUM=/path/to/chromium"
ASKED = ("task", "options", "items", "prompts", "texts")
NODE_FIX = "install Node.js 20 or later, or name it: LMWORKS_NODE=/path/to/node"


class Absent(Exception):
    """A runtime that is not installed; `install` is the line that gets it."""

    def __init__(self, reason: str, install: str) -> None:
        super().__init__(reason)
        self.reason, self.install = reason, install


class Broken(LmworksError):
    """A runtime that is installed and gave no answer."""


Given = dict[str, Any]  # what came back for one dtype: answers, texts, or error


def find_node(node: str | Path | None = None) -> Path:
    """Return Node: the argument, LMWORKS_NODE, or what PATH finds. Raises Absent."""
    named = node or os.environ.get("LMWORKS_NODE")
    found = shutil.which(str(named or "node"))
    if found is None:
        raise Absent(f"{named or 'node'} was not found", NODE_FIX)
    return Path(found)


def find_modules(node: Path, modules: str | Path | None = None) -> Path:
    """Return the first node_modules that holds transformers.js.

    Searched: the argument, LMWORKS_NODE_MODULES, the package's web folder, the working folder, Node's global modules.
    Raises Absent.
    """
    named = modules or os.environ.get("LMWORKS_NODE_MODULES")
    places = [Path(named)] if named else [ASSETS / "node_modules", Path.cwd() / "node_modules"]
    if not named:
        places.append(node.resolve().parent.parent / "lib" / "node_modules")
    for place in places:
        if (place / LIBRARY / "package.json").is_file():
            return place.resolve()
    raise Absent(
        f"the npm package {LIBRARY} was not found in {', '.join(map(str, places))}",
        f"{' '.join(INSTALL)} --prefix {ASSETS}   (or name a folder that has it: LMWORKS_NODE_MODULES=…/node_modules)",
    )


def find_chromium(chromium: str | Path | None = None) -> Path:
    """Return Chromium or a relative: the argument, LMWORKS_CHROMIUM, PATH, the usual places. Raises Absent."""
    named = chromium or os.environ.get("LMWORKS_CHROMIUM")
    for name in (str(named),) if named else (*CHROMIUM, *CHROMIUM_APPS):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise Absent(f"{named or 'chromium'} was not found", BROWSER_FIX)


def ask_node(
    folder: Path,
    selftest: Mapping[str, Any],
    dtypes: Sequence[str],
    *,
    node: str | Path | None = None,
    modules: str | Path | None = None,
    timeout: float = 600,
) -> dict[str, Given]:
    """Answer what `selftest` asks (prompts, or the items of a task) in Node, one process a dtype. Raises Absent."""
    program = find_node(node)
    where = find_modules(program, modules)
    given = {}
    for dtype in dtypes:
        work = {
            "modules": str(where), "folder": str(folder.resolve()), "dtype": dtype, "threads": thread_count(),
            **{name: selftest[name] for name in ASKED if name in selftest},
        }  # fmt: skip
        given[dtype] = run_node([str(program), str(HERE / "verify_node.mjs")], json.dumps(work), timeout)
    return given


def run_node(command: list[str], work: str, timeout: float) -> Given:
    """Run Node once; a crash or a hang is an error in the answer."""
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"Node gave no answer in {timeout:.0f} s"}
    try:
        value = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"Node failed: {last[:300]}"}
    return value if isinstance(value, dict) else {"error": "Node gave no answer"}


def ask_browser(
    folder: Path,
    selftest: Mapping[str, Any],
    dtypes: Sequence[str],
    *,
    device: str = "wasm",
    threads: int = 1,
    chromium: str | Path | None = None,
    timeout: float = 600,
) -> dict[str, Given]:
    """Answer what `selftest` asks in headless Chromium, by the folder's own worker and library.

    `device`: "wasm" with so many `threads`, or "webgpu". Raises Absent and Broken.
    """
    program = find_chromium(chromium)
    asked = {name: selftest[name] for name in ASKED if name in selftest}
    work = {"dtypes": list(dtypes), "device": device, "threads": threads, "version": "", **asked}
    flags = [flag for flag in CHROMIUM_FLAGS if device == "wasm" or flag != "--disable-gpu"]
    flags += [] if device == "wasm" else ["--enable-unsafe-webgpu"]
    with CheckServer(folder, work) as server, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        address = f"http://127.0.0.1:{server.server_port}/.check/page"
        command = [str(program), *flags, f"--user-data-dir={profile}", address]
        log = Path(profile) / "stderr.txt"
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            wait(server, process, timeout)
        finally:
            stop(process)
        if server.result is None:
            last = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()][-2:]
            raise Broken(f"Chromium gave no answer in {timeout:.0f} s or ended early: {' | '.join(last)[:400]}")
    if "absent" in server.result:
        raise Absent(str(server.result["absent"]), BROWSER_FIX)
    if "error" in server.result:
        raise Broken(f"the check page failed: {server.result['error']}")
    return server.result


def wait(server: CheckServer, process: subprocess.Popen[bytes], timeout: float) -> None:
    """Return when the result is there, the browser is gone, or the time is up."""
    waited = 0.0
    while waited < timeout and not server.done.wait(0.2):
        waited += 0.2
        if process.poll() is not None:
            server.done.wait(1)
            return


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the browser and everything it started: it leads a process group of its own."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)


class CheckServer(ThreadingHTTPServer):
    """A model folder on a free loopback port, with the check page, its work, and a place for its result."""

    daemon_threads = True

    def __init__(self, folder: Path, work: Mapping[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), CheckHandler)
        self.folder, self.work = folder, json.dumps(work).encode()
        self.result: dict[str, Given] | None = None
        self.done = threading.Event()

    def __enter__(self) -> CheckServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet when the browser hangs up; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class CheckHandler(BaseHTTPRequestHandler):
    """GET a file of the folder or of the check; POST the result."""

    server: CheckServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file with the headers that `lmworks serve` sends."""
        address = urlsplit(self.path)
        if address.path == "/.check/work":
            self.reply(200, self.server.work, headers_for(Path("work.json"), versioned=False))
            return
        checking = address.path == "/.check/page"
        found = HERE / "check.html" if checking else find_served(self.server.folder, unquote(address.path))
        if found is None:
            self.reply(404, b"", headers_for(Path("none.txt"), versioned=False))
            return
        headers = headers_for(found, versioned=False)
        if checking:  # its script is in the page
            headers["Content-Security-Policy"] = headers["Content-Security-Policy"].replace(
                "'wasm-unsafe-eval'", "'wasm-unsafe-eval' 'unsafe-inline'"
            )
        self.reply(200, found.read_bytes(), headers)

    def do_POST(self) -> None:
        """Take the result."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(204, b"", {})
        self.server.result = json.loads(body)
        self.server.done.set()

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
