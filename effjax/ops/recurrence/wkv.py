"""WKV: a running average of values, weighted by exp(key) and fading by position, in three forms.

    y_t = (sum_{i<t} exp(w (p_t - 1 - p_i) + k_i) v_i + exp(u + k_t) v_t) / (the same without v)

in every channel, over the tokens i of t's document, with p the positions, w = log_decay <= 0 and
u = bonus. `wkv` is the form to use; `parallel_wkv` and `recurrent_wkv` in `wkv_naive` are what it
is tested against.

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
    chunk: int | None = None,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Computes the running average in chunks: sums of 2, 4, 8, ... tokens inside, a scan between.

    Everything is element-wise, in float32 (float64 for float64 inputs); y has v's dtype. Work grows
    as T D (1 + log2 chunk), the steps that must wait for one another as T / chunk.

    Args:
        k: exponents of the weights, of any size above -1e8.
        log_decay: w, the logarithm of what a position fades by, at most 0; -inf forgets at once.
        bonus: u, added to a token's own exponent where it is read; None weighs the token as its
            successors will, but for the decay: u = -w.
        positions: -1 is padding: its k and v are not read (they may be NaN) and its y is 0.
        segments: the document of each token; one stretch of a row per document.
        state: where the rows stand; None starts from nothing and returns no state, which is what
            training wants. `wkv_state` starts from nothing and returns one.
        chunk: tokens per chunk, rounded up to a power of two; any size gives the same values. None
            is 1 on a CPU, measured to be the fastest there, and 64 elsewhere, which is a guess.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Peng et al. 2023, equation 16 and appendix D, https://arxiv.org/abs/2305.13048; the scan
    inside a chunk as in Sklansky 1960, doi:10.1109/TEC.1960.5221600
    """
    if chunk is None:
        chunk = 1 if jax.default_backend() == "cpu" else 64
    if chunk < 1:
        raise ConfigError(f"wkv: chunk must be at least 1, got {chunk}")
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    rows = rows_after(state, positions, segments)
    time = timeline(rows)
    live = time.live[..., None]
    rate = jnp.maximum(log_decay.astype(dtype), NEVER)
    lift = -rate if bonus is None else bonus.astype(dtype)
    k_, v_ = jnp.where(live, k.astype(dtype), NEVER), jnp.where(live, v.astype(dtype), 0)
    if state is None:
        y = _trained(k_, v_, rate, lift, time, chunk)
        return jnp.where(live, y, 0).astype(v.dtype), None
    start = Sum(*(state[key].astype(dtype) for key in Sum._fields))
    # A state shows its exponents to the outside: here, gradients pass through them.
    read, after = _run(k_, v_, rate, lift, time, start, rows.before[0], chunk, lambda m: m)
    y = jnp.where(live, read.numerator / jnp.where(live, read.denominator, 1), 0).astype(v.dtype)
    position, segment = place_after(rows)
    end = {key: x[:, -1].astype(state[key].dtype) for key, x in after._asdict().items()}
    return y, {**end, "position": position, "segment": segment}


def _run(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    rate: Float[Array, " D"],
    lift: Float[Array, " D"],
    time: Timeline,
    start: Sum,
    position: Int[Array, " B"],
    chunk: int,
    hold: Hold,
) -> tuple[Sum, Sum]:
    """The sums that each token reads [B T D], and the memory after it."""
    live = jnp.broadcast_to(time.live[..., None], v.shape).astype(v.dtype)
    after = _memories(Sum(v, live, k), start, rate, time.run, time.clock, position, chunk, hold)
    past = _faded(_shifted(after, start), rate, jnp.maximum(time.elapsed - 1, 0), ~time.begins)
    return _add(past, Sum(v, live, k + lift[None, None]), hold), after


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _trained(
    k: Float[Array, "B T D"],
    v: Float[Array, "B T D"],
    rate: Float[Array, " D"],
    lift: Float[Array, " D"],
    time: Timeline,
    chunk: int,
) -> Float[Array, "B T D"]:
    """The averages of rows that begin from nothing; anything at padding.

    Its gradient is a recurrence too, from the last token to the first. With p_ti the share of token
    i in y_t and g the cotangent, dv_i = sum_t p_ti g_t and dk_i = sum_t p_ti g_t (v_i - y_t). Left
    to itself, the backward pass keeps a dozen arrays for each level of the scan.
    """
    return _trained_forward(k, v, rate, lift, time, chunk)[0]


def _trained_forward(
    k: Array, v: Array, rate: Array, lift: Array, time: Timeline, chunk: int
) -> tuple[Array, tuple]:
    start, live = _empty(v[:, 0]), time.live[..., None]
    clock = time.clock[:, 0]
    read, _ = _run(k, v, rate, lift, time, start, clock, chunk, jax.lax.stop_gradient)
    weight = jnp.where(live, read.denominator, 1)
    y, total = read.numerator / weight, jnp.where(live, read.exponent + jnp.log(weight), -NEVER)
    return y, (k, v, rate, lift, time, y, total)


