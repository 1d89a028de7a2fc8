"""A database for feedback: its URL, connections whose commits last, and what its errors mean to us."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError, LmworksError, from_os_error
from lmworks.base.optional import require

require("sqlalchemy", extra="feedback")
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url  # noqa: E402
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError  # noqa: E402

SECONDS = 5.0  # that a connection, a lock or a statement of the server may take
FULL = ("SQLITE_FULL", "53100")  # and what a disk that takes no more looks like to SQLite:
UNWRITTEN = ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_TRUNCATE")


class Away(LmworksError):
    """The database cannot be asked just now."""


class DiskFull(LmworksError):
    """The database's disk takes no more."""


def read_url(place: str | Path) -> URL:
    """Return the URL of a store: a file's path, sqlite:///FILE, or postgresql://…. Raises InputError."""
    expected = "FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    if "://" not in str(place):
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(str(place))
    except ArgumentError:
        raise InputError("this is no URL of a database", expected=expected) from None  # it may hold a password
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        require("psycopg", extra="feedback")
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite":
        raise InputError("feedback is not kept in such a database", found=url.drivername, expected=expected)
    if url.database in (None, "", ":memory:"):
        raise InputError("feedback is kept in a file", found="a database in memory", expected=expected)
    return url


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
    engine = create_engine(
        url, pool_pre_ping=True, hide_parameters=True,
        connect_args={"connect_timeout": max(2, int(min(wait, SECONDS))), "tcp_user_timeout": limit,
                      "prepare_threshold": None} | dict(url.query),
    )  # fmt: skip

    @event.listens_for(engine, "connect")
    def bound(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {limit}")
        connection.commit()

    return engine


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
