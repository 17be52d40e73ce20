"""The record: everything that one row of a comparison claims, in one schema.

Whatever is not known is null and has a reason; it is never 0. A figure that cannot be 0, such as a
measured time, is refused at 0. What a run stores is `record.json`, a list of records.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from effjax import config
from effjax.errors import ConfigError, DataError, near
from effjax.evaluate.files import write_text

SCHEMA = 1

_WHOLE_RECORD = "*"


def _settle(owner: Any, positive: Sequence[str] = (), least: Sequence[str] = ()) -> None:
    config.require_types(owner)
    try:
        config.require_positive(owner, *positive)
    except ConfigError as error:
        raise ConfigError(f"{error}; what is unknown is null with a reason") from None
    for name in least:
        config.require_finite(owner, name, low=0)


def _within(owner: Any, name: str) -> None:
    """Requires low <= the value <= high, as far as they are known."""
    known = [n for n in ("low", name, "high") if getattr(owner, n) is not None]
    values = [getattr(owner, n) for n in known]
    if values != sorted(values):
        order = " <= ".join(known)
        got = ", ".join(map(str, values))
        raise ConfigError(f"{type(owner).__name__}.{name} must lie in its range {order}, got {got}")


@dataclass(frozen=True)
class Corpus:
    """The text that a row was scored on; results compare only at equal digest."""

    name: str
    digest: str
    bytes: int

    def __post_init__(self) -> None:
        _settle(self, positive=("bytes",))


@dataclass(frozen=True)
class Device:
    """What it ran on: the kind (`cpu`, `NVIDIA H100`, ...), how many, and the host's cores."""

    kind: str
    count: int
    cores: int

    def __post_init__(self) -> None:
        _settle(self, positive=("count", "cores"))


@dataclass(frozen=True)
class Parameters:
    """Numbers in the weights, and how many of them this row trained."""

    total: int | None = None
    trainable: int | None = None

    def __post_init__(self) -> None:
        _settle(self, positive=("total",), least=("trainable",))
        if self.total is not None and (self.trainable or 0) > self.total:
            got = f"{self.trainable} of {self.total}"
            raise ConfigError(f"Parameters.trainable must be at most the total, got {got}")


