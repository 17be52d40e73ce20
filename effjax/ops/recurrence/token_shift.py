"""Token shift: each token beside the one before it, whatever padding stands between them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.recurrence.bookkeeping import (
    Timeline,
    empty_place,
    last_index,
    place_after,
    previous,
    rows_after,
    timeline,
)
from effjax.ops.recurrence.layout import move

State = dict[str, Array]


def token_shift_state(batch: int, channels: int) -> State:
    """Gives the memory of rows that have not seen a token: latest = 0 [B D], and no place.

    Source: Peng et al. 2023, section 3.1.1, https://arxiv.org/abs/2305.13048
    """
    position, segment = empty_place(batch)
    latest = jnp.zeros((batch, channels), jnp.float32)
    return {"latest": latest, "position": position, "segment": segment}


def token_shift(
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    aligned: bool = False,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Gives the latest earlier live token of each token's document; 0 at its first, and at padding.

    Args:
        positions: -1 is padding, which is not read (it may be NaN).
        segments: the document of each token; one stretch of a row per document.
        state: where the rows stand; its `latest` is float32. None starts from nothing and returns
            no state.
        aligned: promises that each row is one document without padding.

    Source: Peng et al. 2023, section 3.1.1, https://arxiv.org/abs/2305.13048; there the token
    before is the one at the index before.
    """
    if aligned and state is None:
        return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1), None
    rows = rows_after(state, positions, segments)
    time = timeline(rows)
    onward = (time.live & ~time.begins)[..., None]
    shifted = jnp.zeros_like(x) if x.shape[1] == 1 else move(x, *_maps(time))
    if state is None:
        return shifted, None
    old = state["latest"]
    latest = last_index(time.live)
    first = onward & (previous(latest, jnp.full_like(rows.before[0], -1)) < 0)[..., None]
    shifted = jnp.where(first, old[:, None].astype(x.dtype), shifted)
    last = latest[:, -1][:, None, None]
    found = jnp.take_along_axis(x, jnp.maximum(last, 0), axis=1)[:, 0].astype(old.dtype)
    position, segment = place_after(rows)
    new = jnp.where(last[:, 0] >= 0, found, old)
    return shifted, {"latest": new, "position": position, "segment": segment}


def _maps(time: Timeline) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """For each token the live one before it in its document, and the one after it; -1 for none."""
    T, none = time.live.shape[1], jnp.full(time.live.shape[:1], -1, jnp.int32)
    onward = time.live & ~time.begins
    before = jnp.where(onward, previous(last_index(time.live), none), -1)
    later = T - 1 - last_index(time.live[:, ::-1])[:, ::-1]  # the first live one from here; T: none
    after = jnp.concatenate([later[:, 1:], jnp.full_like(later[:, :1], T)], axis=1)
    follows = jnp.take_along_axis(onward, jnp.minimum(after, T - 1), axis=1)
    return before, jnp.where(time.live & (after < T) & follows, after, -1)
