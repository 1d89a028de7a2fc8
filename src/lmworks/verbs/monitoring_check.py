"""`lmworks monitor check`: has the traffic of a server drifted, and does it still answer a labelled sample as well?

SOURCE is a server's address, or the log that `lmworks serve --drift-log` writes. Accuracy has fallen where so few right
answers, or fewer, would come of chance with probability FALLEN at most: Fisher's exact test against the texts on which
accuracy was measured when the monitor was fitted; where the server steps back from strange texts, with those as wrong.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.errors import InputError, LmworksError
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.evaluation.significance import fisher_tail
from lmworks.text.labelled import Labelled, read_labelled

FALLEN = 0.01
AT_ONCE = 64  # texts of a request
SECONDS = 60.0
BEGIN = '{"model": "'  # of every line of a log
SMALLEST = 1e-30  # p that is drawn
NUMBERS = ("requests", "window", "level", "out_of_domain")  # of a comparison, beside its tests


def check_monitor(
    source: str, *, data: Path | None = None, model: str | None = None, key: str | None = None, **columns: Any
) -> Report:
    """Return what /drift or a log says, and the accuracy on `data`; in a word `values["drift"]` and `["fallen"]`.

    Raises InputError for a server that cannot be asked, or watches nothing, and for a file that is no log.
    """
    is_url = source.startswith(("http://", "https://"))
    if data is not None and not is_url:
        raise InputError("a labelled sample is answered by a server", found=source, expected="http://…")
    labelled = None if data is None else read_labelled(data, "text-classification", **columns)
    with understood(source):
        return look(source.rstrip("/") if is_url else Path(source), labelled, model, key)


@contextmanager
def understood(where: str) -> Iterator[None]:
    """Raise InputError where an answer is not what lmworks gives."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError("this is no answer of lmworks serve", where=where, found=f"{type(error).__name__}: {error}",
                         fix="ask the address that lmworks serve names, of this version") from None  # fmt: skip


def look(source: str | Path, data: Labelled | None, model: str | None, key: str | None) -> Report:
    """Ask a server, or read a log; measure accuracy on `data`; tell."""
    found = read_log(source) if isinstance(source, Path) else dict(ask(f"{source}/drift", key=key)["models"].items())
    if model is not None and model not in found:
        raise InputError(
            "this model is not watched", found=model, expected=", ".join(found) or "a model with a monitor"
        )
    found = found if model is None else {model: found[model]}
    if not found:
        raise InputError("nothing is watched here", where=str(source), found="no model with a monitor",
                         fix="lmworks monitor fit MODEL DATA, and serve it again")  # fmt: skip
    values: dict[str, Any] = {
        "source": str(source),
        "drift": any(one["drift"] for one in found.values()),
        "models": found,
    }
    if data is not None:
        name = model or next(iter(found))
        values["accuracy"] = measure(str(source), name, found[name], data, key)
        values["fallen"] = values["accuracy"]["fallen"]
    return make_report(values)


