"""Where each token stands: is it live, which document is it in, how far is it from another.

Every recurrence keeps, beside its own memory, the position and segment of the last live token of
each row (`Place`). Padding has position -1, may stand anywhere, holds the memory still and is
never written or read. A document is a stretch of live tokens with one segment; its positions grow
from token to token, and a recurrence decays by their *differences*, so that a hole in a row (a
padding token) and a hole in the positions (a dropped token) are different things.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A logarithm of no memory at all: its exp is exactly 0 in every dtype, and 0 * it is 0, not NaN.
NEVER = -1e8

Place = tuple[Int[Array, " B"], Int[Array, " B"]]


class Rows(NamedTuple):
    """The tokens of a batch of rows, and the place (position, segment) that they continue from."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    before: Place


class Timeline(NamedTuple):
    """Rows as a recurrence reads them; all `[B T]`.

    `begins` marks the first token of a document, `run` counts the documents begun so far (0 is the
    one that the incoming state belongs to), `clock` is the position of the last live token up to
    and including this one, and `elapsed` is what it grew by: 0 at padding, never negative.
    """

    live: Bool[Array, "B T"]
    begins: Bool[Array, "B T"]
    run: Int[Array, "B T"]
    clock: Int[Array, "B T"]
    elapsed: Int[Array, "B T"]


def empty_place(batch: int) -> Place:
    """Gives the (position, segment) of rows that have not seen a token: -1 and -1.

    Source: the state protocol of this package.
    """
    return jnp.full((batch,), -1, jnp.int32), jnp.full((batch,), -1, jnp.int32)


def rows_after(
    state: dict[str, Array] | None, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Rows:
    """Joins tokens to the state of a recurrence that they continue; None is the empty place.

    Source: the state protocol of this package.
    """
    if state is None:
        return Rows(positions, segments, empty_place(positions.shape[0]))
    return Rows(positions, segments, (state["position"], state["segment"]))


def timeline(rows: Rows) -> Timeline:
    """Finds where documents begin and how far each token is from the one before.

    A live token begins a document when its segment differs from the last live token's (the place
    before the row counts as one, unless it is empty). A hole of padding is no time at all; a hole
    in the positions is.

    Source: the state protocol of this package.
    """
    positions, segments, (position, segment) = rows
    live = positions >= 0
    latest = last_index(live)
    earlier = previous(latest, jnp.full_like(position, -1))
    known = (earlier >= 0) | (position >= 0)[:, None]
    begins = live & ~(known & (segments == _read(segments, earlier, segment)))
    clock = _read(positions, latest, position)
    elapsed = jnp.where(begins, 0, jnp.maximum(clock - previous(clock, position), 0))
    return Timeline(live, begins, jnp.cumsum(begins, axis=1, dtype=jnp.int32), clock, elapsed)


def place_after(rows: Rows) -> Place:
    """Gives the (position, segment) of each row's last live token, or what was before the row.

    Source: the state protocol of this package.
    """
    last = last_index(rows.positions >= 0)[:, -1:]
    tokens = (rows.positions, rows.segments)
    position, segment = (
        _read(x, last, old)[:, 0].astype(old.dtype)
        for x, old in zip(tokens, rows.before, strict=True)
    )
    return position, segment


def last_index(here: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Index of the last token up to and including each one where `here` holds; -1 before any.

    Source: the state protocol of this package.
    """
    index = jnp.arange(here.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(here, index, -1), axis=1)


def previous(x: Int[Array, "B T"], first: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Shifts rows by one token: `first`, x_0, x_1, ...

    Source: the state protocol of this package.
    """
    return jnp.concatenate([first[:, None].astype(x.dtype), x[:, :-1]], axis=1)


def rates(log: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes exp(log), at most 1e8, which leaves nothing of a memory: finite, and so its slope.

    Source: our own choice.
    """
    return jnp.exp(jnp.minimum(log, math.log(-NEVER)))


def _read(x: Int[Array, "B T"], index: Int[Array, "B S"], old: Int[Array, " B"]) -> Array:
    """`x[b, index[b, s]]`, and `old[b]` where the index is -1."""
    found = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, found, old[:, None])
