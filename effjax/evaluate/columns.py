"""What a row of a comparison shows: one list of columns, for the terminal and for the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effjax.evaluate.record import Record

DASH = "–"
"""Stands for a figure that is unknown; its reason is in the record."""

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Column:
    """A column: its group and title, a record's cell, and the figure that the cell stands on.

    The cell is None where the figure (a dotted name, by which its reason is found) is unknown, and
    empty where the column is not about that record. `axis` is the letter of the front's axis.
    """

    group: str
    title: str
    cell: Callable[[Record], str | None]
    figure: str
    axis: str = ""


def count(number: float | None, unit: str = "") -> str | None:
    """Writes a number to three digits with a decimal prefix: 3.29 MB; None stays None."""
    if number is None:
        return None
    size, steps = abs(float(number)), 0
    while size >= 999.5 and steps < len(_PREFIXES) - 1:
        size, steps = size / 1000, steps + 1
    digits = 0 if size >= 99.95 or (not steps and size == int(size)) else 1 if size >= 9.995 else 2
    sign = "-" if number < 0 else ""
    return f"{sign}{size:.{digits}f} {_PREFIXES[steps]}{unit}".strip()


def between(low: float | None, high: float | None, write: Callable[[float], str | None]) -> str:
    """Writes a range as `low to high`, or nothing where an end is unknown."""
    return "" if low is None or high is None else f"{write(low)} to {write(high)}"


def _value(record: Record) -> str | None:
    return None if record.quality.value is None else f"{record.quality.value:.3f}"


def _interval(record: Record) -> str | None:
    return between(record.quality.low, record.quality.high, "{:.3f}".format) or None


def _real_bytes(record: Record) -> str | None:
    return "" if record.bytes.saving == "simulated" else count(record.bytes.stored, "B")


def _simulated_bytes(record: Record) -> str | None:
    return count(record.bytes.stored, "B") if record.bytes.saving == "simulated" else ""


def _state(record: Record) -> str | None:
    fixed, per_token = record.state_bytes.fixed, record.state_bytes.per_token
    if fixed is None or per_token is None:
        return None
    growing = f"{count(per_token, 'B')}/token" if per_token else ""
    return " + ".join(filter(None, (count(fixed, "B") if fixed else "", growing))) or "0 B"


def _memory(record: Record) -> str | None:
    temp, arguments = record.memory.temp, record.memory.arguments
    return None if temp is None or arguments is None else count(temp + arguments, "B")


def _joules(record: Record) -> str | None:
    energy = record.energy
    spread = between(energy.low, energy.high, count)
    return " ".join(filter(None, (count(energy.joules, "J"), spread and f"({spread})"))) or None


def _measured(record: Record) -> str | None:
    return _joules(record) if record.energy.measured else ""


def _estimated(record: Record) -> str | None:
    return "" if record.energy.measured else _joules(record)


def _grams(record: Record) -> str | None:
    return count(record.carbon.grams, "g")


def _hardware(record: Record) -> str | None:
    floor = "at least " if record.flops.unknown else ""
    counted = count(record.flops.train_hardware)
    return counted and floor + counted


COLUMNS = (
    Column("quality", "value", _value, "quality.value"),
    Column("quality", "95% interval", _interval, "quality.low"),
    Column("size", "parameters", lambda r: count(r.params.total), "params.total"),
    Column("size", "stored", _real_bytes, "bytes.stored", "B"),
    Column("size", "stored, saving simulated", _simulated_bytes, "bytes.stored"),
    Column("generation", "FLOPs/token", lambda r: count(r.flops.per_token), "flops.per_token", "F"),
    Column("generation", "state", _state, "state_bytes.fixed"),
    Column(
        "generation",
        "tokens/s",
        lambda r: count(r.time.tokens_per_s_generate),
        "time.tokens_per_s_generate",
        "S",
    ),
    Column(
        "training",
        "model FLOPs",
        lambda r: count(r.flops.train_model),
        "flops.train_model",
        "T",
    ),
    Column("training", "done FLOPs", _hardware, "flops.train_hardware"),
    Column(
        "training",
        "tokens/s",
        lambda r: count(r.time.tokens_per_s_train),
        "time.tokens_per_s_train",
    ),
    Column("training", "memory", _memory, "memory.temp"),
    Column("energy", "measured", _measured, "energy.joules"),
    Column("energy", "estimated (range)", _estimated, "energy.joules"),
    Column("energy", "CO2e", _grams, "carbon.grams"),
)


def columns(records: Sequence[Record]) -> list[Column]:
    """Lists the columns that have something to say, or to admit, about these records."""
    return [column for column in COLUMNS if any(column.cell(r) != "" for r in records)]
