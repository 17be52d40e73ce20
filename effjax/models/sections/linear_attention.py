"""Sections of a model's config about linear attention and the delta rule."""

from dataclasses import dataclass

from effjax.config import require_finite, require_positive, require_types
from effjax.models.sections.limits import LONGEST, POSITIONS, SHORTEST, SIZE, UNROLLED


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Linear attention.

    head_dim: size of queries, keys and values (None: width // heads). chunk: tokens whose products
    are formed at once; it changes cost, not results.
    """

    heads: int = 4
    head_dim: int | None = None
    chunk: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class PerformerConfig:
    """Performer. features: random features of each head. The rest as in linear attention."""

    heads: int = 4
    head_dim: int | None = None
    features: int = 128
    chunk: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "features", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class RandomFeatureConfig:
    """Random feature attention.

    features: random frequencies of each head, which give a sine and a cosine each. gated: whether
    each token decides what its heads forget. The rest as in linear attention.
    """

    heads: int = 4
    head_dim: int | None = None
    features: int = 64
    gated: bool = True
    chunk: int = 64

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "features", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)


@dataclass(frozen=True)
class DeltaRuleConfig:
    """The delta rule.

    head_dim: size of queries and keys (None: width // heads). value_dim: of values (None: the
    same). taps: tokens that the short convolutions read. chunk: as in linear attention, the next
    power of two.
    """

    heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    taps: int = 4
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "value_dim", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_positive(self, "taps", most=UNROLLED)


@dataclass(frozen=True)
class GatedDeltaRuleConfig:
    """The gated delta rule.

    dt_min, dt_max: the range that step sizes are drawn from log-uniformly. The rest as in the delta
    rule.
    """

    heads: int = 4
    head_dim: int | None = None
    value_dim: int | None = None
    taps: int = 4
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "head_dim", "value_dim", most=SIZE)
        require_positive(self, "chunk", most=POSITIONS)
        require_positive(self, "taps", most=UNROLLED)
        require_finite(self, "dt_min", low=SHORTEST, high=LONGEST)
        require_finite(self, "dt_max", low=self.dt_min, high=LONGEST)
