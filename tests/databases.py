"""Databases to keep feedback in: a file of SQLite, and a PostgreSQL of our own on loopback, that stops and starts."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

BIN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
NAMES = itertools.count()


class Sqlite:
    """A file; it is away when it has been moved."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, f"sqlite:///{path}"

    def ask(self, question: str) -> list[Any]:
        """Return rows, asked for by Python's own sqlite3."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection:
            return connection.execute(question).fetchall()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Nobody need write to connect."""
        yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody write."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.execute("ROLLBACK")

    def stop(self) -> None:
        """Take it away."""
        self.path.rename(self.path.with_suffix(".away"))

    def start(self) -> None:
        """Bring it back."""
        self.path.with_suffix(".away").rename(self.path)


class Postgres:
    """A database of a server that we started."""

    kind = "postgresql"

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.url = f"postgresql://lmworks@127.0.0.1:{server.port}/{name}"
        self.held: psycopg.Connection[Any] | None = None

    def ask(self, question: str) -> list[Any]:
        """Return rows, asked for by psycopg itself."""
        if self.held is not None:
            return self.held.execute(question).fetchall()  # type: ignore[arg-type]
        with self.connected():
            return self.ask(question)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Stay connected: on a full disk nobody else can be."""
        with self.server.connect(self.name) as self.held:
            try:
                yield
            finally:
                self.held = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody write."""
        with self.server.connect(self.name, autocommit=False) as connection:
            connection.execute("LOCK TABLE lmworks_feedback, lmworks_answers")
            yield
            connection.rollback()

    def stop(self) -> None:
        """Stop the server."""
        self.server.stop()

    def start(self) -> None:
        """Start it again."""
        self.server.start()


class Server:
    """PostgreSQL as user postgres, since it refuses root, in a folder of its own."""

    def __init__(self) -> None:
        assert BIN, "PostgreSQL is not installed: apt-get install postgresql"
        self.bin = BIN[-1]
        self.folder = Path(tempfile.mkdtemp(prefix="lmworks-postgres-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.give(self.folder)
        self.run("initdb", "--auth=trust", "--username=lmworks", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8",
                 f"--pgdata={self.folder}/data")  # fmt: skip
        self.start()

    def give(self, folder: Path) -> None:
        """Make a folder that of the user."""
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")

    def words(self, name: str, *options: str) -> list[str]:
        """Return a command of PostgreSQL's, for the right user."""
        root = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=INT"]
        return [*(root if os.geteuid() == 0 else []), str(self.bin / name), *options]

    def run(self, name: str, *options: str) -> None:
        """Run a command to its end."""
        done = subprocess.run(self.words(name, *options), capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            options = ("-D", f"{self.folder}/data", "-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder),
                       "-c", "fsync=off")  # what is killed is our server, not the machine  # fmt: skip
            self.process = subprocess.Popen(
                self.words("postgres", *options), stdout=log, stderr=log, cwd=self.folder
            )  # fmt: skip
        for _ in range(600):
            with contextlib.suppress(psycopg.OperationalError), self.connect("postgres"):
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop at once: who is connected is cut off."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def close(self) -> None:
        """Stop, and leave nothing."""
        if self.process is not None and self.process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def connect(self, name: str, *, autocommit: bool = True) -> psycopg.Connection[Any]:
        """Connect to a database."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="lmworks", dbname=name, autocommit=autocommit, connect_timeout=5
        )

    def make(self, *more: str) -> Postgres:
        """Make a new database."""
        name = f"feedback{next(NAMES)}"
        with self.connect("postgres") as connection:
            connection.execute(" ".join([f"CREATE DATABASE {name}", *more]))  # type: ignore[arg-type]
        return Postgres(self, name)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Yield a disk that is soon full; only root may mount it."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no disk may be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
