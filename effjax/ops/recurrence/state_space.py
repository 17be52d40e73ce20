"""A diagonal state space per channel: P complex modes that ring and decay, driven by one input.

    h_t = A^(p_t - p_{t-1}) h_{t-1} + u_t       y_t = 2 Re(sum_p C_p B_p h_{t,p}) + skip u_t
    A = exp(dt a)      B = (exp(dt a) - 1) / a      a = -exp(log_a_real) + i a_imag

with p the positions and h = 0 where a document begins: the zero-order hold of h' = a h + u with
the paper's input matrix absorbed into C (only their product matters). Because A is diagonal, the
scale B is applied where h is read instead of where u is written. Equal to y = u * K, the
convolution with the Vandermonde kernel K_j = 2 Re(sum_p C_p B_p A_p^j).

`diagonal_state_space` is the form to use (chunks, matrix products per channel), the naive forms it
is tested against are in `state_space_naive.py`, the paper's initial a in `s4d.py`.

Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models",
2022, sections 2 and 3, https://arxiv.org/abs/2206.11893. Departures: decay by difference of
positions, and reset by segment, where the paper has one unpadded document.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.ops.recurrence.bookkeeping import (
    NEVER,
    Rows,
    Timeline,
    empty_place,
    place_after,
    rows_after,
    timeline,
)
from effjax.ops.recurrence.layout import lay_out, move

State = dict[str, Array]
Pair = tuple[Array, Array]  # the real and the imaginary part
Fade = Callable[[Pair, "Modes", Array, Array], Pair]  # (h, modes, gap, same) -> A^gap h, or 0


class Modes(NamedTuple):
    """The system in discrete time, as real pairs: `log_decay` = log A and `weight` = 2 C B."""

    log_decay: tuple[Float[Array, "D P"], Float[Array, "D P"]]
    weight: tuple[Float[Array, "D P"], Float[Array, "D P"]]
    skip: Float[Array, " D"]


class Tables(NamedTuple):
    """What a chunk of C tokens does to a channel. A memory is Q = 2P numbers, real parts first.

    `toeplitz[s, t]` carries input s to output t, `write` input s to the memory after the chunk,
    `read` the memory before the chunk to output t, `decay` = A^C memory to memory.
    """

    toeplitz: Float[Array, "D C C"]
    write: Float[Array, "D Q C"]
    read: Float[Array, "D Q C"]
    decay: tuple[Float[Array, "D P"], Float[Array, "D P"]]


def state_space_state(batch: int, channels: int, modes: int) -> State:
    """Gives the memory of rows that have not seen a token: h = 0 [B D P] twice, position, segment.

    Source: Gu et al. 2022, section 2, https://arxiv.org/abs/2206.11893
    """
    position, segment = empty_place(batch)
    h = jnp.zeros((batch, channels, modes), jnp.float32)
    return {"h_real": h, "h_imag": h, "position": position, "segment": segment}


def diagonal_state_space(
    u: Float[Array, "B T D"],
    *,
    log_dt: Float[Array, " D"],
    log_a_real: Float[Array, "D P"],
    a_imag: Float[Array, "D P"],
    c_real: Float[Array, "D P"],
    c_imag: Float[Array, "D P"],
    skip: Float[Array, " D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 32,
    aligned: bool = False,
) -> tuple[Float[Array, "B T D"], State | None]:
    """Runs a diagonal state space over rows of documents, in chunks of `chunk` tokens.

    In a chunk every channel is one matrix: y = Toeplitz(K) u + (2 C B A^(j+1)) h, and the memory
    after it is A^chunk h + (A^(chunk-1-j)) u. A Toeplitz matrix cannot jump over a boundary, so
    rows that are not `aligned` are first laid out anew (`layout.py`). Rows that need more than
    `spare_chunks` for it (many short documents, wide gaps in the positions) are run token by
    token, at the price of a scan. Operands are float32 (float64 for float64 inputs), products
    follow `jax_default_matmul_precision`, y has u's dtype. FLOPs grow as T D (chunk + 4 P), memory
    as T D (1 + P / chunk).

    Args:
        log_dt: log of each channel's time step.
        log_a_real, a_imag: the modes a; the real part -exp(log_a_real) is never positive.
        c_real, c_imag: the read-out C, with the input matrix absorbed.
        skip: what of the input goes straight to the output.
        positions: -1 is padding: its u is not read (it may be NaN) and its y is 0.
        segments: the document of each token; one stretch of a row per document.
        state: where the rows stand; None starts from nothing and returns no state, which is what
            training wants. `state_space_state` starts from nothing and returns one.
        chunk: tokens per chunk; any size gives the same values.
        aligned: promises that each row is one document without padding or gaps, so that nothing
            is laid out. Only the first token's position and segment are read, for the state.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Gu et al. 2022, sections 2 and 3, https://arxiv.org/abs/2206.11893; chunks as in Dao
    and Gu 2024, section 6, https://arxiv.org/abs/2405.21060
    """
    if chunk < 1:
        raise ConfigError(f"diagonal_state_space: chunk must be at least 1, got {chunk}")
    T, dtype = u.shape[1], jnp.promote_types(u.dtype, jnp.float32)
    parameters = (log_dt, log_a_real, a_imag, c_real, c_imag, skip)
    modes = discretise(*(x.astype(dtype) for x in parameters))
    rows = rows_after(state, positions, segments)
    h = None if state is None else (state["h_real"].astype(dtype), state["h_imag"].astype(dtype))
    if T == 1:
        y, h = _run_one(u.astype(dtype), h, modes, timeline(rows))
    elif aligned:
        y, h = _run_aligned(u.astype(dtype), h, modes, rows, min(chunk, T))
    else:
        y, h = _run_packed(u.astype(dtype), h, modes, rows, min(chunk, T))
    if state is None or h is None:
        return y.astype(u.dtype), None
    real, imag = (x.astype(state["h_real"].dtype) for x in h)
    position, segment = place_after(rows)
    place = {"position": position, "segment": segment}
    return y.astype(u.dtype), {"h_real": real, "h_imag": imag, **place}


def discretise(
    log_dt: Float[Array, " D"],
    log_a_real: Float[Array, "D P"],
    a_imag: Float[Array, "D P"],
    c_real: Float[Array, "D P"],
    c_imag: Float[Array, "D P"],
    skip: Float[Array, " D"],
) -> Modes:
    """Samples the system by zero-order hold: log A = dt a, and 2 C B with B = (exp(dt a) - 1) / a.

    The real part of log A is held above -1e8, where A and B are 0, so that no a gives an infinity;
    near a = 0 the quotient is a Taylor series.

    Source: Gu et al. 2022, section 2, https://arxiv.org/abs/2206.11893
    """
    dt = jnp.exp(log_dt)[:, None]
    real = -jnp.exp(jnp.minimum(log_dt[:, None] + log_a_real, np.log(-NEVER)))
    z = jax.lax.complex(real, dt * a_imag)
    small = jnp.abs(real) + jnp.abs(dt * a_imag) < 0.1
    # Each side sees only arguments that suit it: a gradient passes through both.
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.ones_like(z)
    for n in range(9, 1, -1):
        series = 1 + series * near / n
    weight = 2 * jax.lax.complex(c_real, c_imag) * dt
    weight = weight * jnp.where(small, series, jnp.expm1(far) / far)
    return Modes((z.real, z.imag), (weight.real, weight.imag), skip)


def _run_aligned(
    u: Float[Array, "B T D"], h: Pair | None, modes: Modes, rows: Rows, chunk: int
) -> tuple[Float[Array, "B T D"], Pair | None]:
    """Rows of one document each: the last chunk is filled with zeros, and that is all."""
    B, T, _ = u.shape
    if h is not None:
        position, segment = rows.before
        same = (position >= 0) & (rows.segments[:, 0] == segment)
        h = _faded(h, modes, rows.positions[:, 0] - 1 - position, same)
    u = jnp.pad(u, ((0, 0), (0, -T % chunk), (0, 0)))
    fresh = jnp.zeros((B, u.shape[1] // chunk), bool)
    y, h = _run_chunks(u, h, modes, fresh, jnp.full((B,), T - 1, jnp.int32), chunk)
    return y[:, :T], h


def _run_packed(
    u: Float[Array, "B T D"], h: Pair | None, modes: Modes, rows: Rows, chunk: int
) -> tuple[Float[Array, "B T D"], Pair | None]:
    """Rows of any documents and padding: laid out and run in chunks if they fit, else by token."""
    time = timeline(rows)
    layout = lay_out(time, rows.before[0], chunk)
    spare = ((0, 0), (0, layout.source.shape[1] - u.shape[1]))
    time = Timeline(*(jnp.pad(x, spare) for x in time))  # as the tokens stand when nothing fits

    def by_chunk(u: Array, h: Pair | None, modes: Modes) -> tuple[Array, Pair | None]:
        last = jnp.max(layout.slot, axis=1)
        return _run_chunks(u, h, modes, layout.fresh, last, chunk)

    # Without a checkpoint, the forward pass by chunk would fill room for what these keep.
    by_step, by_gap = (
        jax.checkpoint(partial(_run_tokens, fade=fade, time=time)) for fade in (_stepped, _faded)
    )
    way = jnp.where(layout.fits, 0, jnp.where(jnp.all(time.elapsed <= 1), 1, 2))
    moved = move(u, layout.source, layout.slot)
    y, h = jax.lax.switch(way, [by_chunk, by_step, by_gap], moved, h, modes)
    return move(y, layout.slot, layout.source), h


def _run_chunks(
    u: Float[Array, "B M D"],
    h: Pair | None,
    modes: Modes,
    fresh: Bool[Array, "B c"],
    last: Int[Array, " B"],
    chunk: int,
) -> tuple[Float[Array, "B M D"], Pair | None]:
    """Rows of whole chunks in which index is position; `fresh` chunks begin with no memory.

    Channels come first and time last, so that each step is one batch of matrix products; a memory
    is given back as it stands after slot `last` (-1: as it came), when one was given.
    """
    B, M, D = u.shape
    tables = _tables(modes, chunk)
    x = u.reshape(B * M, D).T.reshape(D, -1, chunk)
    written = jnp.einsum("dmc,dpc->dmp", x, tables.write)
    written = written.reshape(D, B, -1, written.shape[-1]).transpose(2, 0, 1, 3)
    start = jnp.zeros_like(written[0]) if h is None else _joined(h).swapaxes(0, 1)
    _, before = jax.lax.scan(partial(_carry, tables.decay), start, (written, fresh.T))
    read = before.transpose(1, 2, 0, 3).reshape(D, -1, before.shape[-1])
    y = jnp.einsum("dms,dst->dmt", x, tables.toeplitz) + jnp.einsum(
        "dmp,dpt->dmt", read, tables.read
    )
    y = y.reshape(D, B * M).T.reshape(B, M, D)
    return y, None if h is None else _leave(u, h, before, modes, tables, last)


def _carry(
    decay: Pair, h: Float[Array, "D B Q"], step: tuple[Array, Array]
) -> tuple[Float[Array, "D B Q"], Float[Array, "D B Q"]]:
    """The memory after a chunk, and the memory that the chunk itself reads."""
    written, fresh = step
    h = jnp.where(fresh[None, :, None], 0, h)
    (a, b), (real, imag) = (x[:, None] for x in decay), jnp.split(h, 2, axis=-1)
    return jnp.concatenate([a * real - b * imag, a * imag + b * real], axis=-1) + written, h


def _tables(modes: Modes, chunk: int) -> Tables:
    """The four matrices of a chunk, from the powers A^0 ... A^chunk; the skip is K_0's."""
    (log_size, angle), (w, v) = modes.log_decay, (x[..., None] for x in modes.weight)
    power = jnp.arange(chunk + 1, dtype=angle.dtype)[None, None]
    size = jnp.exp(log_size[..., None] * power)
    angle = angle[..., None] * power
    real, imag = size * jnp.cos(angle), size * jnp.sin(angle)
    out_real, out_imag = w * real - v * imag, w * imag + v * real
    kernel = jnp.sum(out_real[..., :chunk], axis=1).at[:, 0].add(modes.skip)
    lag = np.arange(chunk)[None, :] - np.arange(chunk)[:, None]
    toeplitz = jnp.where(lag[None] >= 0, kernel[:, np.maximum(lag, 0)], 0)
    write = jnp.concatenate([real, imag], axis=1)[..., chunk - 1 :: -1]
    read = jnp.concatenate([out_real, -out_imag], axis=1)[..., 1:]
    return Tables(toeplitz, write, read, (real[..., chunk], imag[..., chunk]))


