"""Randomized positions: a scheme that in training sees an ordered sample of a larger range."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.configs import StackConfig
from effjax.models.functional import Keys
from effjax.models.positions.none import NoPositions
from effjax.ops.attention.bias import Bias
from effjax.ops.position.randomized import PlacedBias, random_places, replace_positions
from effjax.ops.position.shaw import ShawTables

REFUSAL = (
    "position scheme 'randomized' draws places for each call, which this kind of attention does "
    "not: use it with plain attention over a pattern"
)


class Placed:
    """A scheme that sees `places[p]` for position p; what may be read stays a matter of p."""

    rotates_cache: ClassVar[bool] = False

    def __init__(self, base: NoPositions, places: jax.Array):
        self.base, self.places = base, places

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return self.base.rotate(x, replace_positions(positions, self.places))

    def bias(self) -> Bias | None:
        bias = self.base.bias()
        return None if bias is None else PlacedBias(bias, self.places)

    def tables(self) -> ShawTables | None:
        return None


class RandomizedEmbedding(nnx.Module):
    """An absolute embedding at places that are drawn from the call's key."""

    def __init__(self, base: Any, reach: int):
        self.base, self.reach = base, reach

    def __call__(
        self, x: jax.Array, positions: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        if key is not None:
            places = random_places(key, positions.shape[1], self.reach)
            positions = replace_positions(positions, places)
        return self.base(x, positions)


def randomized(schemes: dict[str, Any]) -> type[NoPositions]:
    """The scheme whose base is a name of `schemes`."""

    class RandomizedPositions(NoPositions):
        """Places in training that are drawn anew for each call and layer; positions otherwise.

        See `effjax.ops.position.randomized`. In evaluation (no key), and where a state goes on from
        an earlier call, positions are what they are; the paper draws in evaluation too.
        """

        def __init__(self, config: StackConfig, rngs: Keys):
            self.base = schemes[config.position.base_scheme](config, rngs)
            self.reach = config.position.reach

        @classmethod
        def embedding(cls, config: StackConfig, rngs: Keys) -> Any:
            base = schemes[config.position.base_scheme].embedding(config, rngs)
            return None if base is None else RandomizedEmbedding(base, config.position.reach)

        def drawn(self, key: jax.Array | None, length: int) -> Any:
            if key is None:
                return self.base
            return Placed(self.base, random_places(key, length, self.reach))

        def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
            raise ConfigError(REFUSAL)

        def bias(self) -> Bias | None:
            raise ConfigError(REFUSAL)

    return RandomizedPositions
