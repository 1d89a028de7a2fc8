"""What people said of a model's answers: looked at, accepted or rejected, exported, and moved to another database.

SQLAlchemy is imported when a verb is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import FormatError, InputError, did_you_mean
from lmworks.base.files import new_file, write_text
from lmworks.base.report import Report, Table, counted

if TYPE_CHECKING:
    from lmworks.serve.feedback import Store

SHOWN = 20  # rows that wait, in a list
WIDE = 60  # characters of a text in a table
PART = 500  # rows that are moved at once
KEPT = Path("training/accepted.feedback/rows.jsonl")  # in a run; its folder goes with the checkpoints
Row = dict[str, Any]


@contextmanager
def opened(url: str | Path, *, create: bool = False) -> Iterator[Store]:
    """Yield a store that is closed again. Raises InputError for one that is not there."""
    from lmworks.serve.feedback import Store

    store = Store(url, create=create)
    try:
        yield store
    finally:
        store.close()


def list_feedback(url: str | Path, *, model: str | None = None) -> Report:
    """Return counts by model, label and state, and the first of those that wait for a decision."""
    from lmworks.serve.feedback import count, read_rows

    with opened(url) as store, store.begin(reads=True) as connection:
        counts = [dict(row) for row in count(connection, model)]
        waiting = first(read_rows(connection, ("new",), model), SHOWN)
    total = {state: sum(row["count"] for row in counts if row["state"] == state)
             for state in ("new", "accepted", "rejected")}  # fmt: skip
    values = {"store": store.name, **total, "counts": counts, "waiting": waiting}
    columns = ("model", "label", "state", "count", "agree")
    tables = []
    if counts:
        tables.append(Table("Feedback", columns, tuple(tuple(row[name] for name in columns) for row in counts)))
    if waiting:
        rows = tuple((row["id"], row["model"], short(row), row["said"], row["label"]) for row in waiting)
        tables.append(Table(f"New, the first {len(rows)}", ("id", "model", "text", "the model said", "feedback"), rows))
    return Report(f"{store.name}: {counted(sum(total.values()), 'piece')} of feedback", values, tables=tuple(tables))


def review_feedback(
    url: str | Path, *, accept: Sequence[str] = (), reject: Sequence[str] = (), model: str | None = None,
    ask: Callable[[Row], str] | None = None,
) -> Report:  # fmt: skip
    """Accept and reject feedback by ids, or "all" that is new; without ids `ask` decides: accept, reject, skip, quit.

    Raises InputError for an unknown id, and for one that is both accepted and rejected; then nothing changes.
    """
    from lmworks.serve.feedback import read_rows, set_state

    with opened(url) as store:
        decided = {"accepted": list(dict.fromkeys(accept)), "rejected": list(dict.fromkeys(reject))}
        every = [ids for ids in decided.values() if ids == ["all"]]
        if len(every) > 1 or set(accept) & set(reject):
            raise InputError("feedback is either accepted or rejected", found="both")
        if not (accept or reject):
            if ask is None:
                raise InputError("nobody is here to ask", fix="--accept ID… or --reject ID…, or `all`; or a terminal")
            with store.begin(reads=True) as connection:
                waiting = list(read_rows(connection, ("new",), model))
            for row in waiting:  # each decision is kept at once
                said = ask(row)
                if said == "quit":
                    break
                if said != "skip":
                    state = "accepted" if said == "accept" else "rejected"
                    decided[state].append(row["id"])
                    with store.begin() as connection:
                        set_state(connection, [row["id"]], state)
        else:
            with store.begin() as connection:
                # the ids that are named come first, so that `all` is the rest of what is new
                for state, ids in sorted(decided.items(), key=lambda item: item[1] == ["all"]):
                    if ids == ["all"]:
                        decided[state] = ids = [row["id"] for row in read_rows(connection, ("new",), model)]
                    set_state(connection, ids, state)
    values = {"store": store.name, **{state: len(ids) for state, ids in decided.items()}}
    return Report(f"{values['accepted']:,} accepted, {values['rejected']:,} rejected", values)


def ask_person(row: Row) -> str:
    """Show a piece of feedback on the terminal and return what is decided."""
    said = row["said"] or "nothing"
    lines = [row["text"], *([row["pair"]] if row["pair"] is not None else []),
             f"  {row['model']} said: {said}", f"  feedback: {row['label']}"]  # fmt: skip
    sys.stderr.write("\n" + "\n".join(printable(line) for line in lines) + "\n")
    answers = {"a": "accept", "r": "reject", "s": "skip", "": "skip", "q": "quit"}
    while True:
        sys.stderr.write("[a]ccept, [r]eject, [s]kip, [q]uit? ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return "quit"
        if (word := line.strip().lower()[:1]) in answers:
            return answers[word]


def printable(text: str) -> str:
    """Return a stranger's text without what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def export_feedback(url: str | Path, out: Path, *, model: str | None = None, new: bool = False) -> Report:
    """Write what was accepted, with `new` also what nobody has looked at, as jsonl; texts with two labels stay out."""
    from lmworks.serve.feedback import read_rows

    with opened(url) as store, store.begin(reads=True) as connection:
        rows, torn = agreed(read_rows(connection, ("accepted", "new") if new else ("accepted",), model))
    if not rows:
        raise InputError("there is no accepted feedback to export", where=store.name,
                         found=f"{len(torn)} texts with labels that contradict" if torn else "",
                         fix="lmworks feedback review URL")  # fmt: skip
    with new_file(out) as staged:
        staged.write_text(to_jsonl(rows), "utf-8")
    values = {"store": store.name, "file": str(out), "examples": len(rows), "contradicting": torn}
    notes = () if not torn else (f"{counted(len(torn), 'text')} left out: accepted with labels that contradict.",)
    columns = ("text", "labels")
    tables = () if not torn else (
        Table("Left out", columns, tuple((short(row), ", ".join(row["labels"])) for row in torn[:SHOWN])),
    )  # fmt: skip
    return Report(f"{out}: {counted(len(rows), 'example')}", values, tables=tables, notes=notes)