def _leave(
    u: Float[Array, "B M D"],
    h: Pair,
    before: Float[Array, "c D B Q"],
    modes: Modes,
    tables: Tables,
    last: Int[Array, " B"],
) -> Pair:
    """The memory after slot `last` of each row: one more chunk, which ends there."""
    chunk = tables.write.shape[-1]
    here, offset = jnp.maximum(last, 0) // chunk, last % chunk
    entered = jax.vmap(lambda x, c: x[c], in_axes=(2, 0))(before, here)
    index = offset[:, None] + 1 - chunk + jnp.arange(chunk)[None]
    slot = jnp.where(index >= 0, here[:, None] * chunk + index, 0)
    tail = jnp.where((index >= 0)[..., None], jax.vmap(lambda x, i: x[i])(u, slot), 0)
    written = _parted(jnp.einsum("bcd,dpc->bdp", tail, tables.write))
    faded = _faded(_parted(entered), modes, offset + 1, last >= 0)
    return _chosen(last >= 0, (faded[0] + written[0], faded[1] + written[1]), h)


def _run_tokens(
    u: Float[Array, "B T D"], h: Pair | None, modes: Modes, time: Timeline, fade: Fade
) -> tuple[Float[Array, "B T D"], Pair | None]:
    """Any rows, token by token; the backward pass keeps the memories of sqrt(T) pieces."""
    B, T, D = u.shape
    piece = max(1, int(T**0.5))

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % piece), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x, 1, 0).reshape(-1, piece, B, *x.shape[2:])

    @jax.checkpoint
    def run_piece(h: Pair, tokens: tuple[Array, ...]) -> tuple[Pair, Array]:
        return jax.lax.scan(partial(_token, modes, fade), h, tokens)

    u = jnp.where(time.live[..., None], u, 0)
    tokens = tuple(pieces(x) for x in (u, time.elapsed, time.begins))
    end, y = jax.lax.scan(run_piece, h or _nothing(u, modes), tokens)
    y = jnp.moveaxis(y.reshape(-1, B, D)[:T], 0, 1)
    return jnp.where(time.live[..., None], y, 0), None if h is None else end


