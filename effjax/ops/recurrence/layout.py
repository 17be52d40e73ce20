"""Rows laid out anew so that every document begins a chunk and every token stands at its position.

A form that treats all tokens of a chunk by one Toeplitz matrix (a state space, a long convolution)
needs index = position inside a chunk and no boundary inside it. Laid out so, padding vanishes,
dropped positions become empty slots, and whatever is carried between chunks is cleared exactly
where `Layout.fresh` says.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.ops.recurrence.bookkeeping import Timeline, last_index, previous


class Layout(NamedTuple):
    """Where each token goes, where each slot comes from, and whether there is room.

    Invariant: `slot` and `source` undo each other on live tokens; padding has slot -1 and an empty
    slot has source -1. Slots count from the position after the incoming memory's, so that a
    continued document needs no correction. Where the rows do not fit, every token stays where it
    is, and `fresh` means nothing.
    """

    slot: Int[Array, "B T"]
    source: Int[Array, "B M"]
    fresh: Bool[Array, "B c"]
    fits: Bool[Array, ""]


def spare_chunks(chunks: int) -> int:
    """Chunks that a laid-out row has beyond those its tokens fill: a quarter, and at least two.

    A row of whole chunks with d documents needs at most d - 1, and about half that on average.

    Source: measured, see `experiments/bench/recurrence.py`
    """
    return max(2, -(-chunks // 4))


def lay_out(time: Timeline, position: Int[Array, " B"], chunk: int) -> Layout:
    """Finds the layout of rows that continue after `position`.

    slot_t = base_r + p_t - start_r for token t of document r, where base_r is the sum of the
    earlier documents' extents, each rounded up to whole chunks.

    `fits` is one truth value for all rows: each row has room, and positions grow inside documents.

    Source: the state protocol of this package.
    """
    chunks = -(-time.live.shape[1] // chunk)
    chunks += spare_chunks(chunks)
    first = last_index(time.begins)
    start = jnp.where(first >= 0, _rows(time.clock, jnp.maximum(first, 0)), position[:, None] + 1)
    extent = previous(time.clock, position) - previous(start, position + 1) + 1
    # Sums of floats saturate where sums of integers wrap: extents may be as large as positions are.
    filled = jnp.where(time.begins, -(-extent // chunk), 0).astype(jnp.float32)
    base = jnp.minimum(jnp.cumsum(filled, axis=1), chunks).astype(jnp.int32) * chunk
    slot = base + jnp.minimum(time.clock - start, chunks * chunk)
    good = (slot < chunks * chunk) & (time.begins | (time.elapsed > 0))
    fits = jnp.all(good | ~time.live)
    slot = jnp.where(fits, slot, jnp.arange(slot.shape[1], dtype=slot.dtype)[None])
    slot = jnp.where(time.live, slot, -1)
    source = _inverse(slot, chunks * chunk)
    fresh = _rows(time.begins, jnp.maximum(source, 0)) & (source >= 0)
    return Layout(slot, source, fresh[:, ::chunk], fits)


@jax.custom_vjp
def move(
    x: Float[Array, "B T D"], source: Int[Array, "B M"], slot: Int[Array, "B T"]
) -> Float[Array, "B M D"]:
    """Gathers rows of tokens: y_m = x_{source m}, and 0 where source is -1.

    `slot` must be the inverse of `source`. It is why this function exists: the cotangent of a
    gather is a scatter-add, which is slow and, on a GPU, not repeatable; along an inverse it is
    another gather.

    Source: the state protocol of this package.
    """
    return jnp.where((source >= 0)[..., None], _rows(x, jnp.maximum(source, 0)), 0)


def _move_forward(x: Array, source: Array, slot: Array) -> tuple[Array, tuple[Array, Array]]:
    return move(x, source, slot), (source, slot)


def _move_backward(maps: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    source, slot = maps
    return move(g, slot, source), None, None


move.defvjp(_move_forward, _move_backward)


def _rows(x: Array, index: Int[Array, "B M"]) -> Array:
    """`x[b, index[b, m]]`, one row at a time; the caller keeps the index in bounds."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index)


def _inverse(slot: Int[Array, "B T"], slots: int) -> Int[Array, "B M"]:
    """The token in each slot, -1 where there is none. Slots out of bounds are dropped."""
    B, T = slot.shape
    token = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    target = jnp.where(slot < 0, slots, slot)  # a negative index would count from the end
    empty = jnp.full((B, slots), -1, jnp.int32)
    return jax.vmap(lambda e, s, t: e.at[s].set(t, mode="drop"))(empty, target, token)
