"""Laplace attention: a key's weight is a function of its own score, with no sum over the keys.

    a_ts = f(q_t . k_s / n_t + places)       f(x) = (1 + erf((x - mu) / (sigma sqrt 2))) / 2
    y_t  = sum_s a_ts v_s                     mu = sqrt(1/2)    sigma = sqrt(1 / (4 pi))

n_t is the number of keys that t reads, so that a causal query knows nothing of what follows, and a
query over a cache, which reads the same keys, gets the same weights. f is a smooth stand-in for the
square of the rectifier, with bounded values and slopes.

Source: Ma et al. 2022, "Mega: Moving Average Equipped Gated Attention", section 3 (Laplace
Attention Function), https://arxiv.org/abs/2209.10655, and its released code,
https://github.com/facebookresearch/mega (`element_attention`), which divides by the number of live
keys, under a causal mask by that of the mask's row, and over a cache by its length: by n_t.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.ops.accounting import Flops
from effjax.ops.attention.accounting import exact_flops
from effjax.ops.attention.compact import live_first, permute
from effjax.ops.attention.layout import clear, dot, wide
from effjax.ops.attention.patterns import Pattern

MEAN, SPREAD = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


def laplace(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The distribution function of a normal variable of mean sqrt(1/2), variance 1 / (4 pi).

        f(x) = (1 + erf((x - mu) / (sigma sqrt 2))) / 2

    At mu its value and slope, 1/2 and sqrt(2), are those of max(x, 0)^2.

    Source: Ma et al. 2022, section 3 (Laplace Attention Function), https://arxiv.org/abs/2209.10655
    """
    return 0.5 * (1 + jax.lax.erf((x - MEAN) / (SPREAD * math.sqrt(2))))


def laplace_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N E"],
    *,
    pattern: Pattern,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    content: int | None = None,
) -> Float[Array, "B T N E"]:
    """Sums the values that a query may read, each weighed by its own score.

        y_t = sum_s f(q_t . k_s / n_t) v_s [t may read s]

    t may read s when the pattern allows their positions, neither is padding (position -1) and their
    segments are equal; n_t counts these s. A query that may read nothing gives zero. What stands at
    padding, NaN included, is not read. Keys may stand in any order (a cache). The first `content`
    features alone are divided by n_t; what the others add, such as a bias by position, is not.
    The arithmetic is float32 at least; y has q's dtype. All T S scores are in memory at once.

    Source: as this file's; `content` is ours, to have a bias as a product.
    """
    dtype, H = wide(q), q.shape[-1]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    live = (q_positions >= 0)[:, :, None] & (k_positions >= 0)[:, None, :]
    places = q_positions[:, None, :, None], k_positions[:, None, None, :]
    heads = jnp.arange(q.shape[2])[None, :, None, None]
    reads = pattern.allowed(*places, heads) & (same & live)[:, None]
    count = jnp.maximum(reads.sum(axis=-1), 1).astype(dtype).swapaxes(1, 2)[..., None]
    divided = (jnp.arange(H) < (H if content is None else content))[None, None, None]
    q_ = clear(q, q_positions >= 0).astype(dtype)
    q_ = jnp.where(divided, q_ / count, q_)
    k, v = (clear(x, k_positions >= 0).astype(dtype) for x in (k, v))
    a = jnp.where(reads, laplace(dot("btnh,bsnh->bnts", q_, k)), 0)
    return dot("bnts,bsne->btne", a, v).astype(q.dtype)