def _token(
    modes: Modes, fade: Fade, h: Pair, token: tuple[Array, ...]
) -> tuple[Pair, Float[Array, "B D"]]:
    """One step of the recurrence for a batch of rows; at padding, elapsed and u are 0."""
    u, elapsed, begins = token
    return _written(fade(h, modes, elapsed, ~begins), modes, u)


def _run_one(
    u: Float[Array, "B 1 D"], h: Pair | None, modes: Modes, time: Timeline
) -> tuple[Float[Array, "B 1 D"], Pair | None]:
    """One token of each row, as in decoding."""
    step, same, start = time.elapsed[:, 0], ~time.begins[:, 0], h or _nothing(u, modes)
    faded = jax.lax.cond(jnp.all(step <= 1), _stepped, _faded, start, modes, step, same)
    after, y = _written(faded, modes, jnp.where(time.live, u[:, 0], 0))
    y = jnp.where(time.live[..., None], y[:, None], 0)
    return y, None if h is None else after


def _written(h: Pair, modes: Modes, u: Float[Array, "B D"]) -> tuple[Pair, Float[Array, "B D"]]:
    """Adds an input to the memory and reads the output: h + u and 2 Re(C B h) + skip u."""
    (real, imag), (w, v) = h, (x[None] for x in modes.weight)
    real = real + u[..., None]
    return (real, imag), jnp.sum(w * real - v * imag, axis=-1) + modes.skip[None] * u


