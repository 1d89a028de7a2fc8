"""`lmworks retrain`: where a server's traffic has changed for long enough, train on feedback and compare.

    OUT           the challenger: weights and graph, its monitor, and retraining.json with the verdict
    retraining.json beside it: what the trigger remembers

The run lives in .OUT.retraining until OUT is whole; what is done there is not done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, read_json, write_json, write_text
from lmworks.base.hub import find_folder
from lmworks.base.report import Report, Table
from lmworks.models.families import read_config
from lmworks.text.labelled import Labelled, read_labelled
from lmworks.training.tuning import ADAPTERS, Tuning
from lmworks.verbs.comparing import compare
from lmworks.verbs.feedback import opened, take_feedback
from lmworks.verbs.finetuning import finetune
from lmworks.verbs.monitoring import fit_monitor
from lmworks.verbs.monitoring_check import check_monitor, understood
from lmworks.verbs.retraining_trigger import Rule, State, find_evidence, fire, read_state, step, to_state, write_state

CLASSIFY = "text-classification"
VERDICT = "retraining.json"  # in the challenger's folder
FEWEST = 50  # held-out texts that models are compared on
LEVEL = 0.05
Row = dict[str, Any]


def retrain(
    source: str, weights: str | Path, train: Path | None, out: str | Path, *, feedback: str, held_out: Path,
    sample: Path | None = None, model: str | None = None, key: str | None = None, rule: Rule | None = None,
    force: bool = False, resume: bool = False, dtype: str = "fp32", tuning: Tuning | None = None, **columns: Any,
) -> Report:  # fmt: skip
    """Look at a server or its log; where the trigger fires, or with `force`, make a challenger and compare it.

    `values["fired"]` says whether it did, `values["won"]` whether the challenger has more of `held_out` right than
    chance explains (McNemar, p < 0.05). `sample` is a labelled file that the server answers for this check. `resume`
    goes on with a run that was interrupted, without a check. While another run is at work on `out` nothing is done.
    Raises InputError for what cannot be used, and where it fires while `out` is still there.
    """
    shown, out, rule, tuning = Path(out), Path(out).absolute(), (rule or Rule()).check(), (tuning or Tuning()).check()
    if not out.exists():
        check_output(out)
    if tuning.method in ADAPTERS:
        raise InputError("a challenger is a whole model", found=f"--method {tuning.method}", expected="full or head")
    held = read_labelled(held_out, CLASSIFY, **columns)
    work, folder = out.with_name(f".{out.name}.retraining"), find_folder(weights)
    running = Report(f"{shown}: running", {"model": model, "fired": False, "verdict": "running"},
                     notes=("Another run is at work on it.",))  # fmt: skip
    if work.is_dir():
        with claimed(work) as ours:
            if not ours:
                return running
            if not resume:
                raise InputError("an interrupted retraining is here", where=str(work), fix="add --resume, or remove it")
    goes_on = resume and (work / "begun.json").is_file()
    if not goes_on:
        model, values, state = look(source, out.parent, sample, model, feedback, key, rule, force, columns)
        if not values["fired"]:
            write_state(out.parent, model, state)
            return Report(f"{model}: {values['verdict']}", values, notes=told(values, rule))
        known, fresh = choose_texts(folder, train, held, feedback, model, columns)
        values |= {"held_out": len(fresh), "left_out": len(held) - len(fresh), "trained_on": len(known)}
    with claimed(work) as ours:
        if not ours:
            return running
        if (out / "lmworks.json").exists():
            raise InputError("the challenger of before is still here", where=str(shown),
                             fix="choose another -o, or remove it")  # fmt: skip
        check_output(out)
        if goes_on:
            begun = read_json(work / "begun.json")
            model, values = begun["model"], begun["values"]
        else:
            for part, rows in (("known", known), ("held", fresh)):
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_text(work / f"{part}.jsonl", lines)
            write_json(work / "begun.json", {"model": model, "values": values})
        name, fired = str(model), to_state(values["trigger"])
        if (read_state(out.parent, name).fired or 0) < (fired.fired or 0):  # also where a run ended before it did this
            write_state(out.parent, name, fired)
        if not (work / "weights").is_dir():
            finetune(folder, work / "known.jsonl", work / "weights", tuning=tuning,
                     resume=(work / "weights.partial").is_dir())  # fmt: skip
        values |= make_challenger(work, folder, out, name, dtype, tuning.seed)
        shutil.rmtree(work)
    return make_report(values, shown, rule)


@contextmanager
def claimed(work: Path) -> Iterator[bool]:
    """Make a run's folder where there is none, yield whether it is ours until the block ends; an empty one goes."""
    work.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds texts
    handle, ours = os.open(work, os.O_RDONLY), False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(handle), work.stat())
        except (BlockingIOError, FileNotFoundError):
            pass  # another run is at work, or has just ended
        yield ours
    finally:
        if ours and work.is_dir() and not any(work.iterdir()):
            work.rmdir()
        os.close(handle)


def look(
    source: str, place: Path, sample: Path | None, model: str | None, feedback: str, key: str | None, rule: Rule,
    force: bool, columns: dict[str, Any],
) -> tuple[str, dict[str, Any], State]:  # fmt: skip
    """Return the model's name, what a check says, and what the trigger is to remember."""
    from lmworks.serve.feedback import read_rows

    found = check_monitor(source, data=sample, model=model, key=key, **columns).values
    if len(found["models"]) > 1:
        raise InputError("several models are watched", found=", ".join(found["models"]), fix="choose one: --model")
    [(name, watched)] = found["models"].items()
    with opened(feedback) as store, store.begin(reads=True) as connection:
        received = [row["received"] for row in read_rows(connection, ("accepted",), name)]
    with understood(source):
        seen = find_evidence(watched, found.get("accuracy"), len(received))
    before, now = read_state(place, name), time.time()
    there = sum(one <= (before.fired or 0) for one in received)  # when it fired; what was deleted since taught it too
    before = replace(before, used=min(before.used, there))
    state, verdict = step(before, seen, rule, now)
    if force and verdict != "fire":
        state, verdict = fire(state, seen, now), "forced"
    values = {
        "model": name, "fired": verdict in ("fire", "forced"), "verdict": verdict, "reasons": list(seen.reasons),
        "accepted": seen.accepted, "trigger": vars(state),
    }  # fmt: skip
    return name, values, state


