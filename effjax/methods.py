"""The index of what works: reads and searches `methods.md`, the table shipped in the package."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effjax.errors import ConfigError, near

TABLE = Path(__file__).with_name("methods.md")
COLUMNS = ("ID", "method", "paper", "home", "test", "experiment", "state")
NONE = ("", "-")

_ID = re.compile(r"([A-Z]+)-?(\d+)([a-z]?)")
_STATE = re.compile(r"works|part: \S.*|holds|does not hold here|undecided")


@dataclass(frozen=True)
class Row:
    """One method: its ledger ID, paper, the dotted path of its home, its test and its state."""

    id: str
    method: str
    paper: str
    home: str
    test: str
    experiment: str
    state: str

    def cells(self) -> tuple[str, ...]:
        """Gives the cells in the table's order."""
        return (
            self.id, self.method, self.paper, self.home, self.test, self.experiment, self.state
        )  # fmt: skip


def read(text: str | None = None) -> tuple[Row, ...]:
    """Reads the table, or one given as text.

    Raises ValueError naming the line: a header other than `COLUMNS`, a row with too few or many
    cells, an ID or a state that is not well formed, rows out of order, a row that comes twice.
    """
    text = TABLE.read_text(encoding="utf-8") if text is None else text
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.startswith("|")]
    if len(lines) < 2 or _cells(lines[0][1]) != list(COLUMNS):
        raise ValueError(f"methods.md must have a table with the columns {', '.join(COLUMNS)}")
    rows = tuple(_row(number, line) for number, line in lines[2:])
    for (number, _), before, row in zip(lines[3:], rows, rows[1:], strict=False):
        if _order(row) < _order(before):
            raise ValueError(f"methods.md line {number}: {row.id} must stand before {before.id}")
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.id, row.home) in seen:
            raise ValueError(f"methods.md: {row.id} with the home {row.home} comes twice")
        seen.add((row.id, row.home))
    return rows


def search(words: Sequence[str], rows: Sequence[Row]) -> tuple[Row, ...]:
    """Finds the rows that contain every word, in any cell and any case.

    Raises ConfigError, with the nearest name, where none does.
    """
    found = tuple(
        row for row in rows if all(word.lower() in " ".join(row.cells()).lower() for word in words)
    )
    if words and not found:
        hints = dict.fromkeys(near(word.lower(), _names(rows)) for word in words)
        raise ConfigError(f"no method matches {' '.join(words)!r}{''.join(hints)}")
    return found


def resolve(row: Row) -> Any:
    """Imports a row's home: the function, class or module that its dotted path names.

    Raises ImportError or AttributeError where there is no such thing.
    """
    module, _, name = row.home.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(row.home)


def _row(number: int, line: str) -> Row:
    cells = _cells(line)
    if len(cells) != len(COLUMNS):
        raise ValueError(f"methods.md line {number}: {len(cells)} cells, wanted {len(COLUMNS)}")
    row = Row(*cells)
    if not _ID.fullmatch(row.id):
        raise ValueError(f"methods.md line {number}: ID {row.id!r} is not like EVAL-06")
    if not _STATE.fullmatch(row.state):
        raise ValueError(
            f"methods.md line {number}: state {row.state!r} is none of 'works', 'part: ...', "
            "'holds', 'does not hold here', 'undecided'"
        )
    for column, cell in (("method", row.method), ("home", row.home), ("test", row.test)):
        if cell in NONE:
            raise ValueError(f"methods.md line {number}: {row.id} has no {column}")
    return row


def _cells(line: str) -> list[str]:
    """Cells without code marks; `\\|` is a bar inside a cell."""
    parts = re.split(r"(?<!\\)\|", line.strip().strip("|"))
    return [part.replace("\\|", "|").strip().strip("`") for part in parts]


def _order(row: Row) -> tuple[str, int, str]:
    area, number, letter = _ID.fullmatch(row.id).groups()  # type: ignore[union-attr]
    return area, int(number), letter


def _names(rows: Sequence[Row]) -> list[str]:
    words = (word.lower().strip("(),:;") for row in rows for word in row.method.split())
    return [*(row.id.lower() for row in rows), *words]
