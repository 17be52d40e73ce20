"""Sections of a model's config about long convolutions: orders, and what makes their kernels."""

from dataclasses import dataclass

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError
from effjax.models.sections.limits import SIZE, UNROLLED


@dataclass(frozen=True)
class HyenaConfig:
    """Hyena: gates and implicit long filters in turn.

    order: gates, one more than long convolutions. length: positions that filters reach back; texts
    may be longer, what is farther is not read. width: of the short convolution, in tokens.
    bands, hidden, inner, frequency: of the network that makes filters, the bands of its positions,
    the width and number of its hidden layers beside the first, the start of its sines' frequency.
    slow, fast: shares of the length after which the window of the first and of the last channel
    falls to `target`; shift: what it falls to in the end.
    """

    order: int = 2
    length: int = 1024
    width: int = 3
    bands: int = 16
    hidden: int = 64
    inner: int = 2
    frequency: float = 14.0
    slow: float = 1.5
    fast: float = 0.3
    target: float = 0.01
    shift: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length", "bands", "hidden", most=SIZE)
        require_positive(self, "order", "width", "inner", most=UNROLLED)
        for name in ("frequency", "slow", "fast"):
            require_finite(self, name, low=1e-3, high=1e6)
        require_finite(self, "target", low=0.0, low_open=True, high=1.0, high_open=True)
        require_finite(self, "shift", low=0.0, high=1e3)
        if self.order < 2:
            raise ConfigError(f"HyenaConfig.order must be at least 2, got {self.order}")


@dataclass(frozen=True)
class SGConvConfig:
    """SGConv: kernels of scales that double.

    length: positions that kernels reach back at least. taps: weights of each scale. decay: the
    weight of a scale relative to the one before, above 0 and at most 1.
    """

    length: int = 1024
    taps: int = 64
    decay: float = 0.5

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length", "taps", most=SIZE)
        require_finite(self, "decay", low=0.0, low_open=True, high=1.0)
