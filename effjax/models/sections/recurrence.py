"""Sections of a model's config about recurrences: sizes of their memories, and their starts."""

from dataclasses import dataclass
from typing import Literal

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError
from effjax.models.sections.limits import LONGEST, POSITIONS, SHORTEST, SIZE, UNROLLED


@dataclass(frozen=True)
class RetentionConfig:
    """Multi-scale retention.

    head_dim: size of queries and keys (None: width // heads). value_dim: of values (None: the
    same). chunk: tokens whose products are formed at once; it changes cost, not results.
    """

    heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    rope_base: float = 10_000.0
    chunk: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "value_dim", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_finite(self, "rope_base", low=1.0, low_open=True)


@dataclass(frozen=True)
class MambaConfig:
    """Mamba.

    expand: channels, as a multiple of the width. states: of each channel. taps: tokens that the
    short convolution reads. rank: of the steps' projection (None: width / 16, rounded up). dt_min,
    dt_max: the range that step sizes are drawn from log-uniformly. piece: tokens between the
    memories that training keeps; it changes cost, not results.
    """

    expand: int = 2
    states: int = 16
    taps: int = 4
    rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    piece: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "expand", "states", "rank", most=SIZE)
        require_positive(self, "piece", most=POSITIONS)
        require_positive(self, "taps", most=UNROLLED)
        require_finite(self, "dt_min", low=SHORTEST, high=LONGEST)
        require_finite(self, "dt_max", low=self.dt_min, high=LONGEST)


@dataclass(frozen=True)
class RGLRUConfig:
    """Griffin's recurrent block.

    channels: of the unit (None: as many as the width; the paper has 4/3 of it). blocks: parts of
    them, whose gates read no other part's channels; they must divide the channels. taps: tokens
    that the short convolution reads.
    """

    channels: int | None = None
    blocks: int = 16
    taps: int = 4

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "channels", "blocks", most=SIZE)
        require_positive(self, "taps", most=UNROLLED)
        if self.channels is not None and self.channels % self.blocks:
            raise ConfigError(
                f"RGLRUConfig.blocks must divide channels={self.channels}, got {self.blocks}"
            )


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2.

    head_dim: size of a head's inputs (None: the inner width is twice the model's). states: size of
    the keys b and queries c, which the heads of each of the groups share. taps: tokens that the
    short convolution reads. dt_min, dt_max: the range that step sizes are drawn from
    log-uniformly. chunk: as in retention.
    """

    heads: int = 4
    head_dim: int | None = None
    states: int = 64
    groups: int = 1
    taps: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "states", "groups", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_positive(self, "taps", most=UNROLLED)
        require_finite(self, "dt_min", low=SHORTEST, high=LONGEST)
        require_finite(self, "dt_max", low=self.dt_min, high=LONGEST)
        if self.heads % self.groups:
            raise ConfigError(
                f"Mamba2Config.groups must divide heads={self.heads}, got {self.groups}"
            )


@dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """Gated linear attention.

    head_dim: size of values (None: width // heads). key_dim: of queries and keys (None: half of
    that). rank: of the gates' projection. tau: gates are sigmoids to the power of 1 / tau; the
    higher, the slower memories fade at first. chunk: as in retention, a power of two.
    """

    heads: int = 4
    head_dim: int | None = None
    key_dim: int | None = None
    rank: int = 16
    tau: float = 16.0
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "key_dim", "rank", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_finite(self, "tau", low=1e-3, high=1e6)


@dataclass(frozen=True)
class RWKVConfig:
    """RWKV-4's time mixing, as wide as the model. chunk: as in retention (None: the platform's)."""

    chunk: int | None = None

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class AFTConfig:
    """The position biases of AFT-full and AFT-local.

    length: positions that have rows of their own; later ones share the last. rank: products in a
    bias. window: distances that have a bias in AFT-local. spread: of the rows at the start.
    """

    length: int = 512
    rank: int = 64
    window: int = 32
    spread: float = 0.01

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length", "rank", most=SIZE)
        require_positive(self, "window", most=POSITIONS)
        require_finite(self, "spread", low=0.0, high=1e3)


@dataclass(frozen=True)
class AFTConvConfig:
    """AFT-conv.

    heads: keys, and rows of biases. head_dim: channels of a head (None: width // heads). window:
    distances that have a bias. gain: what the biases are multiplied by at the start.
    """

    heads: int = 4
    head_dim: int | None = None
    window: int = 32
    gain: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "window", most=SIZE)
        require_finite(self, "gain", low=0.0, high=1e3)


@dataclass(frozen=True)
class EMAConfig:
    """A damped moving average of many dimensions.

    states: modes per channel. chunk: as in retention.
    """

    states: int = 16
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class MegaConfig:
    """Mega's gated attention of one head; its moving average is the section `ema`.

    key_dim: size of queries and keys, even. value_dim: of values (None: twice the width).
    function: what makes weights of scores; the sum of "laplace" ones is not held to 1. chunk:
    positions that "mega_chunk" attends within.
    """

    key_dim: int = 32
    value_dim: int | None = None
    function: Literal["softmax", "laplace"] = "softmax"
    chunk: int = 128

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "key_dim", "value_dim", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        if self.key_dim % 2:
            raise ConfigError(f"MegaConfig.key_dim must be even, got {self.key_dim}")