def told(values: dict[str, Any], rule: Rule) -> tuple[str, ...]:
    """Return a check for people."""
    state, new = values["trigger"], values["accepted"] - values["trigger"]["used"]
    how = {
        "normal": "Nothing is bad.",
        "watching": f"Bad for {state['bad']} of {rule.checks} checks in a row.",
        "feedback": f"Bad for {state['bad']} checks, but {new} of {rule.least} pieces of feedback are accepted.",
        "holding": f"It trained before and waits for {rule.calm} normal checks ({state['calm']}), or "
        f"{rule.cooldown:g} hours.",
        "fire": "It fires.", "forced": "Told to train.",
    }[values["verdict"]]  # fmt: skip
    return (how, *values["reasons"])


def choose_texts(
    champion: Path, train: Path | None, held: Labelled, feedback: str, model: str, columns: dict[str, Any]
) -> tuple[list[Row], list[Row]]:
    """Return what the challenger learns, and what it is judged by, which it must not know."""
    more = [] if train is None else to_rows(read_labelled(train, CLASSIFY, **columns))
    known = more + [json.loads(line) for line in take_feedback(feedback, model).splitlines()]
    labels, given = set(read_config(champion).labels), {str(row["label"]) for row in known}
    if labels != given:
        raise InputError("the data have other labels than the champion", found=", ".join(sorted(given)),
                         expected=", ".join(sorted(labels)), fix="give TRAIN too, with examples of all")  # fmt: skip
    learnt = {text_of(row) for row in known}
    fresh = [row for row in to_rows(held) if text_of(row) not in learnt]
    if missing := labels - {str(row["label"]) for row in fresh}:
        raise InputError("the held-out texts lack labels", found=f"none of {', '.join(sorted(missing))}",
                         where=held.where, expected="every label of the champion")  # fmt: skip
    if len(fresh) < FEWEST:
        raise InputError("too few held-out texts", found=f"{len(fresh)} that were not trained on", where=held.where,
                         expected=f"{FEWEST} or more")  # fmt: skip
    return known, fresh


def make_challenger(
    work: Path, champion: Path, out: Path, model: str, dtype: str, seed: int
) -> dict[str, Any]:  # fmt: skip
    """Export the trained weights, teach them their limits, compare, and put the folder in place; return the verdict."""
    from lmworks.export.onnx_folder import export_graphs
    from lmworks.export.receipt import recall, write_receipt

    graphs = work / "graphs"
    if not graphs.is_dir():
        export_graphs(work / "weights", graphs, dtypes=(dtype,))
    fit_monitor(graphs, work / "known.jsonl", validation=work / "held.jsonl", dtype=dtype, seed=seed)
    [found] = compare([champion, graphs], [work / "held.jsonl"], seed=seed).values["data"].values()
    before, after = (found["models"][str(one)]["accuracy"] for one in (champion, graphs))
    gap = found["differences"][str(graphs)]["accuracy"]
    verdict = {
        "won": gap["value"] > 0 and gap["p"] < LEVEL, "champion": before, "challenger": after, "difference": gap,
        "out": str(out),
    }  # fmt: skip
    with new_folder(out) as staged:
        shutil.copytree(graphs, staged, dirs_exist_ok=True)
        for path in (work / "weights").glob("*.safetensors"):  # to be trained from the next time
            shutil.copy(path, staged / path.name)
        write_json(staged / VERDICT, verdict)
        receipt = read_json(graphs / "lmworks.json")
        facts: Row = {name: receipt[name] for name in ("made_by", "source", "export")} | recall(graphs)
        write_receipt(staged, {**facts, "retraining": {"won": verdict["won"], "model": model}})
    return verdict


def to_rows(data: Labelled) -> list[Row]:
    """Return examples as jsonl has them."""
    return [
        {"text": one, "label": label} if isinstance(one, str) else {"text1": one[0], "text2": one[1], "label": label}
        for one, label in zip(data.examples, data.references, strict=True)
    ]


def text_of(row: Row) -> tuple[str, str | None]:
    """Return the text, or both texts, of a row."""
    return (row["text"], None) if "text" in row else (row["text1"], row["text2"])


def make_report(values: dict[str, Any], out: Path, rule: Rule) -> Report:
    """Say who wins."""
    gap = values["difference"]
    rows = (("champion", values["champion"]), ("challenger", values["challenger"]))
    end = "The challenger WINS" if values["won"] else "The challenger does not win"
    notes = [*told(values, rule),
             f"{end}: {gap['only_this_right']} texts it alone has right, {gap['only_the_first_right']} the champion "
             f"alone, p = {gap['p']:.2g} (McNemar)."]  # fmt: skip
    if values["left_out"]:
        notes.append(f"{values['left_out']} held-out texts were trained on: they do not count.")
    tables = (Table(f"Accuracy on {values['held_out']:,} held-out texts", ("", "accuracy"), rows),)
    return Report(f"{out}: trained on {values['trained_on']:,} texts", values, tables, notes=tuple(notes))
