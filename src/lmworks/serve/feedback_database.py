"""A database for feedback: its URL, connections whose commits last, and what its errors mean to us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, LmworksError, from_os_error
from lmworks.base.optional import require

require("sqlalchemy", extra="feedback")
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url  # noqa: E402
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError  # noqa: E402

EXPECTED = "FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
SECONDS = 5.0  # that a connection, a lock or a statement of the server may take
FULL = ("SQLITE_FULL", "53100")  # and what a disk that takes no more looks like to SQLite:
UNWRITTEN = ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_TRUNCATE")


class Away(LmworksError):
    """The database cannot be asked just now."""


class DiskFull(LmworksError):
    """The database's disk takes no more."""


def read_url(place: str | Path) -> URL:
    """Return the URL of a store: a file's path, sqlite:///FILE, or postgresql://…. Raises InputError."""
    if "://" not in str(place):
        return URL.create("sqlite", database=str(place))
    with no_url():
        url = make_url(str(place))
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        require("psycopg", extra="feedback")
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite":
        raise InputError("feedback is not kept in such a database", found=url.drivername, expected=EXPECTED)
    if url.database in (None, "", ":memory:"):
        raise InputError("feedback is kept in a file", found="a database in memory", expected=EXPECTED)
    if url.host or "\0" in str(url.database):
        raise InputError("this names no file of feedback", expected=EXPECTED)
    if url.query:
        raise InputError("a file of feedback has no options", found=", ".join(url.query), expected=EXPECTED)
    return url


@contextmanager
def no_url() -> Iterator[None]:
    """Raise InputError for what is no URL; it is not shown, as it may hold a password."""
    try:
        yield
    except (ArgumentError, ValueError):
        raise InputError("this is no URL of a database", expected=EXPECTED) from None


def show_url(url: URL) -> str:
    """Return a URL for people, without a password, and without options, which may be one."""
    query = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(drivername=url.get_backend_name(), query=query).render_as_string(hide_password=True)


def identity_of(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of its name; None where there is none."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def make_private(file: Path) -> None:
    """Make a file that only its owner reads, as it will hold people's texts. Raises InputError."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_RDONLY, 0o600))
    except OSError as error:
        raise from_os_error(error, "the feedback store cannot be opened") from None


def open_engine(url: URL, seconds: float | None, *, create: bool) -> Engine:
    """Return an engine whose commits are on the disk when they return."""
    wait = seconds or 60.0
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": wait, "isolation_level": None})

        @event.listens_for(engine, "connect")
        def set_up(connection: Any, _: Any) -> None:
            for pragma in (*(("journal_mode=WAL",) if create else ()), "synchronous=FULL", "foreign_keys=ON",
                           "secure_delete=ON"):  # what is forgotten is overwritten  # fmt: skip
                connection.execute(f"PRAGMA {pragma}")

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            reads = connection.get_execution_options().get("reads")
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

        return engine
    limit = int(wait * 1000)
    ours = {"connect_timeout": max(2, int(min(wait, SECONDS))), "tcp_user_timeout": limit, "prepare_threshold": None}
    ours = {name: value for name, value in ours.items() if name not in url.query}
    with no_url():
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=ours)

    @event.listens_for(engine, "connect")
    def bound(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {limit}")
        connection.commit()

    return engine


def is_silent(engine: Engine) -> bool:
    """Whether no PostgreSQL answers, or one that takes nobody yet; one that refuses us, as for a password, does."""
    if engine.dialect.name != "postgresql":
        return False
    from psycopg import Error, conninfo, pq

    words = {"connect_timeout": int(SECONDS), **engine.dialect.create_connect_args(engine.url)[1], "context": None}
    try:
        found = pq.PGconn.ping(conninfo.make_conninfo(**words).encode())
    except Error:
        return False
    return found in (pq.Ping.NO_RESPONSE, pq.Ping.REJECT)


def translate(error: SQLAlchemyError, name: str) -> LmworksError:
    """Return our error for one of a database."""
    cause = getattr(error, "orig", None)
    code = str(getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None) or "")
    lines = str(cause or error).strip().splitlines()
    found = lines[0][:300] if lines else type(error).__name__
    if code in FULL or code.startswith(UNWRITTEN):
        return DiskFull("the disk of the feedback store is full", where=name, found=found, fix="free some space there")
    if isinstance(error, IntegrityError | DataError):
        return LmworksError("the feedback store refuses these rows", where=name, found=type(cause).__name__)
    if isinstance(error, DBAPIError):
        return Away("the feedback store is away", where=name, found=found)
    return Away("the feedback store cannot be asked", where=name, found=type(error).__name__)


def storable(given: str) -> str:
    """Return a text as both databases can keep it: with U+FFFD for NUL."""
    return given.replace("\0", "\ufffd")
