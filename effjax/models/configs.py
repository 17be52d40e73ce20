"""How to build a model: frozen, validated, a product of small configs (no unions).

A config is read when a model is built and never again: the forward pass takes every size from the
arrays, so that pruned or deepened parameters need no other config.
"""

from dataclasses import dataclass, field
from typing import Literal

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError

Kind = Literal["attention", "window", "retention", "state_space"]


@dataclass(frozen=True)
class AttentionConfig:
    """Causal soft-max attention.

    heads: query heads. kv_heads: key-value heads, which must divide heads (None: as many).
    head_dim: size of a head, even for the rotation (None: width // heads).
    rope_base: the longest wavelength of the rotary positions, in units of 2 pi tokens.
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "heads", "kv_heads", "head_dim")
        require_finite(self, "rope_base", low=1.0, low_open=True)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            name = type(self).__name__
            raise ConfigError(
                f"{name}.kv_heads must divide heads={self.heads}, got {self.kv_heads}"
            )


@dataclass(frozen=True)
class WindowConfig(AttentionConfig):
    """Attention to the last `width` tokens, the token itself included."""

    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "width")


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
        require_positive(self, "heads", "head_dim", "value_dim", "chunk")
        require_finite(self, "rope_base", low=1.0, low_open=True)


@dataclass(frozen=True)
class StateSpaceConfig:
    """A diagonal state space (S4D).

    states: complex states per channel. dt_min, dt_max: the range, in tokens to the minus one, that
    step sizes are drawn from log-uniformly. chunk: as in retention.
    """

    states: int = 16
    dt_min: float = 0.001
    dt_max: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "states", "chunk")
        require_finite(self, "dt_min", low=0.0, low_open=True)
        if self.dt_max < self.dt_min:
            raise ConfigError(
                f"StateSpaceConfig.dt_max must be at least dt_min={self.dt_min:g}, "
                f"got {self.dt_max:g}"
            )


@dataclass(frozen=True)
class SwitchConfig:
    """A Switch mixture of experts: each token goes to one.

    capacity_factor: slots per expert and row in training, as a multiple of an even share.
    balance_weight, z_weight: weights of the load-balancing and router z losses.
    jitter: training multiplies the router's input by a factor in [1 - jitter, 1 + jitter].
    """

    experts: int = 4
    capacity_factor: float = 1.25
    balance_weight: float = 0.01
    z_weight: float = 0.001
    jitter: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "experts")
        require_finite(self, "capacity_factor", low=0.0, low_open=True)
        require_finite(self, "balance_weight", low=0.0)
        require_finite(self, "z_weight", low=0.0)
        require_finite(self, "jitter", low=0.0, high=1.0, high_open=True)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder language model.

    pattern: kinds of mixer, repeated until there are `layers` blocks; its length divides layers.
    hidden: width of the feed-forward network (of each expert). tied: logits by the embedding.
    dtype: of activations; parameters are float32. dropout: rate after each branch, in training.
    """

    vocab: int = 256
    width: int = 128
    hidden: int = 512
    layers: int = 4
    pattern: tuple[Kind, ...] = ("attention",)
    feedforward: Literal["dense", "switch"] = "dense"
    tied: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    state_space: StateSpaceConfig = field(default_factory=StateSpaceConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "vocab", "width", "hidden", "layers")
        require_finite(self, "dropout", low=0.0, high=1.0, high_open=True)
        if not self.pattern:
            raise ConfigError("DecoderConfig.pattern must name at least one mixer, got ()")
        if self.layers % len(self.pattern):
            raise ConfigError(
                f"DecoderConfig.layers must be a multiple of the pattern's {len(self.pattern)} "
                f"blocks, got {self.layers}"
            )
        for kind in ("attention", "window", "retention"):
            if kind in self.pattern:
                self._require_even_heads(kind)

    def _require_even_heads(self, kind: str) -> None:
        own = getattr(self, kind)
        if own.head_dim is None and self.width % own.heads:
            raise ConfigError(
                f"DecoderConfig.width must be a multiple of {kind}.heads={own.heads} when "
                f"{kind}.head_dim is not given, got {self.width}, {self.width / own.heads:g} a head"
            )
        head_dim = own.head_dim or self.width // own.heads
        if head_dim % 2:
            raise ConfigError(
                f"{kind}.head_dim must be even for the rotation, got {head_dim} "
                f"(width={self.width}, heads={own.heads})"
            )

    @property
    def residual_gain(self) -> float:
        """Scale of the projections that write to the residual stream: 1 / sqrt(2 layers).

        Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", 2.3.
        """
        return (2 * self.layers) ** -0.5
