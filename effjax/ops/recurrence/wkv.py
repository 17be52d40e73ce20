"""WKV: a running average of values, weighted by exp(key) and fading by position, in three forms.

    y_t = (sum_{i<t} exp(w (p_t - 1 - p_i) + k_i) v_i + exp(u + k_t) v_t) / (the same without v)

in every channel, over the tokens i of t's document, with p the positions, w = log_decay <= 0 and
u = bonus. `wkv` is the form to use, `parallel_wkv` and `recurrent_wkv` are the naive ones that it
is tested against; `parallel_wkv` is meant for reading: O(T^2 D) memory.

Sums are kept as numerator and denominator in units of exp(m), with m the largest exponent
w (p - p_i) + k_i among their tokens: no exponential of a positive number is ever taken, and keys
may be of any size. Adding two sums, the earlier one faded, is associative, so that WKV is a scan
like any other: a chunk as long as the row needs no serial loop at all.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", section 3.1.2 and
appendix D, https://arxiv.org/abs/2305.13048. Departures: decay by difference of positions, and
reset by segment, where the paper has one unpadded document.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.ops.recurrence.bookkeeping import (
    NEVER,
    Timeline,
    empty_place,
    place_after,
    previous,
    rows_after,
    timeline,
)

State = dict[str, Array]
Hold = Callable[[Array], Array]


class Sum(NamedTuple):
    """Weights and weighed values of some tokens, in units of exp(exponent).

    Invariant: the largest weight of a token is exp(exponent); of no tokens, the sum is 0, 0, NEVER.
    """

    numerator: Float[Array, "... D"]
    denominator: Float[Array, "... D"]
    exponent: Float[Array, "... D"]


def wkv_state(batch: int, channels: int) -> State:
    """Gives the memory of rows that have not seen a token: an empty sum [B D], and no place.

    Source: Peng et al. 2023, appendix D, https://arxiv.org/abs/2305.13048
    """
    position, segment = empty_place(batch)
    zero = jnp.zeros((batch, channels), jnp.float32)
    memory = Sum(zero, zero, jnp.full_like(zero, NEVER))
    return {**memory._asdict(), "position": position, "segment": segment}


def wkv(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    log_decay: Float[Array, " D"],
    bonus: Float[Array, " D"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 16,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Computes the running average in chunks: sums of 2, 4, 8, ... tokens inside, a scan between.

    Everything is element-wise, in float32 (float64 for float64 inputs); y has v's dtype. Work and
    memory grow as T D log2(chunk), the steps that must wait for one another as T / chunk.

    Args:
        k: exponents of the weights, of any size above -1e8.
        log_decay: w, the logarithm of what a position fades by, at most 0; -inf forgets at once.
        bonus: u, added to a token's own exponent where it is read; None weighs the token as its
            successors will, but for the decay: u = -w.
        positions: -1 is padding: its k and v are not read (they may be NaN) and its y is 0.
        segments: the document of each token; one stretch of a row per document.
        state: where the rows stand; None starts from nothing and returns no state, which is what
            training wants. `wkv_state` starts from nothing and returns one.
        chunk: tokens per chunk, rounded up to a power of two; any size gives the same values.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Peng et al. 2023, equation 16 and appendix D, https://arxiv.org/abs/2305.13048; the scan
    inside a chunk as in Sklansky 1960, doi:10.1109/TEC.1960.5221600
    """
    if chunk < 1:
        raise ConfigError(f"wkv: chunk must be at least 1, got {chunk}")
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    rows = rows_after(state, positions, segments)
    time = timeline(rows)
    live = time.live[..., None]
    rate = jnp.maximum(log_decay.astype(dtype), NEVER)
    lift = -rate if bonus is None else bonus.astype(dtype)
    k_, v_ = jnp.where(live, k.astype(dtype), NEVER), jnp.where(live, v.astype(dtype), 0)
    own = Sum(v_, jnp.broadcast_to(live, v_.shape).astype(dtype), k_)
    # y does not depend on the unit that its sums are in, so no gradient need pass through it; that
    # of the exponent which a state shows to the outside must.
    hold: Hold = jax.lax.stop_gradient if state is None else lambda m: m
    start = _start(state, k.shape[0], k.shape[2], dtype)
    after = _memories(own, start, rate, time, rows.before[0], chunk, hold)
    before = jax.tree.map(lambda s, x: jnp.concatenate([s[:, None], x[:, :-1]], 1), start, after)
    past = _faded(before, rate, jnp.maximum(time.elapsed - 1, 0), ~time.begins)
    read = _add(past, own._replace(exponent=k_ + lift[None, None]), hold)
    y = jnp.where(live, read.numerator / jnp.where(live, read.denominator, 1), 0).astype(v.dtype)
    if state is None:
        return y, None
    position, segment = place_after(rows)
    end = {key: x[:, -1].astype(state[key].dtype) for key, x in after._asdict().items()}
    return y, {**end, "position": position, "segment": segment}


