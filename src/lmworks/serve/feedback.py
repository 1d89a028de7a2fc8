"""Where answers, and what people said of them, are kept: SQLite in a file, or PostgreSQL by its URL.

    lmworks_answers     id, model, asked, text, pair, label, score   what was asked, and what the model said
    lmworks_feedback    id, answer, label, received, state           what is right: new, accepted or rejected
    lmworks_schema      version

Times are seconds since 1970. An answer's id cannot be guessed; that of feedback is made of the answer's and the label,
and of a text that nobody asked it is made of the text: who sends the same twice, as after an answer that was lost,
changes nothing. Both databases hold the same rows.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.optional import require
from lmworks.serve.feedback_database import (
    Away,
    DiskFull,
    identity_of,
    is_silent,
    make_private,
    open_engine,
    read_url,
    show_url,
    storable,
    translate,
)

require("sqlalchemy", extra="feedback")
from sqlalchemy import (  # noqa: E402
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    delete,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

VERSION = 1
STATES = ("new", "accepted", "rejected")
LOCK = 20_261_121  # of PostgreSQL, while the tables are made
AT_ONCE = 500  # rows of a statement

METADATA = MetaData()
ANSWERS = Table(
    "lmworks_answers", METADATA,
    Column("id", Text, primary_key=True), Column("model", Text, nullable=False),
    Column("asked", Double, nullable=False), Column("text", Text, nullable=False), Column("pair", Text),
    Column("label", Text), Column("score", Double),
)  # fmt: skip
FEEDBACK = Table(
    "lmworks_feedback", METADATA,
    Column("id", Text, primary_key=True), Column("answer", Text, ForeignKey(ANSWERS.c.id), nullable=False),
    Column("label", Text, nullable=False), Column("received", Double, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('new', 'accepted', 'rejected')"), nullable=False),
)  # fmt: skip
SCHEMA = Table("lmworks_schema", METADATA, Column("version", Integer, nullable=False))
Row = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """A piece of feedback that is kept."""

    id: str
    answer: Row
    label: str
    fresh: bool  # it was not there before

    @property
    def agrees(self) -> bool | None:
        """Whether the model had said the same; None where it had said nothing."""
        return None if self.answer["label"] is None else self.answer["label"] == self.label


class Store:
    """One database. With `create` its tables are made where they are missing; else it must be there."""

    def __init__(
        self, place: str | Path, *, create: bool = False, seconds: float | None = None, later: bool = False
    ) -> None:  # fmt: skip
        """`seconds` bounds what a statement may take. Raises InputError for a database that cannot be opened.

        With `later` it may be opened later (`made` says whether it is) where no PostgreSQL answers.
        """
        self.url = read_url(place)
        self.name, self.made = show_url(self.url), False
        self.file = Path(str(self.url.database)) if self.url.get_backend_name() == "sqlite" else None
        self.create, self.identity = create, None if self.file is None else identity_of(self.file)
        if self.file is not None and self.identity is None and not create:
            raise InputError("there is no such file of feedback", where=str(self.file))
        self.engine = open_engine(self.url, seconds, create=create)
        try:
            if create and self.file is not None:
                make_private(self.file)
            self.prepare()
        except LmworksError as error:
            if later and isinstance(error, Away) and is_silent(self.engine):
                return
            self.close()
            if not isinstance(error, Away | DiskFull):
                raise
            raise InputError("the feedback store cannot be opened", where=self.name, found=error.found) from None

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def prepare(self) -> None:
        """Make the tables, or look whether they are ours."""
        with self.transaction(reads=not self.create) as connection:
            if self.create:
                if self.file is None:  # of several that start at once one makes them
                    connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
                METADATA.create_all(connection)
            elif not inspect(connection).has_table(SCHEMA.name):
                raise InputError("this database holds no feedback", where=self.name,
                                 fix="lmworks serve MODEL --feedback URL makes one")  # fmt: skip
            version = connection.execute(select(SCHEMA.c.version)).scalar()
            if version is None and self.create:
                version = VERSION
                connection.execute(insert(SCHEMA).values(version=VERSION))
            if version != VERSION:
                raise FormatError("another version of lmworks made this feedback store", where=self.name,
                                  found=f"version {version}", expected=f"version {VERSION}")  # fmt: skip
        self.identity, self.made = None if self.file is None else identity_of(self.file), True

    @contextmanager
    def begin(self, *, reads: bool = False) -> Iterator[Connection]:
        """Yield a connection in a transaction, committed at the end; one that `reads` sees one moment of the database.

        Raises Away, DiskFull, or LmworksError for rows that the database refuses; then nothing was written.
        """
        self.look()
        with self.transaction(reads=reads) as connection:
            yield connection
        if not reads and self.file is not None and identity_of(self.file) != self.identity:
            raise Away("the feedback store is away", where=self.name, found="the file was taken away")

    @contextmanager
    def transaction(self, *, reads: bool) -> Iterator[Connection]:
        """Yield a connection in a transaction. Raises as `begin`."""
        options: dict[str, Any] = {"reads": reads}
        if reads and self.file is None:
            options["isolation_level"] = "REPEATABLE READ"
        try:
            with self.engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except SQLAlchemyError as error:
            raise translate(error, self.name) from None

    def look(self) -> None:
        """Let go of a SQLite file that was taken away or replaced: what is written to it would be lost."""
        found = None if self.file is None else identity_of(self.file)
        if self.made and found == self.identity:
            return
        self.engine.dispose()
        if self.file is not None and found is None:
            raise Away("the feedback store is away", where=self.name, found="the file is gone, or cannot be looked at")
        self.prepare()

    def forget(self, before: float, *, decided: bool, most: int) -> dict[str, int]:
        """Delete answers asked before a time that nobody spoke of, with `decided` accepted and rejected feedback first.

        At most `most` rows a transaction, so that a server that writes here waits for none. Return how many of each.
        """
        old = select(FEEDBACK.c.id).where(FEEDBACK.c.state != "new", FEEDBACK.c.received < before)
        silent = select(ANSWERS.c.id).where(ANSWERS.c.asked < before, ANSWERS.c.id.not_in(select(FEEDBACK.c.answer)))
        gone = {}
        for table, chosen in ((FEEDBACK, old), (ANSWERS, silent)):
            gone[table.name], found = 0, most if decided or table is ANSWERS else 0
            while found == most:
                with self.begin() as connection:
                    found = connection.execute(delete(table).where(table.c.id.in_(chosen.limit(most)))).rowcount
                gone[table.name] += found
        return gone

    def empty_log(self) -> bool:
        """Bring SQLite's log into the file, and empty it; say whether it could be: not while somebody reads there.

        Until then either may hold what was deleted.
        """
        if self.file is None:
            return True
        with closing(self.engine.raw_connection()) as connection:
            [busy, *_] = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def put(self, connection: Connection, table: Table, rows: Sequence[Row], *, states: bool = False) -> None:
        """Insert rows that are not there yet; with `states` a decision replaces a "new" that is there."""
        make: Any = sqlite.insert if self.file is not None else postgresql.insert
        if not rows:
            return
        order = make(table)
        if states:
            order = order.on_conflict_do_update(
                index_elements=["id"], set_={"state": order.excluded.state}, where=FEEDBACK.c.state == "new"
            )
        else:
            order = order.on_conflict_do_nothing()
        connection.execute(order, list(rows))

    def give(self, connection: Connection, answer: Row, label: str) -> Given:
        """Keep what is right for an answer."""
        id = hashlib.sha256(f"{answer['id']}\0{label}".encode()).hexdigest()[:16]
        there = connection.execute(select(FEEDBACK.c.id).where(FEEDBACK.c.id == id)).first()
        row = {"id": id, "answer": answer["id"], "label": label, "received": time.time(), "state": "new"}
        self.put(connection, FEEDBACK, [row])
        return Given(id, answer, label, there is None)


def make_answer(
    model: str, given: str | tuple[str, str], label: str | None = None, score: float | None = None, *,
    asked: bool = True,
) -> Row:  # fmt: skip
    """Return the row of an answer, with an id that nobody can guess; of what nobody `asked` each text has one."""
    first, second = (given, None) if isinstance(given, str) else given
    text, pair = storable(first), None if second is None else storable(second)
    id = secrets.token_hex(16) if asked else hashlib.sha256(json.dumps([model, text, pair]).encode()).hexdigest()[:32]
    return {"id": id, "model": model, "asked": time.time(), "text": text, "pair": pair, "label": label, "score": score}


def find_answer(connection: Connection, id: str) -> Row | None:
    """Return an answer by its id."""
    found = connection.execute(select(ANSWERS).where(ANSWERS.c.id == id)).first()
    return None if found is None else dict(found._mapping)


def joined(states: Sequence[str], model: str | None) -> Select[Any]:
    """Return the question for feedback in these states with its answers, in the order in which it came."""
    said = ANSWERS.c
    question = (
        select(FEEDBACK, said.model, said.text, said.pair, said.label.label("said"), said.score)
        .join(ANSWERS, FEEDBACK.c.answer == said.id)
        .where(FEEDBACK.c.state.in_(states))
        .order_by(FEEDBACK.c.received, FEEDBACK.c.id)
    )
    return question if model is None else question.where(said.model == model)


def read_rows(connection: Connection, states: Sequence[str], model: str | None = None) -> Iterator[Row]:
    """Yield feedback in these states: id, answer, label, received, state, model, text, pair, said, score."""
    options = {"yield_per": AT_ONCE}
    for row in connection.execute(joined(states, model), execution_options=options):
        yield dict(row._mapping)


def count(connection: Connection, model: str | None = None) -> list[Mapping[str, Any]]:
    """Return the numbers of feedback by model, label and state, and of those how many agree with the model."""
    agrees = func.sum(func.coalesce((FEEDBACK.c.label == ANSWERS.c.label).cast(Integer), 0)).label("agree")
    columns = (ANSWERS.c.model, FEEDBACK.c.label, FEEDBACK.c.state)
    question = select(*columns, func.count().label("count"), agrees).join(ANSWERS, FEEDBACK.c.answer == ANSWERS.c.id)
    question = question.group_by(*columns) if model is None else question.where(columns[0] == model).group_by(*columns)
    return sorted((dict(row._mapping) for row in connection.execute(question)),
                  key=lambda row: (row["model"], row["label"], STATES.index(row["state"])))  # fmt: skip


def set_state(connection: Connection, ids: Sequence[str], state: str) -> None:
    """Accept or reject feedback. Raises InputError for an unknown id; then nothing changes."""
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE]
        found = set(connection.execute(select(FEEDBACK.c.id).where(FEEDBACK.c.id.in_(part))).scalars())
        if unknown := [id for id in part if id not in found]:
            raise InputError("there is no such feedback", found=", ".join(unknown[:5]), fix="lmworks feedback list URL")
        connection.execute(update(FEEDBACK).where(FEEDBACK.c.id.in_(part)).values(state=state))


def read_part(connection: Connection, table: Table, after: str, most: int) -> list[Row]:
    """Return the rows of a table whose ids follow one, in the order of their ids."""
    question = select(table).where(table.c.id > after).order_by(table.c.id).limit(most)
    return [dict(row._mapping) for row in connection.execute(question)]


def read_ids(connection: Connection, table: Table, ids: Sequence[str]) -> dict[str, Row]:
    """Return the rows of these ids, by id."""
    return {row.id: dict(row._mapping) for row in connection.execute(select(table).where(table.c.id.in_(ids)))}


def size(connection: Connection, table: Table) -> int:
    """Return the number of rows of a table."""
    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def ping(connection: Connection) -> None:
    """Ask for nothing."""
    connection.execute(text("SELECT 1"))
