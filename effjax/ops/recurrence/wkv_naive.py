"""WKV written for reading: the oracles of `wkv`. The parallel form takes O(T^2 D) memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.recurrence.bookkeeping import NEVER
from effjax.ops.recurrence.wkv import State, Sum, wkv_state


def parallel_wkv(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    log_decay: Float[Array, " D"],
    bonus: Float[Array, " D"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Computes the average as a soft-max over all earlier tokens, one for each token and channel.

    The naive form, in the inputs' dtype. Arguments and results as in `wkv`.

    Source: Peng et al. 2023, equation 16, https://arxiv.org/abs/2305.13048
    """
    B, T, D = v.shape
    live = positions >= 0
    k, v = (jnp.where(live[..., None], x, 0) for x in (k, v))
    bonus = -log_decay if bonus is None else bonus
    blank = state or wkv_state(B, D)
    old, old_segment = blank["position"], blank["segment"]
    memory = {key: blank[key].astype(k.dtype) for key in Sum._fields}

    def weigh(gap: Array, seen: Array, exponent: Array) -> Array:
        gap = jnp.where(seen, gap, 0)[..., None] * log_decay.reshape((1,) * gap.ndim + (-1,))
        return jnp.where(seen[..., None], gap + exponent, NEVER)

    def total(exponents: Array, carried: Array) -> tuple[Array, Array, Array]:
        """Sums over axis 2, of v and the memory's numerator, or of 1 and its denominator."""
        m = jnp.maximum(exponents.max(axis=2), carried)
        weight, kept = jnp.exp(exponents - m[:, :, None]), jnp.exp(carried - m)
        weight = jnp.where(exponents > NEVER / 2, weight, 0)
        kept = jnp.where(carried > NEVER / 2, kept, 0)
        numerator = jnp.einsum("btsd,bsd->btd", weight, v) + kept * memory["numerator"][:, None]
        return numerator, weight.sum(axis=2) + kept * memory["denominator"][:, None], m

    same = (segments[:, :, None] == segments[:, None, :]) & live[:, :, None] & live[:, None, :]
    gap = positions[:, :, None] - 1 - positions[:, None, :]
    exponents = weigh(gap, same & jnp.tril(jnp.ones((T, T), bool), -1)[None], k[:, None])
    itself = jnp.eye(T, dtype=bool)[None] & live[:, :, None]
    exponents = jnp.where(itself[..., None], (k + bonus[None, None])[:, None], exponents)
    onward = live & (segments == old_segment[:, None]) & (old >= 0)[:, None]
    carried = weigh(positions - 1 - old[:, None], onward, memory["exponent"][:, None])
    numerator, denominator, _ = total(exponents, carried)
    y = jnp.where(live[..., None], numerator / jnp.where(live[..., None], denominator, 1), 0)
    if state is None:
        return y, None
    last = jnp.max(jnp.where(live, jnp.arange(T)[None], -1), axis=1)
    position, segment = (
        jnp.where(last >= 0, x[jnp.arange(B), last], was)
        for x, was in ((positions, old), (segments, old_segment))
    )
    fresh = weigh(position[:, None] - positions, live & (segments == segment[:, None]), k)
    kept = weigh(
        (position - old)[:, None], (segment == old_segment)[:, None], memory["exponent"][:, None]
    )
    ended = (x[:, 0].astype(state["exponent"].dtype) for x in total(fresh[:, None], kept))
    end = dict(zip(Sum._fields, ended, strict=True))
    return y, {**end, "position": position, "segment": segment}


def recurrent_wkv(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    log_decay: Float[Array, " D"],
    bonus: Float[Array, " D"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Computes the average token by token, with the running exponent of the paper's appendix.

    The naive form, in the inputs' dtype. Arguments and results as in `wkv`.

    Source: Peng et al. 2023, appendix D, https://arxiv.org/abs/2305.13048
    """
    start = state or wkv_state(k.shape[0], k.shape[2])
    start = start | {key: start[key].astype(v.dtype) for key in Sum._fields}
    step = partial(_token, log_decay, -log_decay if bonus is None else bonus)
    time_first = tuple(jnp.moveaxis(x, 1, 0) for x in (k, v, positions, segments))
    end, y = jax.lax.scan(step, start, time_first)
    if state is None:
        return jnp.moveaxis(y, 0, 1), None
    return jnp.moveaxis(y, 0, 1), {key: x.astype(state[key].dtype) for key, x in end.items()}


def _token(
    log_decay: Float[Array, " D"],
    bonus: Float[Array, " D"],
    state: State,
    token: tuple[Array, ...],
) -> tuple[State, Array]:
    """One step of the recurrence for a batch of rows."""
    k, v, position, segment = token
    live = (position >= 0)[:, None]
    same = live & ((state["position"] >= 0) & (segment == state["segment"]))[:, None]
    gap = jnp.where(same, (position - state["position"])[:, None], 1)
    a, b, p = (state[key] for key in Sum._fields)

    def joined(fade: Array, exponent: Array) -> tuple[Array, Array, Array]:
        old = jnp.where(same, p + fade, NEVER)
        m = jnp.maximum(old, exponent)
        was, now = jnp.where(same, jnp.exp(old - m), 0), jnp.exp(exponent - m)
        return was * a + now * v, was * b + now, m

    numerator, denominator, _ = joined((gap - 1) * log_decay[None], k + bonus[None])
    y = jnp.where(live, numerator / denominator, 0)
    sums = joined(gap * log_decay[None], k)
    new = {key: jnp.where(live, x, state[key]) for key, x in zip(Sum._fields, sums, strict=True)}
    place = {"position": position, "segment": segment}
    return new | {key: jnp.where(live[:, 0], x, state[key]) for key, x in place.items()}, y
