"""RMSNorm for TPUs, through Pallas's Mosaic lowering."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from effjax_kernels.rms_norm import cost, limits

BLOCK_ELEMENTS = 1 << 17  # double-buffered x, dy, dx and float32 temporaries stay under 8 MiB
ROW_MULTIPLE = 16  # sublanes of a bfloat16 register tile; float32 needs 8
MOST_ROWS = 512
WIDEST = BLOCK_ELEMENTS // ROW_MULTIPLE
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: blocks of `rows` full rows."""

    rows: int


def choose_tiles(width: int) -> Tiles:
    """Returns the tiles for rows of `width`: what fills a block, in whole register tiles."""
    return Tiles(rows=min(MOST_ROWS, BLOCK_ELEMENTS // width // ROW_MULTIPLE * ROW_MULTIPLE))


def accept(x: jax.Array, scale: jax.Array) -> None:
    """Raises NotImplementedError, naming what is needed, unless the kernel takes the arguments."""
    limits.require(x, scale, dtypes=DTYPES, widest=WIDEST)


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    *,
    eps: float = 1e-6,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Normalises the last axis of x [..., D]; computes in float32, returns x's dtype."""
    accept(x, scale)
    tiles = choose_tiles(x.shape[-1]) if tiles is None else tiles
    rows = x.reshape(-1, x.shape[-1])
    return _rms_norm(rows, scale[None], eps, tiles, interpret).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, tiles: Tiles, interpret: bool
) -> jax.Array:
    """x [rows D], scale [1 D]."""
    row, fixed, blocks = _specs(x, tiles)
    return pl.pallas_call(
        functools.partial(_forward_kernel, eps=eps),
        grid=(blocks,),
        in_specs=[row, fixed],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost.forward_estimate(x, scale),
        interpret=interpret,
        name="rms_norm_forward",
    )(x, scale)


def _save(x: jax.Array, scale: jax.Array, eps: float, tiles: Tiles, interpret: bool) -> tuple:
    return _rms_norm(x, scale, eps, tiles, interpret), (x, scale)


def _backward(eps: float, tiles: Tiles, interpret: bool, saved: tuple, dy: jax.Array) -> tuple:
    x, scale = saved
    row, fixed, blocks = _specs(x, tiles)
    dx, dscale = pl.pallas_call(
        functools.partial(_backward_kernel, eps=eps, rows=x.shape[0]),
        grid=(blocks,),
        in_specs=[row, fixed, row],
        out_specs=[row, fixed],
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(scale.shape, jnp.float32),
        ),
        # Blocks run in order: each adds to the scale's gradient, which stays in fast memory.
        compiler_params=tpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=cost.backward_estimate(x, scale, partials=1),
        interpret=interpret,
        name="rms_norm_backward",
    )(x, scale, dy)
    return dx, dscale.astype(scale.dtype)


_rms_norm.defvjp(_save, _backward)


def _specs(x: jax.Array, tiles: Tiles) -> tuple[pl.BlockSpec, pl.BlockSpec, int]:
    """The specification of a block of rows, of the scale, and the number of blocks."""
    height = min(tiles.rows, x.shape[0])  # a block as high as the array may have any height
    row = pl.BlockSpec((height, x.shape[1]), lambda i: (i, 0))
    fixed = pl.BlockSpec((1, x.shape[1]), lambda i: (0, 0))
    return row, fixed, pl.cdiv(x.shape[0], height)


def _forward_kernel(x_ref, scale_ref, y_ref, *, eps: float) -> None:
    """Rows past the end hold garbage and write nothing: a row reads only itself."""
    x = x_ref[...].astype(jnp.float32)
    y = x * _inverse_rms(x, eps) * scale_ref[...].astype(jnp.float32)
    y_ref[...] = y.astype(y_ref.dtype)


def _backward_kernel(
    x_ref, scale_ref, dy_ref, dx_ref, dscale_ref, *, eps: float, rows: int
) -> None:
    """As forward, but the scale's gradient sums over rows: those past the end must not count."""
    x, dy = x_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
    inverse = _inverse_rms(x, eps)
    n, g = x * inverse, dy * scale_ref[...].astype(jnp.float32)
    mean = jnp.mean(g * n, axis=1, keepdims=True)
    dx_ref[...] = (inverse * (g - n * mean)).astype(dx_ref.dtype)

    row = pl.program_id(0) * x.shape[0] + lax.broadcasted_iota(jnp.int32, x.shape, 0)
    share = jnp.sum(jnp.where(row < rows, dy * n, 0.0), axis=0, keepdims=True)

    @pl.when(pl.program_id(0) == 0)
    def _start():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)

    dscale_ref[...] += share


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
