"""The key-value cache: slots that are written, rolled over and read, for any pattern."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from effjax.ops.attention.bias import Bias
from effjax.ops.attention.engine import attention
from effjax.ops.attention.entmax import Entmax
from effjax.ops.attention.patterns import Pattern


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the last `capacity` live tokens of each row.

    k, v: [B*K S H]: a row of slots for each key head. One leading axis, not two: with B = 1 apart,
        XLA on a CPU no longer updates them in place and copies the whole cache at every token.
    positions, segments: int32 [B S] of what stands in each slot, -1 where nothing does.
    count: int32 [B], live tokens seen so far. The next token's slot is `count % S`: a slot follows
        from the number of tokens, not from positions, which restart with each packed document.
    piece: static, the longest piece that may be written at once.

    Fields are arrays, or what stands for them in a tree: abstract arrays, shardings, `None`.
    """

    k: Any
    v: Any
    positions: Any
    segments: Any
    count: Any
    piece: int = field(metadata={"static": True})


def empty_cache(
    batch: int, heads: int, capacity: int, head_dim: int, piece: int, dtype: DTypeLike
) -> Cache:
    """A cache that holds nothing.

    Source: the layout is ours; a window's capacity of `width + piece - 1` is the least that lets a
    piece be written before it is read.
    """
    slots = jnp.zeros((batch * heads, capacity, head_dim), dtype)
    unused = jnp.full((batch, capacity), -1, jnp.int32)
    return Cache(slots, slots, unused, unused, jnp.zeros((batch,), jnp.int32), piece)


def write_cache(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> Cache:
    """Puts the live tokens of a piece into the next slots of each row; padding is not written.

    Raises ValueError when the piece is longer than the cache was made for.

    Source: rolling buffer as in Jiang et al. 2023, Mistral 7B, section 2,
    https://arxiv.org/abs/2310.06825; ours counts live tokens instead of positions.
    """
    if k.shape[1] > cache.piece:
        raise ValueError(f"a piece may have at most {cache.piece} tokens, got {k.shape[1]}")
    slot = next_slots(cache, positions)
    heads = jnp.repeat(slot, k.shape[2], axis=0)

    def put(old: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
        write = jax.vmap(lambda row, at, update: row.at[at].set(update, mode="drop"))
        return write(old, at, new.astype(old.dtype))

    return Cache(
        put(cache.k, heads, _rows(k)),
        put(cache.v, heads, _rows(v)),
        put(cache.positions, slot, positions),
        put(cache.segments, slot, segments),
        (cache.count + (positions >= 0).sum(axis=1)).astype(jnp.int32),
        cache.piece,
    )


def next_slots(cache: Cache, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where a piece's tokens go: the number of slots for what is padding or is overwritten at once.

    A scatter drops what lies past the end.

    Source: as `write_cache`.
    """
    capacity = cache.positions.shape[1]
    live = positions >= 0
    number = cache.count[:, None] + jnp.cumsum(live, axis=1) - 1
    count = cache.count + live.sum(axis=1)
    lasting = live & (number >= count[:, None] - capacity)
    return jnp.where(lasting, number % capacity, capacity)


def keys_values(cache: Cache) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """What a cache holds, as attention takes it; a view of the slots where they lie.

    Source: our own layout, as `Cache`.
    """
    rows = cache.positions.shape[0]
    k, v = (x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2) for x in (cache.k, cache.v))
    return k, v


def _rows(x: jax.Array) -> jax.Array:
    """[B T K H] -> [B*K T H], the cache's order."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def read_cache(
    cache: Cache,
    q: Float[Array, "B T N H"],
    *,
    pattern: Pattern,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    bias: Bias | None = None,
    normalizer: Entmax | None = None,
) -> Float[Array, "B T N H"]:
    """Attends from a piece that has been written to all that the cache holds.

    Slots stand in no order of position, so every slot is a candidate and the pattern decides.

    Source: as `naive_attention`; Vaswani et al. 2017, section 3.2.1,
    https://arxiv.org/abs/1706.03762
    """
    return attention(
        q,
        *keys_values(cache),
        pattern=pattern,
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segments,
        k_segments=cache.segments,
        bias=bias,
        normalizer=normalizer,
    )
