"""What a verb found out: a dict for programs, a table for the terminal, one HTML page for people.

The page is a plain string with inline SVG: it needs no plotting library, no script and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import IO, Any

from lmworks.base.chart import Chart
from lmworks.base.errors import printable

Cell = str | int | float | None


def counted(number: int, noun: str) -> str:
    """Return how many: (1, "example") -> "1 example", (1200, "example") -> "1,200 examples"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; numbers are right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Report:
    """The result of a verb.

    `values` is what `--json` prints; `tables`, `charts`, `texts` (title, text) and `notes` (sentences) are for people.
    """

    title: str
    values: dict[str, Any]
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the values; JSON-ready."""
        return dict(self.values)

    def print(self, file: IO[str] | None = None) -> None:
        """Write tables, texts and notes to a terminal or a file (standard output by default)."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=file, highlight=False, soft_wrap=True)
        console.print(Text(printable(self.title), style="bold"))
        for table in self.tables:
            drawn = RichTable(title=Text(printable(table.title)), title_justify="left", box=box.SIMPLE_HEAD)
            for i, name in enumerate(table.columns):
                drawn.add_column(Text(printable(name)), justify="right" if is_numeric(table, i) else "left")
            for row in table.rows:
                drawn.add_row(*(Text(printable(show(cell))) for cell in row))
            console.print(drawn)
        for title, text in self.texts:
            console.print(Text(printable(title), style="bold"))
            console.print(Text(printable(text.rstrip()) + "\n"))
        for note in self.notes:
            console.print(Text(printable(f"• {note}")))

    def to_html(self) -> str:
        """Return one self-contained page."""
        parts = [f"<h1>{escape(self.title)}</h1>"]
        parts += [f"<p>{escape(note)}</p>" for note in self.notes]
        parts += [table_html(table) for table in self.tables]
        parts += [
            f"<figure>{chart.to_svg()}<figcaption>{escape(chart.title)}</figcaption></figure>" for chart in self.charts
        ]
        parts += [f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in self.texts]
        return PAGE.replace("{title}", escape(self.title)).replace("{body}", "\n".join(parts))


def is_numeric(table: Table, column: int) -> bool:
    """Say whether every filled cell of a column is a number."""
    cells = [row[column] for row in table.rows if row[column] is not None]
    return bool(cells) and all(isinstance(cell, int | float) for cell in cells)


def show(cell: Cell) -> str:
    """Print a cell: floats to four significant places, integers with thousands separators, None as a dash."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.2e}" if cell and abs(cell) < 1e-3 else f"{cell:,.4g}" if abs(cell) < 1e4 else f"{cell:,.0f}"
    return cell


def table_html(table: Table) -> str:
    """Return the table as HTML."""
    numeric = [is_numeric(table, i) for i in range(len(table.columns))]

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=n' if right else ''}>{escape(cell)}</{tag}>"
            for cell, right in zip(cells, numeric, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(line("td", [show(cell) for cell in row]) for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2><table><thead>{line('th', table.columns)}</thead><tbody>{body}</tbody></table>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2327; --quiet: #5d6770; --line: #d9dee3; --paper: #fff;
  --s0: #1f6feb; --s1: #c2410c; --s2: #15803d; --s3: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --quiet: #9aa5af; --line: #39424a; --paper: #14181c;
  --s0: #6ea8fe; --s1: #fb923c; --s2: #4ade80; --s3: #c4b5fd; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 54rem;
  margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; } .n { text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line); padding: .2rem 1rem; }
figure { margin: 2rem 0; } figcaption { color: var(--quiet); font-size: .9rem; } svg { width: 100%; height: auto; }
@media (max-width: 40rem) { body { margin: 1.2rem auto; } table, figure { display: block; overflow-x: auto; }
  th, td { padding: .3rem .45rem; } svg { min-width: 34rem; } }
</style></head><body><main>
{body}
</main></body></html>
"""
