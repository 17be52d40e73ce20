"""The Monarch matrix nearest to a dense one, block by block."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError


def near_root(size: int) -> int:
    """The divisor d of a size n that is nearest to its root, as a ratio; the larger of d and n / d.

    Source: Dao et al. 2022, section 3.1, https://arxiv.org/abs/2204.00595: sqrt(n) blocks.
    """
    return min(d for d in range(1, size + 1) if size % d == 0 and d * d >= size)


def monarch_blocks(where: str, side: str, size: int, blocks: Any) -> int:
    """How many blocks one side of a Monarch matrix is cut into: what is given, or near the root.

    where, side: what an error calls the matrix and the side.

    Raises:
        ConfigError: blocks that do not divide the size, with the nearest that do; without blocks, a
            size that has no divisor near its root.

    Source: Dao et al. 2022, section 3.1, https://arxiv.org/abs/2204.00595
    """
    if blocks is None:
        nearest = near_root(size)
        if nearest == size > 3:
            raise ConfigError(
                f"{where}: {size} {side} have no divisor but 1 and {size}, give blocks"
            )
        return nearest
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks <= size:
        raise ConfigError(
            f"{where}: blocks must be an integer from 1 to {size} ({side}), got {blocks!r}"
        )
    if size % blocks:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        below = max(d for d in divisors if d < blocks)
        above = min(d for d in divisors if d > blocks)
        raise ConfigError(
            f"{where}: blocks must divide the {size} {side}, got {blocks}; near: {below}, {above}"
        )
    return blocks


def project_monarch(
    w: Float[Array, "D F"], blocks_in: int, blocks_out: int, rank: int
) -> tuple[Float[Array, "D L R"], Float[Array, "K R F"]]:
    """Factors of the Monarch matrix nearest to W: the best rank-R block for each of its blocks.

        min ||W - M||_F = sqrt(sum over blocks of the squared singular values after the R-th)

    The blocks of a Monarch matrix are free of one another, so that each is a problem of its own and
    the result is the nearest matrix of all. Both factors of a block have one norm. A matrix that is
    Monarch with these blocks is recovered up to rounding.

    Args:
        w: inputs by outputs. blocks_in, blocks_out: K and L, which divide them. rank: of a block.

    Returns:
        right and left, as in `effjax.weights.Monarch`.

    Source: Dao et al. 2022, section 3.3 and algorithm 1, https://arxiv.org/abs/2204.00595; ranks
    above 1 as in its code, https://github.com/HazyResearch/fly
    """
    D, F = w.shape
    K, L = blocks_in, blocks_out
    grid = w.reshape(K, D // K, F // L, L).transpose(0, 3, 1, 2)
    u, s, vt = jnp.linalg.svd(grid, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    right = u[..., :rank] * root[:, :, None, :]
    left = root[..., None] * vt[..., :rank, :]
    return right.transpose(0, 2, 1, 3).reshape(D, L, rank), left.transpose(0, 2, 3, 1).reshape(
        K, rank, F
    )
