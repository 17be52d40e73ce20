"""RMSNorm for NVIDIA and AMD GPUs, through Pallas's Triton lowering."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from effjax_kernels.rms_norm import cost, limits

WIDEST = 16384  # columns: a row is held in the registers of one block of threads
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: `rows` per step, at most `programs` going backward, `warps` each."""

    rows: int
    programs: int
    warps: int


def choose_tiles(width: int) -> Tiles:
    """Returns the tiles for rows of `width`: about 4096 elements a step, 32 a thread.

    The backward kernel has at most 512 programs, each of which keeps a partial sum of the scale's
    gradient: four for each processor of the largest GPUs, and few bytes beside those of x.
    """
    rows = max(1, 4096 // pl.next_power_of_2(width))
    warps = min(16, max(4, rows * pl.next_power_of_2(width) // 1024))
    return Tiles(rows=rows, programs=512, warps=warps)


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
    return _rms_norm(x.reshape(-1, x.shape[-1]), scale, eps, tiles, interpret).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, tiles: Tiles, interpret: bool
) -> jax.Array:
    return pl.pallas_call(
        functools.partial(_forward_kernel, eps=eps, tile=tiles.rows),
        grid=(pl.cdiv(x.shape[0], tiles.rows),),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=cost.forward_estimate(x, scale),
        interpret=interpret,
        name="rms_norm_forward",
    )(x, scale)


def _save(x: jax.Array, scale: jax.Array, eps: float, tiles: Tiles, interpret: bool) -> tuple:
    return _rms_norm(x, scale, eps, tiles, interpret), (x, scale)


def _backward(eps: float, tiles: Tiles, interpret: bool, saved: tuple, dy: jax.Array) -> tuple:
    x, scale = saved
    steps = pl.cdiv(pl.cdiv(x.shape[0], tiles.rows), tiles.programs)  # row tiles per program
    programs = pl.cdiv(x.shape[0], tiles.rows * steps)
    dx, partial = pl.pallas_call(
        functools.partial(_backward_kernel, eps=eps, tile=tiles.rows, steps=steps),
        grid=(programs,),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, x.shape[1]), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        cost_estimate=cost.backward_estimate(x, scale, programs),
        interpret=interpret,
        name="rms_norm_backward",
    )(x, scale, dy)
    return dx, partial.sum(0).astype(scale.dtype)


_rms_norm.defvjp(_save, _backward)


def _forward_kernel(x_ref, scale_ref, y_ref, *, eps: float, tile: int) -> None:
    """One tile of rows; every load and store is masked, since Triton's sizes are powers of two."""
    place, mask, column = _tile(x_ref.shape, pl.program_id(0), tile)
    x = triton.load(x_ref.at[place], mask=mask, other=0).astype(jnp.float32)
    scale = _load_scale(scale_ref, column)
    y = x * _inverse_rms(x, x_ref.shape[1], eps) * scale[None]
    triton.store(y_ref.at[place], y.astype(y_ref.dtype), mask=mask)


def _backward_kernel(
    x_ref, scale_ref, dy_ref, dx_ref, partial_ref, *, eps: float, tile: int, steps: int
) -> None:
    """`steps` tiles of rows, whose share of the scale's gradient stays in registers."""
    width = x_ref.shape[1]
    column = _columns(width)
    scale = _load_scale(scale_ref, column)
    program = pl.program_id(0)  # interpret mode knows it outside of loops only

    def step(i, total):
        place, mask, _ = _tile(x_ref.shape, program * steps + i, tile)
        x = triton.load(x_ref.at[place], mask=mask, other=0).astype(jnp.float32)
        dy = triton.load(dy_ref.at[place], mask=mask, other=0).astype(jnp.float32)
        inverse = _inverse_rms(x, width, eps)
        n, g = x * inverse, dy * scale[None]
        mean = jnp.sum(g * n, axis=1, keepdims=True) / width
        dx = inverse * (g - n * mean)
        triton.store(dx_ref.at[place], dx.astype(dx_ref.dtype), mask=mask)
        return total + jnp.sum(dy * n, axis=0)

    total = lax.fori_loop(0, steps, step, jnp.zeros(column.shape, jnp.float32))
    triton.store(partial_ref.at[program, column], total, mask=column < width)


def _columns(width: int) -> jax.Array:
    return jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)


def _tile(shape: tuple[int, int], index, tile: int) -> tuple:
    """The row and column numbers of one tile, which of them exist, and the column numbers."""
    row = index * tile + jnp.arange(tile, dtype=jnp.int32)
    column = _columns(shape[1])
    mask = (row < shape[0])[:, None] & (column < shape[1])[None]
    return (row[:, None], column[None]), mask, column


def _load_scale(scale_ref, column: jax.Array) -> jax.Array:
    mask = column < scale_ref.shape[0]
    return triton.load(scale_ref.at[column], mask=mask, other=0).astype(jnp.float32)


def _inverse_rms(x: jax.Array, width: int, eps: float) -> jax.Array:
    return lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / width + eps)