def _start(state: State | None, batch: int, channels: int, dtype: jnp.dtype) -> Sum:
    state = wkv_state(batch, channels) if state is None else state
    return Sum(*(state[key].astype(dtype) for key in Sum._fields))


def _memories(
    own: Sum,
    start: Sum,
    rate: Float[Array, " D"],
    time: Timeline,
    position: Int[Array, " B"],
    chunk: int,
    hold: Hold,
) -> Sum:
    """The memory after each token [B T D]: of its document so far, the token itself included."""
    T = time.live.shape[1]
    chunk = 1 << (min(chunk, T) - 1).bit_length()
    fill = ((0, 0), (0, -T % chunk))
    empty = Sum(0, 0, NEVER)
    own = jax.tree.map(lambda x, c: jnp.pad(x, (*fill, (0, 0)), constant_values=c), own, empty)
    run, clock = (jnp.pad(x, fill, mode="edge") for x in (time.run, time.clock))
    inside = _inside(own, rate, run, clock, chunk, hold)
    run, clock = (x.reshape(x.shape[0], -1, chunk) for x in (run, clock))
    start_run = previous(run[..., -1], jnp.zeros_like(position))
    start_clock = previous(clock[..., -1], position)
    inside = jax.tree.map(lambda x: x.reshape(*run.shape, -1), inside)
    whole = jax.tree.map(lambda x: x[:, :, -1], inside)
    gaps = (clock[..., -1] - start_clock, start_run == run[..., -1])
    entering = _entering(whole, start, rate, *gaps, hold)
    entering = Sum(*(x[:, :, None] for x in entering))
    earlier = _faded(entering, rate, clock - start_clock[..., None], run == start_run[..., None])
    return Sum(
        *(x.reshape(x.shape[0], -1, x.shape[-1])[:, :T] for x in _add(earlier, inside, hold))
    )


def _inside(
    own: Sum,
    rate: Float[Array, " D"],
    run: Int[Array, "B M"],
    clock: Int[Array, "B M"],
    chunk: int,
    hold: Hold,
) -> Sum:
    """Running sums inside each chunk [B M D]: blocks of 1, 2, 4, ... tokens join their left halves.

    A token of a right half adds all of the left one, which its last token has summed.
    """
    B, M = run.shape
    size = 1
    while size < chunk:
        halves = (B, M // (2 * size), 2, size)
        run_, clock_ = run.reshape(halves), clock.reshape(halves)
        pairs = [x.reshape(*halves, -1) for x in own]
        left, right = (Sum(*(x[:, :, i] for x in pairs)) for i in (0, 1))
        gap = clock_[:, :, 1] - clock_[:, :, 0, -1:]
        seen = run_[:, :, 1] == run_[:, :, 0, -1:]
        whole = jax.tree.map(lambda x: x[:, :, -1:], left)
        right = _add(_faded(whole, rate, gap, seen), right, hold)
        own = jax.tree.map(lambda *x: jnp.stack(x, axis=2).reshape(B, M, -1), left, right)
        size *= 2
    return own


def _entering(
    whole: Sum,
    start: Sum,
    rate: Float[Array, " D"],
    gap: Int[Array, "B c"],
    seen: Bool[Array, "B c"],
    hold: Hold,
) -> Sum:
    """The memory before each chunk [B c D], of sums over whole chunks."""
    if gap.shape[1] == 1:
        return jax.tree.map(lambda x: x[:, None], start)

    def step(memory: Sum, chunk: tuple[Sum, Array, Array]) -> tuple[Sum, Sum]:
        own, gap, seen = chunk
        return _add(_faded(memory, rate, gap, seen), own, hold), memory

    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (whole, gap, seen))
    _, entering = jax.lax.scan(step, start, chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), entering)


def _faded(
    memory: Sum, rate: Float[Array, " D"], gap: Int[Array, "..."], seen: Bool[Array, "..."]
) -> Sum:
    """A sum after `gap` positions, and the empty one where it is not `seen`."""
    fade = gap[..., None].astype(rate.dtype) * rate.reshape((1,) * gap.ndim + (-1,))
    seen = seen[..., None]
    return Sum(
        jnp.where(seen, memory.numerator, 0),
        jnp.where(seen, memory.denominator, 0),
        jnp.where(seen, memory.exponent + fade, NEVER),
    )


def _add(a: Sum, b: Sum, hold: Hold) -> Sum:
    """Both sums in one unit, the larger one."""
    m = hold(jnp.maximum(a.exponent, b.exponent))
    x, y = jnp.exp(a.exponent - m), jnp.exp(b.exponent - m)
    return Sum(x * a.numerator + y * b.numerator, x * a.denominator + y * b.denominator, m)


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
