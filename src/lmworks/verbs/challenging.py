"""`lmworks challenge`: put a challenger in the shadow of a served model, in its place, and back."""

from __future__ import annotations

from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.report import Cell, Report, Table
from lmworks.verbs.monitoring_check import ask, understood

SECONDS = 330.0  # a challenger is loaded meanwhile


def challenge(
    url: str, folder: str | None = None, *, action: str | None = None, share: float = 0.1, model: str | None = None,
    key: str | None = None,
) -> Report:  # fmt: skip
    """Name a challenger for a server to load, or switch, go back, or stop; without any of it tell how things stand.

    Raises InputError with what the server says where it refuses: then all is as it was.
    """
    if folder is not None and action is not None:
        raise InputError("a challenger is loaded first, and switched to later", found=f"{folder} and --{action}")
    base, named = f"{url.rstrip('/')}/challenger", {} if model is None else {"model": model}
    if folder is not None:
        ask(base, {"folder": folder, "share": share, **named}, key=key, seconds=SECONDS)
    elif action is not None:
        ask(f"{base}/{action}", named, key=key, seconds=SECONDS)
    with understood(base):
        return tell(url, dict(ask(base, key=key)["models"].items()))


def tell(url: str, models: dict[str, dict[str, Any]]) -> Report:
    """Say how models and their challengers do."""
    rows: list[tuple[Cell, ...]] = []
    shadows: list[tuple[Cell, ...]] = []
    for name, one in models.items():
        rows.append((name, one["current"], one["other"], one["state"], one["share"]))
        seen = one["shadow"]
        if seen["texts"] or seen["dropped"] or seen["failed"]:
            for which in ("current", "challenger"):
                times = seen["seconds"][which] or {}
                shadows.append((name, which, times.get("p50"), times.get("p95"), seen["out_of_domain"][which]))
    tables = [Table("Versions", ("model", "answers", "beside it", "", "share"), tuple(rows))]
    if shadows:
        tables.append(Table("In the shadow", ("model", "", "p50, s", "p95, s", "strange"), tuple(shadows)))
    notes = [
        f"{name}: they agree on {one['shadow']['agreement']:.1%} of {one['shadow']['texts']} texts; "
        f"{one['shadow']['dropped']} dropped, {one['shadow']['failed']} failed."
        for name, one in models.items() if one["shadow"]["texts"]
    ]  # fmt: skip
    notes += [one["problem"] for one in models.values() if one["problem"]]
    return Report(f"{url}: challengers", {"models": models}, tuple(tables), notes=tuple(notes))
