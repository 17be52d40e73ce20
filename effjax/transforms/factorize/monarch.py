"""Monarch matrices in the place of dense ones: in a trained model or a fresh one."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.ops.structured.monarch import monarch_blocks, project_monarch
from effjax.transforms._lift import core_shape, in_turn, on_bases
from effjax.transforms._options import require_integer
from effjax.weights import AnyWeight, Axes, Monarch, Tree, Where


def monarch(
    params: Tree,
    axes: Tree,
    *,
    blocks: int | Sequence[int] | None = None,
    rank: int = 1,
    keep_norm: bool = False,
    where: Where = None,
) -> Tree:
    """Replaces every selected weight, as the matrix [inputs, outputs], by the nearest Monarch one.

        W ~ M, whose every block (k, l) of K x L has rank R, at R (L inputs + K outputs) numbers

    blocks: [K, L], how many the inputs and the outputs are cut into, or one number for both; None:
    for each the divisor nearest to its square root, at which n inputs and n outputs take 2 R n^1.5
    numbers and multiply-adds instead of n^2. Fewer blocks and a higher rank are nearer to W.
    keep_norm: scales M to W's norm. The nearest matrix is smaller than W, which is right for a
    trained model; of a fresh one this makes a random Monarch matrix whose products have the spread
    that W's have, to train from the start.

    Raises ConfigError: blocks that do not divide, a size without divisors near its root when blocks
    are not given, a rank above a block's smaller side.

    Source: Dao et al. 2022, "Monarch", section 3.3, https://arxiv.org/abs/2204.00595; the nearest
    rank-1 blocks are its algorithm 1.
    """
    wanted = _require_blocks(blocks)
    require_integer("monarch", "rank", rank, 1)

    def one(path: str, w: AnyWeight, ax: Axes) -> Monarch:
        _, inputs, outputs = core_shape(w, ax)
        sides = zip(("inputs", "outputs"), map(math.prod, (inputs, outputs)), wanted, strict=True)
        grid = [monarch_blocks(f"monarch at {path!r}", *side) for side in sides]
        height, width = math.prod(inputs) // grid[0], math.prod(outputs) // grid[1]
        why = f"blocks of {height} inputs and {width} outputs"
        require_integer(f"monarch at {path!r}", "rank", rank, 1, min(height, width), why)
        return in_turn(_project, ax, w, blocks=tuple(grid), rank=rank, keep_norm=keep_norm)

    return on_bases("monarch", one, params, axes, where)


def _project(
    w: jax.Array, *, axes: Axes, blocks: tuple[int, int], rank: int, keep_norm: bool
) -> Monarch:
    _, inputs, outputs = core_shape(w, axes)
    matrix = w.astype(jnp.float32).reshape(math.prod(inputs), -1)
    right, left = project_monarch(matrix, *blocks, rank)
    right = right.reshape(*inputs, *right.shape[1:])
    made = Monarch(right, left.reshape(*left.shape[:2], *outputs), len(inputs))
    if keep_norm:
        gain = jnp.sqrt(norm_ratio(matrix, made.materialize()))
        made = made.replaced(right=made.right * gain, left=made.left * gain)
    return jax.tree.map(lambda part: part.astype(w.dtype), made)


def norm_ratio(w: jax.Array, made: jax.Array) -> jax.Array:
    """||W|| / ||M||, Frobenius; 1 where M is 0.

    Source: none, arithmetic.
    """
    norm = jnp.linalg.norm(made.ravel())
    return jnp.where(norm > 0, jnp.linalg.norm(w.ravel()) / jnp.where(norm > 0, norm, 1), 1)


def _require_blocks(blocks: int | Sequence[int] | None) -> Sequence[int | None]:
    if blocks is None or (isinstance(blocks, int) and not isinstance(blocks, bool)):
        return blocks, blocks
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != 2:
        raise ConfigError(f"monarch: blocks must be a number or two, got {blocks!r}")
    return blocks
