"""Time: compilation apart from steps, after a warm-up, with the spread over interleaved rounds.

Seconds throughout: wall seconds, and CPU seconds of the whole process with all its threads, which
stay comparable when other programs share the machine.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarises at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes, round by round. `first` is the first call of all, compiling included.

    `compile` is the time to trace, lower and compile, where that was done apart; else None.
    """

    wall_rounds: tuple[float, ...]
    cpu_rounds: tuple[float, ...]
    first: float
    compile: float | None = None

    @property
    def rounds(self) -> int:
        """Gives the number of samples."""
        return len(self.wall_rounds)

    @property
    def wall(self) -> Spread:
        """Gives the spread of wall seconds per call."""
        return Spread.of(self.wall_rounds)

    @property
    def cpu(self) -> Spread:
        """Gives the spread of process CPU seconds per call."""
        return Spread.of(self.cpu_rounds)


def compile_timed(f: Any, *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """Compiles a jitted function for these arguments; gives the executable and the wall seconds.

    With a persistent compilation cache the seconds are those of loading from it.
    """
    begin = time.perf_counter()
    compiled = f.lower(*args, **kwargs).compile()
    return compiled, time.perf_counter() - begin


def measure(
    f: Callable[..., Any],
    *args: Any,
    rounds: int = 5,
    calls: int = 1,
    warmup: int = 1,
) -> Timing:
    """Times `f(*args)`. A jitted `f` is compiled first, and that time is kept apart.

    A function that donates its arguments can be called with them only once: pass a thunk that
    carries its state instead.
    """
    seconds = None
    if hasattr(f, "lower"):
        f, seconds = compile_timed(f, *args)
    return _timings({"f": lambda: f(*args)}, rounds, calls, warmup, {"f": seconds})["f"]


def interleave(
    thunks: Mapping[str, Thunk], rounds: int = 5, calls: int = 1, warmup: int = 1
) -> dict[str, Timing]:
    """Times several functions side by side, so that a busy spell of the machine meets them all.

    Each round calls every thunk `calls` times, starting one further along than the round before.
    Compilation falls into the warm-up and shows in `first`.
    """
    return _timings(thunks, rounds, calls, warmup, {})


def ratio(numerator: Timing, denominator: Timing, kind: str = "cpu") -> Spread:
    """Compares two interleaved timings round by round; `kind` is "cpu" or "wall"."""
    above, below = (getattr(t, f"{kind}_rounds") for t in (numerator, denominator))
    if len(above) != len(below):
        raise ValueError(f"ratio needs equal rounds, got {len(above)} and {len(below)}")
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def _timings(
    thunks: Mapping[str, Thunk],
    rounds: int,
    calls: int,
    warmup: int,
    compiled: Mapping[str, float | None],
) -> dict[str, Timing]:
    for name, value, least in (("rounds", rounds, 1), ("calls", calls, 1), ("warmup", warmup, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    first = {name: _clocked(thunk, 1)[0] for name, thunk in thunks.items()}
    for _ in range(warmup - 1):
        for thunk in thunks.values():
            _clocked(thunk, 1)
    gc.collect()  # a collection owed by earlier work would fall into somebody's round
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in thunks}
    names = list(thunks)
    for turn in range(rounds):
        start = turn % len(names)
        for name in itertools.chain(names[start:], names[:start]):
            samples[name].append(_clocked(thunks[name], calls))
    return {
        name: Timing(
            wall_rounds=tuple(wall for wall, _ in samples[name]),
            cpu_rounds=tuple(cpu for _, cpu in samples[name]),
            first=first[name],
            compile=compiled.get(name),
        )
        for name in names
    }


def _clocked(thunk: Thunk, calls: int) -> tuple[float, float]:
    """Wall and CPU seconds per call. Every result is awaited: dispatch returns before the work."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        jax.block_until_ready(thunk())
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
