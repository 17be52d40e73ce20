"""The table of a comparison, for a terminal or a log."""

import sys
from collections.abc import Sequence
from typing import TextIO

from effjax.evaluate.columns import DASH, Column, columns
from effjax.evaluate.fronts import AXES, Front, fronts, marks, names
from effjax.evaluate.record import Record

NARROW = ("value", "stored", "stored, saving simulated", "FLOPs/token", "tokens/s")
"""The columns that a terminal has room for; the page has all of them."""


def table(records: Sequence[Record], ties: float | None = None) -> str:
    """Writes the finished rows as aligned text, the Pareto-optimal ones marked by their axes.

    Skipped rows follow with their reasons. `ties` is as in `fronts`.
    """
    shown, rows = _shown(records), _rows(records, ties)
    titles = ["on front", "method", *(_title(column) for column in shown)]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    lines = [titles, ["-" * width for width in widths], *rows]
    text = [
        "  ".join(
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *notes(records)])


def print_table(
    records: Sequence[Record], ties: float | None = None, file: TextIO | None = None
) -> None:
    """Prints the table: drawn by rich on a terminal, as `table`'s plain text elsewhere."""
    out = sys.stdout if file is None else file
    if not out.isatty():
        print(table(records, ties), file=out)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    drawn.add_column("on front")
    drawn.add_column("method")
    for column in _shown(records):
        drawn.add_column(_title(column), justify="right")
    for row in _rows(records, ties):
        # Text, not markup: a method's name is never an instruction to the terminal.
        drawn.add_row(*map(Text, row), style="bold" if row[0] else None)
    console = Console(file=out)
    console.print(drawn)
    for note in notes(records):
        console.print(Text(note), style="dim")


def notes(records: Sequence[Record]) -> list[str]:
    """Lists what the table leaves out: what the marks mean, and the rows that did not run."""
    legend = ", ".join(f"{axis.key} {axis.title}" for axis in AXES[:3])
    skipped = [r for r in records if not r.status.finished]
    return [
        f"on front: no row beats it in quality and {legend}",
        *(f"not run: {_plain(r.method)}: {_plain(r.status.reason)}" for r in skipped),
    ]


def _shown(records: Sequence[Record]) -> list[Column]:
    finished = [record for record in records if record.status.finished]
    return [column for column in columns(finished) if column.title in NARROW]


def _title(column: Column) -> str:
    return column.title if column.title != "tokens/s" else f"tokens/s, {column.group}"


def _rows(records: Sequence[Record], ties: float | None) -> list[list[str]]:
    found: list[Front] = fronts(records, ties)
    shown, named = _shown(records), names(records)
    return [
        [
            marks(found, i),
            _plain(named[i]),
            *(DASH if (cell := c.cell(record)) is None else cell for c in shown),
        ]
        for i, record in enumerate(records)
        if record.status.finished
    ]


def _plain(text: str) -> str:
    """The text without line breaks and control characters, which would tear the table."""
    return "".join(c if c.isprintable() else " " for c in text)