def laplace_row(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N E"],
    *,
    pattern: Pattern,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    content: int | None = None,
) -> Float[Array, "B T N E"]:
    """`laplace_attention` of rows to themselves; linear in T where the pattern has a span.

    A pattern with a span, which must not look further ahead than back, is computed in blocks of
    that many tokens: of a block with itself and its neighbours. `aligned` promises position =
    index in every row, one segment and no padding: then only the neighbours that the pattern's map
    of blocks names are read, none for `Cells(size, 0)`.

    Source: as this file's; blocks as in Mega-chunk, its section 3.
    """
    T, width = q.shape[1], pattern.span()
    row = Row(q, k, v, positions, segments)
    if width is None or width >= T:
        return _read(row, row, pattern, content)
    order = None if aligned else live_first(positions)
    if order is not None:
        row = Row(*(permute(x, order) for x in row))
    own = Row(*(_blocks(x, width, fill) for x, fill in zip(row, NOTHING, strict=True)))
    near = _neighbours(pattern, T, width, aligned)
    keys = Row(*(_around(x, near, fill) for x, fill in zip(own, NOTHING, strict=True)))
    own, keys = (Row(*(x.reshape(-1, *x.shape[2:]) for x in rows)) for rows in (own, keys))
    y = _read(own, keys, pattern, content)
    y = y.reshape(q.shape[0], -1, *y.shape[2:])[:, :T]
    return y if order is None else permute(y, order[::-1])


def laplace_flops(
    pattern: Pattern, B: int, T: int, N: int, H: int, E: int, *, aligned: bool = False
) -> Flops:
    """FLOPs of `laplace_row` as written: whole blocks, masks not spared, two cotangents a product.

    Source: our own count of this file.
    """
    width = pattern.span()
    pairs = T * T
    if width is not None and width < T:
        blocks = -(-T // width)
        pairs = blocks * width * width * len(_neighbours(pattern, T, width, aligned))
    forward = 2 * B * N * pairs * (H + E)
    return Flops(forward, 2 * forward)


def exact_laplace_flops(pattern: Pattern, B: int, T: int, N: int, H: int, E: int) -> Flops:
    """FLOPs of the attention itself, its mask exact: H + E multiply-adds a pair, twice that back.

    Source: as `accounting.exact_flops`.
    """
    pairs = exact_flops(pattern, B, T, T, N, 1).forward // 4
    return Flops(2 * pairs * (H + E), 4 * pairs * (H + E))


class Row(NamedTuple):
    """Tokens and where they stand."""

    q: Array
    k: Array
    v: Array
    positions: Array
    segments: Array


NOTHING = (0, 0, 0, -1, 0)
"""What stands in a `Row` where no token does."""


def _read(own: Row, keys: Row, pattern: Pattern, content: int | None) -> Array:
    return laplace_attention(
        own.q,
        keys.k,
        keys.v,
        pattern=pattern,
        q_positions=own.positions,
        k_positions=keys.positions,
        q_segments=own.segments,
        k_segments=keys.segments,
        content=content,
    )


def _blocks(x: Array, width: int, fill: Any) -> Array:
    """[B T ...] as whole blocks [B c width ...]."""
    spare = [(0, 0), (0, -x.shape[1] % width), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, spare, constant_values=fill)
    return x.reshape(x.shape[0], -1, width, *x.shape[2:])


def _around(x: Array, near: tuple[int, ...], fill: Any) -> Array:
    """Each block with those so many blocks on: [B c (near width) ...]."""
    reach = max(map(abs, near))
    spare = [(0, 0), (reach, reach), *[(0, 0)] * (x.ndim - 2)]
    c, wide_x = x.shape[1], jnp.pad(x, spare, constant_values=fill)
    return jnp.concatenate([wide_x[:, reach + i : reach + i + c] for i in near], axis=2)


@cache
def _neighbours(pattern: Pattern, T: int, width: int, aligned: bool) -> tuple[int, ...]:
    """How many blocks on the blocks stand that a block may read.

    With padding at the end, tokens of a document are no further apart in indices than in positions.
    """
    if aligned:
        _, i, j = np.nonzero(pattern.blocks(T, T, width))
        return tuple(sorted({int(x) for x in j - i}))
    return (-1, 0) if pattern.causal else (-1, 0, 1)
