"""Butterfly matrices in the place of dense ones: in a trained model or a fresh one."""

import math

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.ops.structured.butterfly import project_butterfly
from effjax.transforms._lift import core_shape, in_turn, on_bases
from effjax.transforms.factorize.monarch import norm_ratio
from effjax.weights import AnyWeight, Axes, Butterfly, Tree, Where
from effjax.weights.structured import power_of_two


def butterfly(params: Tree, axes: Tree, *, keep_norm: bool = False, where: Where = None) -> Tree:
    """Replaces every selected weight, as the matrix [inputs, outputs], by butterflies near it.

    Inputs and outputs are cut into blocks of n, the largest power of two that divides both; every
    pair of blocks becomes a product of log2 n sparse stages: 2 n log2 n numbers and multiply-adds
    instead of n^2. A true butterfly (a Hadamard matrix) is recovered; of another matrix the fit
    goes stage by stage. keep_norm: as in `monarch`, for a fresh model.

    Raises ConfigError: sizes without a common power of two of at least 4.

    Source: Dao et al. 2019, https://arxiv.org/abs/1903.05895; the fit is Le, Zheng, Riccietti and
    Gribonval's 2022, section 3, https://arxiv.org/abs/2110.01230.
    """

    def one(path: str, w: AnyWeight, ax: Axes) -> Butterfly:
        _, inputs, outputs = core_shape(w, ax)
        rows, columns = math.prod(inputs), math.prod(outputs)
        if (size := power_of_two(rows, columns)) < 4:
            raise ConfigError(
                f"butterfly at {path!r}: a power of two of at least 4 must divide {rows} inputs "
                f"and {columns} outputs, got {size}"
            )
        return in_turn(_project, ax, w, size=size, keep_norm=keep_norm)

    return on_bases("butterfly", one, params, axes, where)


def _project(w: jax.Array, *, axes: Axes, size: int, keep_norm: bool) -> Butterfly:
    _, inputs, outputs = core_shape(w, axes)
    matrix = w.astype(jnp.float32).reshape(math.prod(inputs), -1)
    grid = matrix.reshape(-1, size, matrix.shape[1] // size, size).transpose(0, 2, 3, 1)
    stages = jax.vmap(jax.vmap(project_butterfly))(grid)  # [Ci Co J n 2]
    blocks_in, blocks_out, count = stages.shape[:3]
    half = count // 2
    first = stages[:, :, :half].transpose(1, 2, 0, 3, 4)
    last = stages[:, :, half:].transpose(0, 2, 1, 3, 4)
    made = Butterfly(
        first.reshape(blocks_out, half, *inputs, 2),
        last.reshape(blocks_in, count - half, *outputs, 2),
        len(inputs),
    )
    if keep_norm:
        share = norm_ratio(matrix, made.materialize()) ** (1 / count)
        made = made.replaced(
            first=made.first * share,
            last=made.last * share,
        )
    return jax.tree.map(lambda part: part.astype(w.dtype), made)