@dataclass(frozen=True)
class Bytes:
    """Bytes that the weights occupy as they are stored.

    `saving` says what a smaller model here is worth: "realised" where these bytes are smaller,
    "simulated" where a mask or a fake quantisation only acts as if; "none" claims nothing.
    """

    stored: int | None = None
    saving: Literal["none", "realised", "simulated"] = "none"

    def __post_init__(self) -> None:
        _settle(self, positive=("stored",))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add being two.

    `train_model` is the closed form with exact masks and nothing computed twice; `train_hardware`
    what the compiled program does, counted, recomputation and dead blocks included; both for the
    whole training. `per_token` is one generated token. `unknown` names what could not be counted.
    """

    train_model: int | None = None
    train_hardware: int | None = None
    per_token: float | None = None
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _settle(self, positive=("train_model", "train_hardware", "per_token"))


@dataclass(frozen=True)
class StateBytes:
    """Bytes that decoding keeps per sequence: `fixed`, and `per_token` more for each token."""

    fixed: int | None = None
    per_token: float | None = None

    def __post_init__(self) -> None:
        _settle(self, least=("fixed", "per_token"))


@dataclass(frozen=True)
class Memory:
    """Bytes of the training step: its temporaries and its arguments, and who says so."""

    temp: int | None = None
    arguments: int | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        _settle(self, positive=("arguments",), least=("temp",))


@dataclass(frozen=True)
class Time:
    """Seconds, with compilation apart; the spread is the slowest step less the fastest."""

    compile: float | None = None
    step_median: float | None = None
    step_spread: float | None = None
    tokens_per_s_train: float | None = None
    tokens_per_s_generate: float | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        rates = ("tokens_per_s_train", "tokens_per_s_generate")
        _settle(self, positive=("compile", "step_median", *rates, "rounds"), least=("step_spread",))


@dataclass(frozen=True)
class Energy:
    """Joules of the training, with the range that the source leaves open.

    `source` begins with "measured" (a counter was read) or "estimated" (a model was applied).
    """

    joules: float | None = None
    low: float | None = None
    high: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        _settle(self, positive=("joules", "low", "high"))
        _within(self, "joules")
        if self.source is not None and not self.source.startswith(("measured", "estimated")):
            wanted = "must begin with 'measured' or 'estimated'"
            raise ConfigError(f"Energy.source {wanted}, got {self.source!r}")

    @property
    def measured(self) -> bool:
        """Tells whether a counter was read."""
        return bool(self.source and self.source.startswith("measured"))


@dataclass(frozen=True)
class Carbon:
    """Grams of CO2-equivalent of that energy."""

    grams: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        _settle(self, positive=("grams", "low", "high"))
        _within(self, "grams")


@dataclass(frozen=True)
class Quality:
    """How good it is: the metric, its value, an interval, and the seeds that it stands on."""

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _settle(self, positive=("value",) if self.name == "bits_per_byte" else ())
        _within(self, "value")


@dataclass(frozen=True)
class Status:
    """Whether the row ran to its end, and why not."""

    finished: bool = True
    reason: str = ""

    def __post_init__(self) -> None:
        _settle(self)
        if not self.finished and not self.reason.strip():
            raise ConfigError("Status.reason must say why the row is not finished, got ''")


@dataclass(frozen=True)
class Record:
    """One row. `reasons` maps each null's dotted name, its group, or "*", to why it is unknown.

    Raises ConfigError for a null without a reason, a reason without a null, a 0 where none can be,
    an interval that misses its value, or a schema that this version does not write.
    """

    run: str
    method: str
    config_digest: str
    corpus: Corpus
    seed: int
    device: Device
    versions: dict[str, str]
    quality: Quality
    recipe: tuple[Any, ...] = ()
    params: Parameters = Parameters()
    bytes: Bytes = Bytes()
    flops: Flops = Flops()
    state_bytes: StateBytes = StateBytes()
    memory: Memory = Memory()
    time: Time = Time()
    energy: Energy = Energy()
    carbon: Carbon = Carbon()
    status: Status = Status()
    reasons: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _settle(self)
        if self.schema != SCHEMA:
            raise ConfigError(f"Record.schema must be {SCHEMA}, got {self.schema}")
        _check_reasons(self)


def nulls(record: Record) -> Iterator[str]:
    """Names the figures of a record that are unknown, dotted."""
    for part in dataclasses.fields(record):
        value = getattr(record, part.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                if getattr(value, inner.name) is None:
                    yield f"{part.name}.{inner.name}"


def reason(record: Record, name: str) -> str | None:
    """Gives the reason for which the figure with this dotted name is unknown, or None."""
    keys = (name, name.partition(".")[0], _WHOLE_RECORD)
    return next((record.reasons[key] for key in keys if key in record.reasons), None)


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> None:
    """Writes the records as one JSON list, atomically: an interruption keeps the old file.

    Raises EffjaxError naming a path that cannot be written.
    """
    rows = [config.to_json(record) for record in records]
    write_text(path, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def read_records(path: str | os.PathLike) -> list[Record]:
    """Reads what `write_records` wrote; each record is equal to the one that was written.

    Raises DataError naming the file and the record: not a list of records, an unknown field (with
    the nearest name), a missing one, a wrong value, or another version of the schema.
    """
    try:
        rows = config.read_json(os.fspath(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    if not isinstance(rows, list):
        raise DataError(f"{os.fspath(path)} must hold a list of records, got {type(rows).__name__}")
    return [_read(row, f"{os.fspath(path)}[{index}]") for index, row in enumerate(rows)]


def _read(row: Any, where: str) -> Record:
    written = row.get("schema") if isinstance(row, dict) else None
    if written != SCHEMA:
        raise DataError(f"{where} has schema {written!r}; this version of effjax reads {SCHEMA}")
    try:
        return config.from_json(Record, row)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


@functools.cache
def _names() -> tuple[str, ...]:
    """The dotted figures and their groups: what a reason can be given for."""
    kinds = {part.name: part.type for part in dataclasses.fields(Record)}
    groups = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    inner = [
        f"{name}.{part.name}" for name, kind in groups.items() for part in dataclasses.fields(kind)
    ]
    return (*inner, *groups, _WHOLE_RECORD)


def _check_reasons(record: Record) -> None:
    unknown = set(nulls(record))
    for name in sorted(unknown):
        if not (reason(record, name) or "").strip():
            raise ConfigError(f"Record.{name} is null without a reason: add reasons[{name!r}]")
    for key in record.reasons:
        if key not in _names():
            raise ConfigError(f"Record.reasons has an unknown key {key!r}{near(key, _names())}")
        covered = {name for name in unknown if key in (name, name.partition(".")[0])}
        if not (unknown if key == _WHOLE_RECORD else covered):
            raise ConfigError(f"Record.reasons[{key!r}] explains no null")
