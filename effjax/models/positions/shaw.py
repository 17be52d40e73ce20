"""Relative position representations."""

import jax
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.configs import StackConfig
from effjax.models.functional import Keys
from effjax.models.positions.none import NoPositions
from effjax.ops.attention.bias import Bias
from effjax.ops.position.shaw import ShawTables
from effjax.weights import Axes


class ShawPositions(NoPositions):
    """Vectors by clipped distance, for keys and for values, shared by a layer's heads.

    They begin uniform, up to sqrt(6 / (rows + H)), as in the authors' tensor2tensor (Glorot).
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        rows, H = 2 * config.position.clip + 1, config.head_dim("attention")
        bound = (6 / (rows + H)) ** 0.5
        self.keys, self.values = (
            nnx.Param(
                jax.random.uniform(rngs(), (rows, H), minval=-bound, maxval=bound),
                axes=Axes((), ("distances", "head")),
            )
            for _ in range(2)
        )

    def bias(self) -> Bias | None:
        raise ConfigError(
            "position scheme 'shaw' adds vectors to keys and values, which this kind of attention "
            "does not: use it with plain attention over a pattern"
        )

    def tables(self) -> ShawTables:
        return ShawTables(self.keys.get_value(), self.values.get_value())
