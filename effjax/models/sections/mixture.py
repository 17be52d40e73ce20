"""The section of a model's config about mixtures of experts."""

from dataclasses import dataclass

from effjax.config import require_finite, require_positive, require_types


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