def agreed(rows: Iterator[Row]) -> tuple[list[Row], list[Row]]:
    """Return each text once with its label, as read_labelled reads it, and those with several labels."""
    labels: dict[tuple[str, str | None], dict[str, None]] = {}
    for row in rows:
        labels.setdefault((row["text"], row["pair"]), {})[row["label"]] = None
    found: list[Row] = []
    torn: list[Row] = []
    for (text, pair), said in labels.items():
        example = {"text": text} if pair is None else {"text1": text, "text2": pair}
        if len(said) == 1:
            found.append({**example, "label": next(iter(said))})
        else:
            torn.append({**example, "labels": sorted(said)})
    return found, torn


def to_jsonl(rows: Sequence[Row]) -> str:
    """Return rows, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def take_feedback(url: str, name: str) -> str:
    """Return as jsonl what was accepted of the model of this name, or of the one that there is. Raises InputError."""
    from lmworks.serve.feedback import count, read_rows

    with opened(url) as store, store.begin(reads=True) as connection:
        models = sorted({row["model"] for row in count(connection) if row["state"] == "accepted"})
        if name not in models and len(models) != 1:
            raise InputError(
                "no feedback is accepted" if not models else "there is feedback of several models", where=store.name,
                found=", ".join(models), expected=f"accepted feedback of {name}{did_you_mean(name, models)}",
                fix="lmworks feedback review URL" if not models
                else "lmworks feedback export URL --model NAME -o FILE, and train on FILE",
            )  # fmt: skip
        rows, _ = agreed(read_rows(connection, ("accepted",), name if name in models else models[0]))
    if not rows:
        raise InputError("all texts were accepted with labels that contradict", where=store.name)
    return to_jsonl(rows)


def check_feedback(url: str | None, train: str | Path | None, task: str, *, alone: bool) -> None:
    """Raise InputError for a run without data, and for one that feedback is not for."""
    if url is None and train is None:
        raise InputError("there is nothing to train on", fix="give a file of labelled data, or --from-feedback URL")
    if url is not None and (task != "text-classification" or not alone):
        raise InputError("feedback teaches one classifier, in one process", found=f"--from-feedback for {task}",
                         fix="lmworks feedback export URL -o FILE, and train on FILE")  # fmt: skip


@contextmanager
def fed(url: str | None, out: Path, name: str, *, resume: bool) -> Iterator[tuple[str, Path | None]]:
    """Yield accepted feedback as jsonl and as a file of it; a run that goes on has what it began with."""
    if url is None:
        yield "", None
        return
    before = out.absolute().with_name(f"{out.absolute().name}.partial") / KEPT
    lines = before.read_text("utf-8") if resume and before.is_file() else take_feedback(url, name)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "feedback.jsonl"
        path.write_text(lines, "utf-8")
        yield lines, path


def keep_feedback(run: Path, lines: str) -> None:
    """Keep feedback in the folder of a run until the run is done: a model that is given away holds no texts."""
    if not (run / KEPT).is_file():
        (run / KEPT).parent.mkdir(parents=True, exist_ok=True)
        write_text(run / KEPT, lines)


def copy_feedback(source: str | Path, target: str | Path) -> Report:
    """Copy every answer and all feedback to another database; what is there stays, a decision replaces a "new".

    It may be stopped and run again. Every part is read back and compared. Raises FormatError for a row that differs.
    """
    from lmworks.serve.feedback import ANSWERS, FEEDBACK, read_ids, read_part, size

    copied: dict[str, int] = {}
    with opened(source) as one, opened(target, create=True) as two:
        if (one.url, one.identity) == (two.url, two.identity):
            raise InputError("a database is copied to another one", found=f"{one.name} twice")
        with one.begin(reads=True) as reading:
            for table in (ANSWERS, FEEDBACK):
                last = ""
                copied[table.name] = 0
                while rows := read_part(reading, table, last, PART):
                    with two.begin() as writing:
                        two.put(writing, table, rows, states=table is FEEDBACK)
                        there = read_ids(writing, table, [row["id"] for row in rows])
                        for row in rows:
                            compare(row, there.get(row["id"]), two.name)
                    last = rows[-1]["id"]
                    copied[table.name] += len(rows)
        with one.begin(reads=True) as reading, two.begin(reads=True) as written:
            left = {table.name: size(reading, table) for table in (ANSWERS, FEEDBACK)}
            held = {table.name: size(written, table) for table in (ANSWERS, FEEDBACK)}
    names = {ANSWERS.name: "answers", FEEDBACK.name: "feedback"}
    since = sum(left[name] - copied[name] for name in names)
    values = {"from": one.name, "to": two.name, **{shown: copied[name] for name, shown in names.items()},
              "came_since": since, "held": {shown: held[name] for name, shown in names.items()}}  # fmt: skip
    notes = (f"{counted(since, 'row')} came while it was copied: run it again.",) if since else ()
    shown_rows = tuple((shown, copied[name], held[name]) for name, shown in names.items())
    tables = (Table("Rows", ("what", "copied", "in the other database now"), shown_rows),)
    return Report(f"{one.name} → {two.name}", values, tables=tables, notes=notes)


def forget_feedback(url: str | Path, before: str, *, decided: bool = False) -> Report:
    """Delete answers asked before a day (UTC) that nobody spoke of, with `decided` also feedback that was decided.

    Feedback that waits for a decision stays, and so does its answer. Raises InputError for no day, or one to come.
    """
    from lmworks.serve.feedback import ANSWERS, FEEDBACK

    try:
        day = datetime.fromisoformat(before)
    except ValueError:
        raise InputError("this is no day", found=before, expected="such as 2026-10-31") from None
    day = day if day.tzinfo else day.replace(tzinfo=UTC)
    if day > datetime.now(UTC):
        raise InputError("this day is still to come", found=before, expected="a day that is past")
    with opened(url) as store:
        gone = store.forget(day.timestamp(), decided=decided, most=PART)
        values = {"store": store.name, "before": day.isoformat(), "answers": gone[ANSWERS.name],
                  "feedback": gone[FEEDBACK.name], "waits_for_reader": not store.empty_log()}  # fmt: skip
    what = f"{counted(gone[ANSWERS.name], 'answer')} and {counted(gone[FEEDBACK.name], 'piece')} of feedback forgotten"
    left = f"Their texts are still in {store.file} or its log, as somebody reads there: run it again later."
    return Report(f"{store.name}: {what}", values, notes=(left,) if values["waits_for_reader"] else ())


def compare(row: Row, there: Row | None, name: str) -> None:
    """Raise FormatError where a row did not arrive as it was; a decision may differ, and when the same came to each."""
    kept = row.keys() - {"state", "asked", "received"}
    if there is None or any(there[key] != row[key] for key in kept):
        raise FormatError("a row of the other database differs", where=name, found=row["id"],
                          fix="copy to an empty database")  # fmt: skip


def first(rows: Iterator[Row], most: int) -> list[Row]:
    """Return the first of some rows."""
    return [row for row, _ in zip(rows, range(most), strict=False)]


def short(row: Row) -> str:
    """Return the beginning of a text."""
    text = printable(row.get("text") or row["text1"])
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"
