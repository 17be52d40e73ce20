"""`python -m effjax` is the doctor's page, `python -m effjax methods [words]` the index."""

import sys
from collections.abc import Callable, Sequence

from effjax import __version__, methods
from effjax.errors import ConfigError, EffjaxError, near

USAGE = """usage: python -m effjax [command]

  doctor           what this machine has and can do, measured (the default)
  methods [words]  the methods whose row contains all the words; all of them without words
  methods --state  what each mixer keeps of a text while it decodes, in bytes
"""


def doctor(arguments: Sequence[str]) -> None:
    """Prints the doctor's page."""
    if arguments:
        raise ConfigError(f"doctor takes no arguments, got {' '.join(arguments)!r}")
    from effjax.doctor import examine, plain  # it imports jax, which the index does not need

    sections = examine()
    if not sys.stdout.isatty():
        print(f"effjax {__version__}\n{plain(sections)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section in sections:
        grid = Table.grid(padding=(0, 2))
        for label, text in section.lines:
            grid.add_row(Text(f"  {label}"), Text(text))  # effjax[extra] is no markup
        console.print(Text(section.title, style="bold"), grid)


def index(words: Sequence[str]) -> None:
    """Prints the rows of the index that contain all the words, or the mixers' states."""
    if "--state" in words:
        states([word for word in words if word != "--state"])
        return
    found = methods.search(words, methods.read())
    show(methods.COLUMNS, [row.cells() for row in found])


def states(words: Sequence[str]) -> None:
    """Prints what every decoding mixer keeps of a row, in one layer of `presets.tiny`."""
    if words:
        raise ConfigError(f"methods --state takes no words, got {' '.join(words)!r}")
    from effjax.inference.state_size import state_table  # it imports jax

    rows = [
        (kind, f"{size.fixed:,} B", f"{size.per_token:,} B/token") for kind, size in state_table()
    ]
    show(("mixer", "fixed", "and for each token"), rows)


def show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print("  ".join(cell or "-" for cell in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"doctor": doctor, "methods": index}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code: 0, or 2 for a command or a word that is not known."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *rest = arguments or ["doctor"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if name not in COMMANDS:
            raise ConfigError(
                f"unknown command {name!r}, wanted {' or '.join(COMMANDS)}{near(name, COMMANDS)}"
            )
        COMMANDS[name](rest)
    except EffjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
