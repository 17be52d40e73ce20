"""The short causal convolution that recurrences read their tokens through.

Each channel weighs the W latest live tokens of its document, the token itself among them. Padding
is stepped over, and so are dropped positions: what counts is the order of the live tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.ops.recurrence.bookkeeping import (
    Rows,
    empty_place,
    place_after,
    rows_after,
    timeline,
)
from effjax.ops.recurrence.layout import move

State = dict[str, Array]


def short_state(batch: int, channels: int, width: int) -> State:
    """Gives the memory of rows that have not seen a token: no inputs [B W-1 D], position, segment.

    Source: Gu and Dao 2023, section 3.4, https://arxiv.org/abs/2312.00752
    """
    position, segment = empty_place(batch)
    inputs = jnp.zeros((batch, width - 1, channels), jnp.float32)
    return {"inputs": inputs, "position": position, "segment": segment}


def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    aligned: bool = False,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Convolves every channel with its own filter over the W latest live tokens of the document.

        y_t = bias + sum_{j < W} weight[:, W - 1 - j] x_{j live tokens before t}

    What a document does not have yet counts as 0. Sums are float32 (float64 for float64 inputs),
    y has x's dtype. W multiply-adds a channel and token, all element-wise: no products.

    Args:
        weight: the last column weighs the token itself, the first the one W - 1 before it.
        positions: -1 is padding: its x is not read (it may be NaN) and its y is 0, without a bias.
        segments: the document of each token; one stretch of a row per document.
        state: the last W - 1 inputs of the document where the rows stand, the latest last; None
            starts from nothing and returns no state. `short_state` starts from nothing.
        aligned: promises that each row is one document without padding, so that nothing is moved
            or masked. Only the first token's position and segment are read, for the state.

    Raises:
        ValueError: the state is of a filter of another width.

    Source: Gu and Dao 2023, section 3.4, https://arxiv.org/abs/2312.00752, which pads one document
    with zeros; documents, padding and states are ours.
    """
    width = weight.shape[1]
    if state is not None and state["inputs"].shape[1] != width - 1:
        raise ValueError(
            f"short_convolution: state must hold {width - 1} inputs for a weight of width {width}, "
            f"got {state['inputs'].shape[1]}"
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rows = rows_after(state, positions, segments)
    taps = weight.astype(dtype).T
    past = None if state is None else state["inputs"].astype(dtype)
    run = _one if x.shape[1] == 1 else _aligned if aligned else _packed
    y, past, live = run(x.astype(dtype), taps, past, rows)
    if bias is not None:
        shift = bias.astype(dtype)[None, None]
        y = y + (shift if live is None else jnp.where(live[..., None], shift, 0))
    if state is None or past is None:
        return y.astype(x.dtype), None
    position, segment = place_after(rows)
    inputs = past.astype(state["inputs"].dtype)
    return y.astype(x.dtype), {"inputs": inputs, "position": position, "segment": segment}


Result = tuple[Array, Array | None, Array | None]  # y, the last inputs, and where there are tokens


def _one(x: Array, taps: Array, past: Array | None, rows: Rows) -> Result:
    """One token of each row, as in decoding."""
    time = timeline(rows)
    x = jnp.where(time.live[..., None], x, 0)
    if past is None:
        return x * taps[None, -1:], None, time.live
    kept = jnp.where(time.begins[..., None], 0, past)
    window = jnp.concatenate([kept, x], axis=1)
    y = jnp.where(time.live, jnp.sum(window * taps[None], axis=1), 0)[:, None]
    return y, jnp.where(time.live[..., None], window[:, 1:], past), time.live


def _aligned(x: Array, taps: Array, past: Array | None, rows: Rows) -> Result:
    """Rows of one document each: shifted, scaled and added."""
    T, before = x.shape[1], taps.shape[0] - 1
    if past is None:
        row = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
    else:
        position, segment = rows.before
        same = (position >= 0) & (rows.segments[:, 0] == segment)
        row = jnp.concatenate([jnp.where(same[:, None, None], past, 0), x], axis=1)
    y = _weighed(row, taps, None)
    return y, None if past is None else row[:, T:], None


def _packed(x: Array, taps: Array, past: Array | None, rows: Rows) -> Result:
    """Rows of any documents and padding: live tokens are moved together, shifted, moved back."""
    (B, _, D), before = x.shape, taps.shape[0] - 1
    time = timeline(rows)
    slot, source = _together(time.live)
    run = jnp.where(source >= 0, jnp.take_along_axis(time.run, jnp.maximum(source, 0), axis=1), -1)
    run = jnp.pad(run, ((0, 0), (before, 0)))  # the past belongs to document 0
    moved = move(x, source, slot)
    first = jnp.zeros((B, before, D), x.dtype) if past is None else past
    row = jnp.concatenate([first, moved], axis=1)
    y = move(_weighed(row, taps, run), slot, source)
    if past is None:
        return y, None, time.live
    index = jnp.sum(time.live, axis=1)[:, None] + jnp.arange(before)[None]
    last = jax.vmap(lambda row, index: row[index])(row, index)
    kept = jnp.take_along_axis(run, index, axis=1) == time.run[:, -1:]
    return y, jnp.where(kept[..., None], last, 0), time.live


@jax.custom_vjp
def _weighed(
    row: Float[Array, "B S D"], taps: Float[Array, "W D"], run: Int[Array, "B S"] | None
) -> Float[Array, "B T D"]:
    """y_t = sum_j taps_j row_{t+j} over those whose `run` is row_{t+W-1}'s; T = S - W + 1.

    Its gradient is written by hand: autodiff pads what each tap gets to [W B T D] before it sums.
    """
    *earlier, own = _shifts(row, run, len(taps))
    y = own * taps[-1][None, None]
    for j, part in enumerate(earlier):
        y = y + part * taps[j][None, None]
    return y


def _shifts(row: Float[Array, "B S D"], run: Int[Array, "B S"] | None, width: int) -> list[Array]:
    """What each tap weighs: the row from there on, 0 where that is another document's."""
    T = row.shape[1] - width + 1
    parts = [row[:, j : j + T] for j in range(width)]
    if run is None:
        return parts
    same = [run[:, j : j + T] == run[:, width - 1 :] for j in range(width)]
    return [jnp.where(s[..., None], part, 0) for s, part in zip(same, parts, strict=True)]


def _weighed_forward(
    row: Array, taps: Array, run: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _weighed(row, taps, run), (row, taps, run)


def _weighed_backward(
    kept: tuple[Array, Array, Array | None], g: Array
) -> tuple[Array, Array, None]:
    row, taps, run = kept
    (width, _), T = taps.shape, g.shape[1]
    by_tap = jnp.stack([jnp.sum(part * g, axis=(0, 1)) for part in _shifts(row, run, width)])
    by_row = jnp.zeros_like(row)
    for j in range(width):
        part = g * taps[j][None, None]
        if run is not None:
            same = run[:, j : j + T] == run[:, width - 1 :]
            part = jnp.where(same[..., None], part, 0)
        by_row += jnp.pad(part, ((0, 0), (j, width - 1 - j), (0, 0)))
    return by_row, by_tap, None


_weighed.defvjp(_weighed_forward, _weighed_backward)


def _together(live: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Where each live token goes when none stands between them, and where each place comes from.

    They undo each other, as `move` asks; -1 is a token that goes nowhere, or an empty place.
    """
    T = live.shape[1]
    slot = jnp.where(live, jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1, -1)
    target = jnp.where(live, slot, T)  # a negative index would count from the end
    token, empty = jnp.arange(T, dtype=jnp.int32), jnp.full((T,), -1, jnp.int32)
    source = jax.vmap(lambda at: empty.at[at].set(token, mode="drop"))(target)
    return slot, source