def _faded(h: Pair, modes: Modes, gap: Int[Array, " B"], same: Bool[Array, " B"]) -> Pair:
    """A^gap h in rows where `same`, else 0."""
    power = jnp.where(same, jnp.maximum(gap, 0), 0)[:, None, None]
    log_size, angle = (x[None] * power.astype(x.dtype) for x in modes.log_decay)
    return _chosen(same, _turned(h, (log_size, angle)), (jnp.zeros_like(h[0]),) * 2)


def _stepped(h: Pair, modes: Modes, gap: Int[Array, " B"], same: Bool[Array, " B"]) -> Pair:
    """`_faded` for gaps of 0 and 1 only: all rows, and all steps of a scan, share A."""
    once = _turned(h, modes.log_decay)
    return _chosen(gap == 1, once, _chosen(same, h, (jnp.zeros_like(h[0]),) * 2))


def _turned(h: Pair, exponent: Pair) -> Pair:
    """exp(exponent) h, of complex numbers."""
    size = jnp.exp(exponent[0])
    a, b = size * jnp.cos(exponent[1]), size * jnp.sin(exponent[1])
    a, b = (jnp.broadcast_to(x, h[0].shape) for x in (a, b))
    return a * h[0] - b * h[1], a * h[1] + b * h[0]


def _chosen(rows: Bool[Array, " B"], yes: Pair, no: Pair) -> Pair:
    """`yes` in these rows, else `no`."""
    rows = rows[:, None, None]
    return jnp.where(rows, yes[0], no[0]), jnp.where(rows, yes[1], no[1])


def _nothing(u: Float[Array, "B T D"], modes: Modes) -> Pair:
    h = jnp.zeros((u.shape[0], *modes.log_decay[0].shape), u.dtype)
    return h, h


def _joined(h: Pair) -> Float[Array, "B D Q"]:
    return jnp.concatenate(h, axis=-1)


def _parted(h: Float[Array, "B D Q"]) -> Pair:
    real, imag = jnp.split(h, 2, axis=-1)
    return real, imag
