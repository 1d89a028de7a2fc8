"""`lmworks monitor check`: has the traffic of a server drifted, and does it still answer a labelled sample as well?

SOURCE is a server's address, or the log that `lmworks serve --drift-log` writes. Accuracy has fallen where so few right
answers, or fewer, would come of chance with probability FALLEN at most: the exact binomial test against the accuracy
that was measured when the monitor was fitted.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from lmworks.base.chart import Chart
from lmworks.base.errors import InputError, LmworksError
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.text.labelled import Labelled, read_labelled

FALLEN = 0.01
AT_ONCE = 64  # texts of a request
SECONDS = 60.0
SMALLEST = 1e-30  # p that is drawn


def check_monitor(
    source: str, *, data: Path | None = None, model: str | None = None, key: str | None = None, **columns: Any
) -> Report:
    """Return what /drift or a log says, and the accuracy on `data`; in a word `values["drift"]` and `["fallen"]`.

    Raises InputError for a server that cannot be asked, or watches nothing, and for a file that is no log.
    """
    is_url = source.startswith(("http://", "https://"))
    if data is not None and not is_url:
        raise InputError("a labelled sample is answered by a server", found=source, expected="http://…")
    found = ask(f"{source.rstrip('/')}/drift", key=key)["models"] if is_url else read_log(Path(source))
    if model is not None and model not in found:
        raise InputError(
            "this model is not watched", found=model, expected=", ".join(found) or "a model with a monitor"
        )
    found = found if model is None else {model: found[model]}
    if not found:
        raise InputError("nothing is watched here", where=source, found="no model with a monitor",
                         fix="lmworks monitor fit MODEL DATA, and serve it again")  # fmt: skip
    values: dict[str, Any] = {"source": source, "drift": any(one["drift"] for one in found.values()), "models": found}
    if data is not None:
        name = model or next(iter(found))
        values["accuracy"] = measure(
            source.rstrip("/"), name, found[name], read_labelled(data, "text-classification", **columns), key
        )
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
    except (OSError, ValueError) as error:
        raise InputError(
            "this server cannot be asked", where=url, found=str(error), fix="is it running there?"
        ) from None
    if not isinstance(found, dict):
        raise InputError("this is no answer of lmworks serve", where=url, found=type(found).__name__)
    return found


def read_log(path: Path) -> dict[str, Any]:
    """Return the comparisons of each model in a log; the last one says whether it drifts."""
    if not path.is_file():
        raise InputError(
            "there is no such log", where=str(path), expected="a server's address, or the file of --drift-log"
        )
    found: dict[str, Any] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            name, drift = str(row["model"]), bool(row["drift"])
            float(row["requests"]), dict(row["tests"])
        except (ValueError, KeyError, TypeError):
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
    right = 0
    for i in range(0, len(data), AT_ONCE):
        texts = data.examples[i : i + AT_ONCE]
        body: dict[str, Any] = {"text": texts, "model": name, "top_k": 1}
        if not isinstance(texts[0], str):
            body |= {"text": [first for first, _ in texts], "pair": [second for _, second in texts]}
        answers = ask(f"{url}/classify", body, key=key)["answers"]
        right += sum(
            one["label"] == known for one, known in zip(answers, data.references[i : i + AT_ONCE], strict=True)
        )
    expected = watched["reference"]["accuracy"]
    if expected is None:
        raise LmworksError("the monitor knows no accuracy to compare with")
    p = binomial_tail(right, len(data), expected)
    return {"texts": len(data), "accuracy": right / len(data), "expected": expected, "p": p, "fallen": p <= FALLEN}


def binomial_tail(successes: int, trials: int, share: float) -> float:
    """Return the probability of at most so many successes."""
    if share >= 1:
        return 1.0 if successes >= trials else 0.0
    if share <= 0:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in range(successes + 1)
    ]  # fmt: skip
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(one - top) for one in logs))


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
                     f"{accuracy['expected']:.1%} when fitted: {end}")  # fmt: skip
    table = Table("The last window", ("model", "test", "statistic", "p", "alarm at p ≤", ""), tuple(rows))
    return Report(f"{values['source']}: traffic", values, (table,), tuple(charts), notes=tuple(notes))
