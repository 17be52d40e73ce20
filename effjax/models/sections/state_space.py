"""Sections of a model's config about state spaces."""

from dataclasses import dataclass
from typing import Any, Literal

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError
from effjax.models.sections.limits import LONGEST, POSITIONS, SHORTEST, SIZE, UNROLLED


@dataclass(frozen=True)
class StateSpaceConfig:
    """A diagonal state space (S4D).

    states: complex states per channel. start: the modes at first, as in the paper: "lin", "inv" or
    "legs". dt_min, dt_max: the range, in tokens to the minus one, that step sizes are drawn from
    log-uniformly. chunk: as in retention.
    """

    states: int = 16
    start: Literal["lin", "inv", "legs"] = "lin"
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        _require_steps(self)


@dataclass(frozen=True)
class S4Config:
    """A state space of HiPPO's matrix, diagonal plus rank one (S4). The rest as in S4D."""

    states: int = 16
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        _require_steps(self)


@dataclass(frozen=True)
class DSSConfig:
    """A diagonal state space whose modes all channels share (DSS).

    kernel: "softmax" over `length` tokens, or "exp". The rest as in S4D.
    """

    states: int = 16
    kernel: Literal["softmax", "exp"] = "softmax"
    length: int = 512
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", most=SIZE)
        require_positive(self, "length", "chunk", most=POSITIONS)
        _require_steps(self)


@dataclass(frozen=True)
class GSSConfig:
    """A gated state space.

    states: complex modes that the channels share. narrow: channels of the state space (None: a
    quarter of the width). wide: units of the gate (None: twice the width, for as many weights as
    attention has; the paper's four times stand without a feed-forward network). chunk: as in
    retention.
    """

    states: int = 64
    narrow: int | None = None
    wide: int | None = None
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", "narrow", "wide", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class H3Config:
    """H3: a shift and a diagonal memory of products of keys and values.

    head_dim: size of queries, keys and values (None: width // heads); a head remembers its square
    of products. states: complex states of each. taps: tokens that the shift reads, the paper's
    state of the shift (64 in its code). The rest as in S4D.
    """

    heads: int = 16
    head_dim: int | None = None
    states: int = 16
    taps: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "states", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_positive(self, "taps", most=UNROLLED)
        _require_steps(self)


def _require_steps(config: Any) -> None:
    """Raises ConfigError unless 0 < dt_min <= dt_max, both finite."""
    require_finite(config, "dt_min", low=SHORTEST, high=LONGEST)
    require_finite(config, "dt_max", low=SHORTEST, high=LONGEST)
    if config.dt_max < config.dt_min:
        raise ConfigError(
            f"{type(config).__name__}.dt_max must be at least dt_min={config.dt_min:g}, "
            f"got {config.dt_max:g}"
        )
