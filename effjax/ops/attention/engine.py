"""The attention engine: any pattern, bias and grouping of heads; packed, padded or cached keys."""

from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.blockwise import blockwise_attention
from effjax.ops.attention.compact import live_first, permute
from effjax.ops.attention.patterns import Pattern
from effjax.ops.attention.plan import Plan, compacts, default_block, live
from effjax.ops.attention.scores import Marks

Implementation = Literal["xla", "pallas_gpu", "pallas_tpu"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    aligned: bool = False,
    ordered: bool = False,
    scale: float | None = None,
    bias: Bias | None = None,
    block: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Averages values with weights that fall off with the mismatch of query and key.

        a_ts = exp(scale q_t . k_s + bias(t, s)) [t may read s] / (the sum of that over s)
        y_t  = sum_s a_ts v_s

    t may read s when the pattern allows their positions, neither is padding (position -1) and their
    segments are equal. A row that may read nothing gives zero, with zero gradient. What stands at
    padding, NaN included, is not read, but for one exception: a single query over a cache, without
    a gradient, wants finite numbers there. `scale` is H^-0.5 unless given. N / K query heads share
    a key head. Sums are float32 at least; y has q's dtype.

    The cost follows the pattern's map of blocks as far as the caller promises where tokens stand:
    `aligned`: position = index in every row, one segment, no padding. Positions and segments are
        not read, and blocks that need no mask are known.
    `ordered`: the keys are the queries' own row; positions ascend by one within a segment; padding
        may stand anywhere. A relative pattern keeps its map, others take the causal or full one.
    Neither (a cache, whose slots may be reused): every block is computed and masked.

    `bias` is a frozen pytree called as `bias(q_pos, k_pos, head)`, elementwise, finite for any
    two positions of at least 0; its arrays of floating numbers get cotangents.

    Raises ConfigError for a K that does not divide N, for T != S under a promise, and for a block
    or a scale that is not positive; NotImplementedError for a kernel; ValueError for segments of
    one side only; TypeError for numbers that are not floating.

    Source: Dao et al. 2022, FlashAttention, https://arxiv.org/abs/2205.14135; `naive.py` is the
    definition.
    """
    (B, T, N, H), S = q.shape, k.shape[1]
    block = default_block(T, B * N) if block is None else block
    _check(q, k, v, aligned or ordered, block, implementation)
    if (q_segments is None) != (k_segments is None):
        raise ValueError("attention: give segments of both queries and keys, or of neither")
    if 0 in (T, S):
        return jnp.zeros_like(q)

    dtype = jnp.result_type(q, k, v)
    plan = Plan(pattern, T, S, block, aligned, ordered, _scale(scale, H))
    marks = _marks(plan, q_positions, k_positions, q_segments, k_segments)
    tokens = Tokens(q.astype(dtype), k.astype(dtype), v.astype(dtype), marks)
    if not compacts(plan):
        return _by_group(plan, tokens, bias).astype(q.dtype)
    order = live_first(q_positions)
    tokens = jax.tree.map(lambda x: permute(x, order), tokens)
    return permute(_by_group(plan, tokens, bias), order[::-1]).astype(q.dtype)


class Tokens(NamedTuple):
    """What stands in the rows, and where."""

    q: Array
    k: Array
    v: Array
    marks: Marks


def _by_group(plan: Plan, tokens: Tokens, bias: Bias | None) -> Float[Array, "B T N H"]:
    """Runs each group of heads over its own blocks."""
    q, k, v, marks = tokens
    N, groups = q.shape[2], live(plan).shape[0]
    if N % groups:
        raise ValueError(f"attention: {plan.pattern} has {groups} groups of heads, got {N} heads")
    if k.shape[2] % groups and groups % k.shape[2]:
        k, v = (x.repeat(N // k.shape[2], axis=2) for x in (k, v))
    K = k.shape[2]

    parts = []
    for group in range(groups):
        heads = slice(group * N // groups, (group + 1) * N // groups)
        shared = slice(group * K // groups, -(-(group + 1) * K // groups))
        part = q[:, :, heads], k[:, :, shared], v[:, :, shared]
        parts.append(blockwise_attention(replace(plan, group=group), *part, marks, bias))
    return jnp.concatenate(parts, axis=2)


def _marks(
    plan: Plan,
    q_positions: Array,
    k_positions: Array,
    q_segments: Array | None,
    k_segments: Array | None,
) -> Marks:
    if plan.aligned:
        index = jnp.arange(plan.T, dtype=jnp.int32)[None]
        return Marks(index, index, jnp.zeros_like(index), jnp.zeros_like(index))
    if q_segments is None or k_segments is None:
        q_segments, k_segments = jnp.zeros_like(q_positions), jnp.zeros_like(k_positions)
    return Marks(q_positions, k_positions, q_segments, k_segments)


def _scale(scale: float | None, H: int) -> float:
    scale = H**-0.5 if scale is None else float(scale)
    if not (np.isfinite(scale) and scale > 0):
        raise ConfigError(f"attention: scale must be positive and finite, got {scale}")
    return scale


def _check(
    q: Array, k: Array, v: Array, promised: bool, block: int, implementation: str | None
) -> None:
    if implementation not in (None, "xla"):
        raise NotImplementedError(f"attention has no kernel {implementation!r} yet, only 'xla'")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"attention: {name} must hold floating numbers, got {x.dtype}")
    if k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"attention: shapes don't agree: q {q.shape}, k {k.shape}, v {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"attention: key heads must divide query heads, got N={q.shape[2]} and K={k.shape[2]}"
        )
    if promised and q.shape[1] != k.shape[1]:
        raise ConfigError(
            "attention: aligned or ordered keys are the queries' own row, "
            f"got {q.shape[1]} queries and {k.shape[1]} keys"
        )
    if block <= 0:
        raise ConfigError(f"attention: block must be positive, got {block}")