def ask(url: str, body: Any = None, *, key: str | None = None, seconds: float = SECONDS) -> dict[str, Any]:
    """Return the JSON that a server answers. Raises InputError with what it says."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    data = None if body is None else json.dumps(body).encode()
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(urllib.request.Request(url, data, headers), timeout=seconds) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode("utf-8", "replace")
        error.close()
        fix = "give --api-key-file" if error.code == 401 else ""
        raise InputError(f"the server refuses ({error.code})", where=url, found=said.strip(), fix=fix) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            "this server cannot be asked", where=url, found=str(error), fix="is it running there?"
        ) from None
    if not isinstance(found, dict):
        raise InputError("this is no answer of lmworks serve", where=url, found=type(found).__name__)
    return found


def read_log(path: Path) -> dict[str, Any]:
    """Return the comparisons of each model in a log; the last one says whether it drifts.

    The half of a line that a lost process left, or that is being written just now, is passed over.
    """
    if not path.is_file():
        raise InputError(
            "there is no such log", where=str(path), expected="a server's address, or the file of --drift-log"
        )
    found: dict[str, Any] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            name, drift = str(row["model"]), bool(row["drift"])
            known = {test: float(one["p"]) + float(one["statistic"]) for test, one in row["tests"].items()}
            _ = [known[test] for test in row["drift"]], [float(row[key]) for key in NUMBERS]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, json.JSONDecodeError) and BEGIN.startswith(line[: len(BEGIN)]):
                continue
            raise InputError("this line is no comparison", where=f"{path}, line {number}", found=line[:80],
                             expected="what lmworks serve --drift-log writes") from None  # fmt: skip
        one = found.setdefault(name, {"comparisons": []})
        one["comparisons"].append(row)
        one |= {"drift": drift, "requests": row["requests"], "window": row["window"]}
    if not found:
        raise InputError("the log is empty", where=str(path), fix="wait until a window of requests has passed")
    return found


def measure(url: str, name: str, watched: dict[str, Any], data: Labelled, key: str | None) -> dict[str, Any]:
    """Return how many of the labelled texts a server answers right; they count as traffic of its own."""
    right, expected = 0, "accuracy"
    for i in range(0, len(data), AT_ONCE):
        texts = data.examples[i : i + AT_ONCE]
        body: dict[str, Any] = {"text": texts, "model": name, "top_k": 1, "long": "window"}  # as when it was fitted
        if not isinstance(texts[0], str):
            body |= {"text": [first for first, _ in texts], "pair": [second for _, second in texts]}
        answers = ask(f"{url}/classify", body, key=key)["answers"]
        if not i:  # a model that is loaded when it is first asked for has its labels only now
            refuse_unknown(data, labels_of(ask(f"{url}/info", key=key), name))
        known = data.references[i : i + AT_ONCE]
        right += sum(one["label"] in (y, f"LABEL_{y}") for one, y in zip(answers, known, strict=True))
        if any(one["label"] is None or "answered_by" in one for one in answers):
            expected = "accuracy_kept"
    before, texts = (watched["reference"][one] for one in (expected, "texts"))
    if before is None:
        raise LmworksError("the monitor knows no accuracy to compare with")
    p = fisher_tail(right, len(data), round(before * texts), texts)
    return {"texts": len(data), "accuracy": right / len(data), "expected": before, "expected_texts": texts, "p": p,
            "fallen": p <= FALLEN}  # fmt: skip


def labels_of(told: dict[str, Any], name: str) -> list[str]:
    """Return the labels of a model by what /info says; none where it does not."""
    models = told.get("models")
    return next((one["labels"] for one in models if one["name"] == name), []) if isinstance(models, list) else []


def refuse_unknown(data: Labelled, labels: list[str]) -> None:
    """Raise InputError for a label that the model does not have: no answer could be right."""
    for i, label in enumerate(data.references):
        if labels and not {str(label), f"LABEL_{label}"} & set(labels):
            raise InputError("a label of the data is not one of the model's", found=str(label),
                             where=f"{data.where}, example {i + 1}",
                             expected=", ".join(labels[:8]) + (" …" if len(labels) > 8 else ""))  # fmt: skip


def make_report(values: dict[str, Any]) -> Report:
    """Say it in tables, a line a model, and draw each test's p over the requests."""
    rows: list[tuple[Cell, ...]] = []
    charts = []
    for name, one in values["models"].items():
        windows: list[dict[str, Any]] = one["comparisons"]
        if not windows:
            continue
        last, level = windows[-1], math.log10(windows[-1]["level"])
        for test, found in last["tests"].items():
            said = "drift" if test in last["drift"] else ""
            rows.append((name, test, found["statistic"], found["p"], last["level"], said))
        lines = tuple(
            (test, tuple((row["requests"], math.log10(max(row["tests"][test]["p"], SMALLEST))) for row in windows))
            for test in last["tests"]
        )
        edge = ("alarm below", tuple((row["requests"], level) for row in (windows[0], last)))
        title = f"{name}: how likely each window is where nothing has changed"
        charts.append(Chart(title, "requests", "log10 p", (*lines, edge)))
    notes = [
        f"{name}: {'DRIFT' if one['drift'] else 'no drift'} after {counted(one['requests'], 'request')}"
        + ("" if one["comparisons"] else f"; a first comparison needs {one['window']}")
        for name, one in values["models"].items()
    ]
    if accuracy := values.get("accuracy"):
        end = f"it has FALLEN (p = {accuracy['p']:.1e})." if accuracy["fallen"] else "as it was."
        notes.append(f"Accuracy {accuracy['accuracy']:.1%} on {counted(accuracy['texts'], 'text')}, "
                     f"{accuracy['expected']:.1%} of {accuracy['expected_texts']} when fitted: {end}")  # fmt: skip
    table = Table("The last window", ("model", "test", "statistic", "p", "alarm at p ≤", ""), tuple(rows))
    return Report(f"{values['source']}: traffic", values, (table,), tuple(charts), notes=tuple(notes))
