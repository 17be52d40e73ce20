"""A dense layer whose kernel is a Monarch matrix from the start."""

import math

import jax
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.functional import Keys
from effjax.models.layers import Dense, Sizes
from effjax.ops.structured.monarch import monarch_blocks
from effjax.weights import Axes, Monarch


class MonarchDense(Dense):
    """y = einsum(spec, x, kernel) with a `Monarch` kernel, in the place of a `Dense` layer.

    Both factors are drawn truncated-normal, of variance 1 / (the sum's length), so that y has the
    spread that a dense kernel's has.

    Source: Dao et al. 2022, section 3.1, https://arxiv.org/abs/2204.00595; Fu et al. 2023, Monarch
    Mixer, section 3, https://arxiv.org/abs/2310.12109
    """

    def __init__(
        self,
        spec: str,
        inputs: Sizes,
        outputs: Sizes,
        rngs: Keys,
        *,
        blocks: int | None = None,
        rank: int = 1,
        gain: float = 1.0,
    ):
        sizes = [[size for _, size in side] for side in (inputs, outputs)]
        flat = [math.prod(side) for side in sizes]
        names = [tuple(name for name, _ in side) for side in (inputs, outputs)]
        where = f"monarch kernel from {'/'.join(names[0])} to {'/'.join(names[1])}"
        K, L = (
            monarch_blocks(where, side, size, blocks)
            for side, size in zip(("inputs", "outputs"), flat, strict=True)
        )
        if rank > min(flat[0] // K, flat[1] // L):
            raise ConfigError(
                f"{where}: rank must be at most {min(flat[0] // K, flat[1] // L)}, the smaller "
                f"side of a block of {flat[0] // K} by {flat[1] // L}, got {rank}"
            )
        self.spec = spec
        right = _normal(rngs, 1.0, flat[0] // K, *sizes[0], L, rank)
        left = _normal(rngs, gain, K * rank, K, rank, *sizes[1])
        self.kernel = nnx.Param(Monarch(right, left, len(sizes[0])), axes=Axes(*names))


def _normal(rngs: Keys, gain: float, terms: int, *shape: int) -> jax.Array:
    """A factor whose sums of so many terms keep the spread, times the gain."""
    # A normal cut at two standard deviations keeps 0.8796 of its spread.
    spread = gain / (0.87962566 * math.sqrt(terms))
    return spread * jax.random.truncated_normal(rngs(), -2, 2, shape)
