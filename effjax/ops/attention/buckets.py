"""Attention among equal codes, decided for each pair on its own: the prefix-stable form of hashing.

What a query reads is a function of its code and a key's, never of the tokens between or after, so
that a causal form is exactly causal and decodes from a cache that keeps the codes. The mask is
dense: a query costs as much as full attention does, and only the methods' quality is at stake.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from effjax.ops.accounting import Flops
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.cache import Cache, empty_cache, keys_values, next_slots, write_cache
from effjax.ops.attention.gathered import attend
from effjax.ops.attention.layout import clear


def bucket_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    q_codes: Int[Array, "B N R T"],
    k_codes: Int[Array, "B N R S"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    causal: bool,
    itself: bool = True,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Attends to the keys that have a code in common in some round, and to the query's own token.

        t reads s  if  s = t, or code_r(q_t) = code_r(k_s) for some r [and s is not later: `causal`]

    itself: False masks a token's own key unless it reads no other (shared queries and keys). Scale
    is H^-0.5 unless given. Padding and other segments are not read; padding gives zero.

    Source: the sets P_i of Kitaev et al. 2020, Reformer, section 2, equation 4,
    https://arxiv.org/abs/2001.04451, before they are sorted and cut; the own token is ours.
    """
    q_pos, k_pos = q_positions[:, None, :, None], k_positions[:, None, None, :]
    may = (q_pos >= 0) & (k_pos >= 0)
    may &= q_segments[:, None, :, None] == k_segments[:, None, None, :]
    own = may & (q_pos == k_pos)
    if causal:
        may &= k_pos <= q_pos
    met = (q_codes[..., :, None] == k_codes[..., None, :]).any(axis=2)
    others = met & may & ~own
    reads = others | own if itself else others | (own & ~others.any(axis=-1, keepdims=True))
    added = None
    if bias is not None:
        head = jnp.arange(q.shape[2])[None, :, None, None]
        added = bias(jnp.maximum(q_pos, 0), jnp.maximum(k_pos, 0), head)
    q = clear(q, q_positions >= 0).swapaxes(1, 2)
    k, v = (clear(x, k_positions >= 0).swapaxes(1, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, reads, scale, added)[0].swapaxes(1, 2).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BucketCache:
    """A cache of keys and values, and of the codes of its keys: int32 [B N R S]."""

    cache: Any
    codes: Any


def empty_bucket_cache(
    batch: int, heads: int, rounds: int, capacity: int, head_dim: int, piece: int, dtype: DTypeLike
) -> BucketCache:
    """A cache that holds nothing.

    Source: as `cache.empty_cache`.
    """
    cache = empty_cache(batch, heads, capacity, head_dim, piece, dtype)
    return BucketCache(cache, jnp.full((batch, heads, rounds, capacity), -1, jnp.int32))


def write_bucket_cache(
    state: BucketCache,
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    codes: Int[Array, "B N R T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> BucketCache:
    """Puts the live tokens of a piece, with the codes of their keys, into the next slots.

    Source: as `cache.write_cache`, in whose slots the codes stand.
    """
    slot = next_slots(state.cache, positions)

    def put(old: Array, slot: Array, new: Array) -> Array:
        return old.at[..., slot].set(new, mode="drop")

    written = jax.vmap(put)(state.codes, slot, codes)
    return BucketCache(write_cache(state.cache, k, v, positions, segments), written)


def read_bucket_cache(
    state: BucketCache,
    q: Float[Array, "B T N H"],
    codes: Int[Array, "B N R T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    itself: bool = True,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Attends from a piece that has been written to the earlier keys of its buckets.

    Source: as `bucket_attention`.
    """
    held: Cache = state.cache
    return bucket_attention(
        q,
        *keys_values(held),
        codes,
        state.codes,
        q_positions=positions,
        k_positions=held.positions,
        q_segments=segments,
        k_segments=held.segments,
        causal=True,
        itself=itself,
        scale=scale,
        bias=bias,
    )


def bucket_flops(B: int, T: int, S: int, N: int, H: int) -> Flops:
    """FLOPs of `bucket_attention` as written: every pair, masked or not.

    Source: our own count.
    """
    return Flops(4 * B * N * T * S * H, 8 * B * N * T * S * H)
