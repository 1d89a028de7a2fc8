"""A Hub on this machine: the few addresses that huggingface_hub asks, over folders in memory, with ways to fail.

GET  /api/models/{name}/revision/{revision}     the commit and the names of the files
GET  /api/models/{name}/tree/{commit}           the files with their sizes
HEAD /{name}/resolve/{revision}/{file}          ETag, X-Repo-Commit, size
GET  /{name}/resolve/{revision}/{file}          the bytes, from `Range: bytes=N-` on
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class HubServer:
    """A Hub with some models; use it in a `with` block, which serves it at `address`."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # name -> commit -> file -> content
    branches: dict[tuple[str, str], str] = field(default_factory=dict)  # (name, branch) -> commit
    log: list[Request] = field(default_factory=list)
    status: int = 200  # answer every request with this instead
    gated: str | None = None  # the token that may read
    drops: Counter[str] = field(default_factory=Counter)  # file -> how often to hang up half-way
    address: str = ""

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Commit files to a branch and return the commit."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        self.branches[name, branch] = commit
        return commit

    def add_folder(self, name: str, folder: Path, *, branch: str = "main") -> str:
        """Commit a folder."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.add(name, files, branch=branch)

    def fetched(self) -> list[str]:
        """Return the files whose bytes were asked for, sorted."""
        return sorted(r.path.rpartition("/resolve/")[2].partition("/")[2] for r in self.log if is_download(r))

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                answer(hub, self)

            def do_GET(self) -> None:
                answer(hub, self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def is_download(request: Request) -> bool:
    return request.method == "GET" and "/resolve/" in request.path


def answer(hub: HubServer, handler: BaseHTTPRequestHandler) -> None:
    """Answer one request."""
    path = unquote(urlsplit(handler.path).path)
    token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ") or None
    hub.log.append(Request(handler.command, path, handler.headers.get("Range"), token))
    if hub.status != 200:
        return send(handler, hub.status, b"{}")
    if path.startswith("/api/models/"):
        name, kind, revision = split(path.removeprefix("/api/models/"), ("/revision/", "/tree/"))
        file = ""
    else:
        name, kind, rest = split(path.removeprefix("/"), ("/resolve/",))
        revision, _, file = rest.partition("/")
    if name not in hub.commits:
        return send(handler, 401 if token is None else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    if hub.gated is not None and token != hub.gated:
        return send(handler, 401 if token is None else 403, b"{}", {"X-Error-Code": "GatedRepo"})
    commit = revision if revision in hub.commits[name] else hub.branches.get((name, revision), "")
    if not commit:
        return send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    files = hub.commits[name][commit]
    if kind == "/revision/":
        listed = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        return send(handler, 200, json.dumps(listed).encode())
    if kind == "/tree/":
        return send(handler, 200, json.dumps([describe(file, content) for file, content in files.items()]).encode())
    if file not in files:
        return send(handler, 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    content = files[file]
    facts = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    if start:
        facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    hang_up = handler.command == "GET" and hub.drops[file] > 0
    hub.drops[file] -= hang_up
    return send(handler, 206 if start else 200, content[start:], facts, hang_up=hang_up)


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    hang_up: bool = False,
) -> None:
    """Send an answer; `hang_up` closes the connection after half of the body."""
    handler.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body[: len(body) // 2] if hang_up else body)
    handler.close_connection = handler.close_connection or hang_up


def split(path: str, marks: tuple[str, ...]) -> tuple[str, str, str]:
    """Split a path at the first mark that is in it: name, mark, rest."""
    mark = next((mark for mark in marks if mark in path), "")
    name, _, rest = path.partition(mark) if mark else (path, "", "")
    return name, mark, rest


def etag(content: bytes) -> str:
    """Return the name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe(file: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(content), "oid": etag(content)}
