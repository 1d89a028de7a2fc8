"""What `verify` found in one folder or in many: a table with a row for each family, task, dtype and runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmworks.base.report import Cell, Report, Table

# what is allowed is the largest difference of fp32, and the root mean square of every other dtype
COLUMNS = ("dtype", "runtime", "equal to torch", "largest difference", "root mean square", "allowed", "verdict")


def make_report(certificates: Mapping[str, dict[str, Any]]) -> Report:
    """Return the report on these folders; of one its certificate, of several {passed, folders: {name: certificate}}."""
    many = len(certificates) > 1
    kinds = [(one["family"], one["task"]) for one in certificates.values()]
    named = len(set(kinds)) < len(kinds)  # family and task do not say which folder a row is about
    rows: list[tuple[Cell, ...]] = []
    notes = []
    for name, certificate in certificates.items():
        before = f"{name}: " if many else ""
        notes += [before + problem for problem in certificate["problems"]]
        first = (certificate["family"], certificate["task"], *((name,) if named else ())) if many else ()
        rows += [(*first, *row) for row in make_rows(certificate)]
        skipped: dict[str, list[str]] = {}  # the same reason is told once
        for runtime, dtypes in certificate["runtimes"].items():
            for dtype, cell in dtypes.items():
                if "skipped" in cell:
                    line = f"{cell['skipped']}. To check it: {cell['install']}"
                    skipped.setdefault(line, []).append(f"{runtime} {dtype}")
        notes += [f"{before}{', '.join(cells)} not checked: {line}" for line, cells in skipped.items()]
    passed = all(certificate["passed"] for certificate in certificates.values())
    verdict = "every runtime that was checked gives the same answers" if passed else "FAILED"
    one = f"{next(iter(certificates))} ({kinds[0][0]}, {kinds[0][1]})"
    title = f"{f'{len(certificates)} folders' if many else one}: {verdict}"
    values = {"passed": passed, "folders": dict(certificates)} if many else next(iter(certificates.values()))
    columns = ("family", "task", *(("folder",) if named else ())) if many else ()
    table = Table("The same answers as torch fp32", (*columns, *COLUMNS), tuple(rows))
    return Report(title, values, tables=(table,), notes=tuple(notes))


def make_rows(certificate: Mapping[str, Any]) -> list[tuple[Cell, ...]]:
    """Return a row for each runtime and dtype of a certificate."""
    rows: list[tuple[Cell, ...]] = []
    for runtime, dtypes in certificate["runtimes"].items():
        for dtype, cell in dtypes.items():
            if "skipped" in cell:
                rows.append((dtype, runtime, *[None] * 4, "skipped"))
                continue
            equal, checked = cell["tokens_equal"] if "tokens_equal" in cell else cell["decisions_equal"]
            verdict = "passed" if cell["passed"] else "FAILED"
            gaps = (cell["max_abs_diff"], cell["rms_diff"], cell["tolerance"])
            rows.append((dtype, runtime, f"{equal} of {checked}", *gaps, verdict))
    return rows
