"""Checks of a verb's numbers, which come from Python or from a recipe's JSON."""

import math
from typing import Any

from effjax.errors import ConfigError


def require_integer(
    verb: str, name: str, value: Any, low: int, high: int | None = None, why: str = ""
) -> int:
    """Requires an integer (not a bool) in [low, high]; `why` says where the bound comes from."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if fits and low <= value and (high is None or value <= high):
        return value
    wanted = f"an integer of at least {low}" + ("" if high is None else f" and at most {high}")
    raise ConfigError(f"{verb}: {name} must be {wanted}{why and f' ({why})'}, got {value!r}")


def require_rank(verb: str, path: str, rank: Any, rows: int, columns: int) -> int:
    """Requires a rank between 1 and the smaller side of a rows x columns matrix."""
    sides = f"{rows} inputs, {columns} outputs"
    return require_integer(f"{verb} at {path!r}", "rank", rank, 1, min(rows, columns), sides)


def require_number(verb: str, name: str, value: Any, low: float, high: float, ends: str) -> float:
    """Requires a finite number between two bounds; ends: "[)" is closed below and open above."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value):
        above = value >= low if ends[0] == "[" else value > low
        below = value <= high if ends[1] == "]" else value < high
        if above and below:
            return float(value)
    raise ConfigError(
        f"{verb}: {name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}"
    )
