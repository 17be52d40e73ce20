"""How attention turns scores into weights, by the name in `AttentionConfig.normalizer`."""

import math
from typing import Any

import jax
from flax import nnx

from effjax.models.functional import Keys
from effjax.models.sections import AttentionConfig
from effjax.ops.attention.entmax import Entmax
from effjax.weights import Axes


class Softmax(nnx.Module):
    """exp, divided by its sum: no weight is zero."""

    def __init__(self, config: AttentionConfig, rngs: Keys):
        pass

    def __call__(self) -> Entmax | None:
        """The engine's `normalizer`."""
        return None


class FixedEntmax(Softmax):
    """alpha-entmax with the config's alpha in every head."""

    def __init__(self, config: AttentionConfig, rngs: Keys):
        self.alpha = config.alpha

    def __call__(self) -> Entmax | None:
        return Entmax(self.alpha)


class AdaptiveEntmax(Softmax):
    """alpha-entmax whose alpha each head learns: `alpha = 1 + sigmoid(a)`, between 1 and 2.

    a starts as a standard normal around what gives the config's alpha, 0 for 1.5.

    Source: Correia et al. 2019, Adaptively Sparse Transformers, section 3,
    https://arxiv.org/abs/1909.00015; the start is that of their code, which also keeps alpha above
    1.01. Ours has no need to: derivatives stay accurate down to 1.
    """

    def __init__(self, config: AttentionConfig, rngs: Keys):
        middle = math.log((config.alpha - 1) / (2 - config.alpha))
        start = middle + jax.random.normal(rngs(), (config.heads,))
        self.bend = nnx.Param(start, axes=Axes((), ("heads",)))

    def __call__(self) -> Entmax | None:
        return Entmax(1 + jax.nn.sigmoid(self.bend.get_value()))


NORMALIZERS: dict[str, Any] = {
    "softmax": Softmax,
    "entmax": FixedEntmax,
    "adaptive": AdaptiveEntmax,
}
