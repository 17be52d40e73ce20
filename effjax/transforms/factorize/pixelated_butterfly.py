"""Dense blocks in a butterfly's pattern beside thin factors, in the place of dense weights."""

import math

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.ops.structured.pixelated_butterfly import fit_pixelated
from effjax.transforms._lift import core_shape, in_turn, on_bases
from effjax.transforms._options import require_integer, require_rank
from effjax.transforms.factorize.monarch import norm_ratio
from effjax.weights import AnyWeight, Axes, PixelatedButterfly, Tree, Where
from effjax.weights.structured import power_of_two


def pixelated_butterfly(
    params: Tree,
    axes: Tree,
    *,
    blocks: int,
    rank: int,
    stride: int | None = None,
    rounds: int = 4,
    keep_norm: bool = False,
    where: Where = None,
) -> Tree:
    """Replaces every selected weight by M x M blocks, few of them dense, plus a rank-R product.

        W ~ B + a b      block (i, j) of B is dense where i = j or i and j differ in one bit

    blocks: M, a power of two; a block has inputs / M rows and outputs / M columns. stride: the
    value of the largest bit that counts (None: all), so that a share (1 + log2(2 stride)) / M of W
    stays dense. rounds: of the fit, which takes a singular value decomposition each. keep_norm: as
    in `monarch`, for a fresh model.

    Raises ConfigError: blocks that are no power of two or do not divide, a stride that is none
    below M, a rank above the smaller side.

    Source: Chen et al. 2021, "Pixelated Butterfly", section 3, https://arxiv.org/abs/2112.00029;
    the fit of a trained matrix is ours, see `fit_pixelated`.
    """
    require_integer("pixelated_butterfly", "blocks", blocks, 2)
    stride = blocks // 2 if stride is None else stride
    require_integer("pixelated_butterfly", "stride", stride, 0, blocks // 2, "half of blocks")
    for name, value in (("blocks", blocks), ("stride", stride)):
        if value & (value - 1):
            raise ConfigError(f"pixelated_butterfly: {name} must be a power of two, got {value}")
    require_integer("pixelated_butterfly", "rounds", rounds, 1)

    def one(path: str, w: AnyWeight, ax: Axes) -> PixelatedButterfly:
        _, inputs, outputs = core_shape(w, ax)
        rows, columns = math.prod(inputs), math.prod(outputs)
        if rows % blocks or columns % blocks:
            raise ConfigError(
                f"pixelated_butterfly at {path!r}: blocks must divide {rows} inputs and {columns} "
                f"outputs, got {blocks}; at most {power_of_two(rows, columns)}"
            )
        require_rank("pixelated_butterfly", path, rank, rows, columns)
        options = {"blocks": blocks, "stride": stride, "rank": rank, "rounds": rounds}
        return in_turn(_fit, ax, w, keep_norm=keep_norm, **options)

    return on_bases("pixelated_butterfly", one, params, axes, where)


def _fit(w: jax.Array, *, axes: Axes, keep_norm: bool, **options: int) -> PixelatedButterfly:
    _, inputs, outputs = core_shape(w, axes)
    matrix = w.astype(jnp.float32).reshape(math.prod(inputs), -1)
    dense, a, b = fit_pixelated(matrix, **options)
    made = PixelatedButterfly(
        dense.reshape(*inputs, *dense.shape[1:]),
        a.reshape(*inputs, -1),
        b.reshape(-1, *outputs),
        len(inputs),
    )
    if keep_norm:
        gain = norm_ratio(matrix, made.materialize())
        root = jnp.sqrt(gain)
        made = made.replaced(blocks=made.blocks * gain, a=made.a * root, b=made.b * root)
    return jax.tree.map(lambda part: part.astype(w.dtype), made)