def _trained_backward(chunk: int, kept: tuple, g: Array) -> tuple:
    k, v, rate, lift, time, y, total = kept
    g = jnp.where(time.live[..., None], g, 0)
    own = jnp.exp(k + lift[None, None] - total) * g

    def later(rate: Array) -> tuple[Array, Array]:
        return _reversed_sums(k, Sum(g, g * y, -total), rate, time, chunk)

    (by_g, by_gy), tangents = jax.jvp(later, (rate,), (jnp.ones_like(rate),))
    by_rate = jnp.sum(v * tangents[0] - tangents[1], axis=(0, 1))
    by_own = own * (v - y)
    return v * by_g - by_gy + by_own, by_g + own, by_rate, jnp.sum(by_own, axis=(0, 1)), None


_trained.defvjp(_trained_forward, _trained_backward)


def _reversed_sums(
    k: Array, source: Sum, rate: Array, time: Timeline, chunk: int
) -> tuple[Array, Array]:
    """For each token i, the sums over later t of exp(w (p_t - 1 - p_i) + k_i + exponent_t).

    Of the source's two columns. The memory after token t, which stands one position before it,
    runs on to token i, in rows from right to left and time that runs backward.
    """
    source, k = jax.tree.map(lambda x: x[:, ::-1], (source, k))
    run, here, stands = (
        x[:, ::-1] for x in (time.run, -time.clock, time.live.astype(jnp.int32) - time.clock)
    )
    start = _empty(k[:, 0])
    after = _memories(source, start, rate, run, stands, stands[:, 0], chunk, jax.lax.stop_gradient)
    gap = here - previous(stands, here[:, 0])
    seen = run == previous(run, jnp.full_like(run[:, 0], -1))
    past = _faded(_shifted(after, start), rate, gap, seen)
    weight = jnp.exp(k + past.exponent)
    return (weight * past.numerator)[:, ::-1], (weight * past.denominator)[:, ::-1]


def _empty(like: Float[Array, "B D"]) -> Sum:
    zero = jnp.zeros_like(like)
    return Sum(zero, zero, jnp.full_like(like, NEVER))


def _shifted(after: Sum, start: Sum) -> Sum:
    """The memory before each token."""
    return jax.tree.map(lambda s, x: jnp.concatenate([s[:, None], x[:, :-1]], 1), start, after)


def _memories(
    own: Sum,
    start: Sum,
    rate: Float[Array, " D"],
    run: Int[Array, "B T"],
    clock: Int[Array, "B T"],
    position: Int[Array, " B"],
    chunk: int,
    hold: Hold,
) -> Sum:
    """The memory after each token [B T D]: of its document so far, the token itself included."""
    T = run.shape[1]
    chunk = 1 << (min(chunk, T) - 1).bit_length()
    fill = ((0, 0), (0, -T % chunk))
    pads = zip(own, (0, 0, NEVER), strict=True)
    own = Sum(*(jnp.pad(x, (*fill, (0, 0)), constant_values=c) for x, c in pads))
    run, clock = (jnp.pad(x, fill, mode="edge") for x in (run, clock))
    inside = _inside(own, rate, run, clock, chunk, hold)
    run, clock = (x.reshape(x.shape[0], -1, chunk) for x in (run, clock))
    start_run = previous(run[..., -1], jnp.zeros_like(position))
    start_clock = previous(clock[..., -1], position)
    inside = jax.tree.map(lambda x: x.reshape(*run.shape, -1), inside)
    whole = jax.tree.map(lambda x: x[:, :, -1], inside)
    gaps = (clock[..., -1] - start_clock, start_run == run[..., -1])
    if chunk == 1:
        return _ends(whole, start, rate, *gaps, hold)
    if run.shape[1] == 1:
        entering = jax.tree.map(lambda x: x[:, None], start)
    else:
        entering = _shifted(_ends(whole, start, rate, *gaps, hold), start)
    entering = jax.tree.map(lambda x: x[:, :, None], entering)
    earlier = _faded(entering, rate, clock - start_clock[..., None], run == start_run[..., None])
    after = _add(earlier, inside, hold)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, x.shape[-1])[:, :T], after)


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


def _ends(
    whole: Sum,
    start: Sum,
    rate: Float[Array, " D"],
    gap: Int[Array, "B c"],
    seen: Bool[Array, "B c"],
    hold: Hold,
) -> Sum:
    """The memory after each chunk [B c D], of sums over whole chunks."""

    def step(memory: Sum, chunk: tuple[Sum, Array, Array]) -> tuple[Sum, Sum]:
        own, gap, seen = chunk
        memory = _add(_faded(memory, rate, gap, seen), own, hold)
        return memory, memory

    if gap.shape[1] == 1:
        one = jax.tree.map(lambda x: x[:, 0], (whole, gap, seen))
        return jax.tree.map(lambda x: x[:, None], step(start, one)[0])
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (whole, gap, seen))
    _, ends = jax.lax.scan(step, start, chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), ends)


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
