"""Retention: a matrix memory per head that fades by a fixed rate, in three forms that agree.

    S_t = gamma^(p_t - p_{t-1}) S_{t-1} + k_t v_t^T        y_t = q_t S_t

in every head, with p the positions and gamma = exp(log_decay); a document starts from S = 0.
`retention` is the form to use (chunks, all matrix products), `parallel_retention` and
`recurrent_retention` are the naive ones that it is tested against. `parallel_retention` is meant
for reading: O(T^2) memory.

This is the bare recurrence. What the paper puts around it lives in the mixer module: the rotation
(xPos, here RoPE) of q and k by position, the key's scale H^-0.5, the norm of each head's output,
the swish gate, and the rates 1 - 2^(-5 - n) for head n. The paper's three normalisations of the
scores (section 2.1) divide y by a scalar per token and head, which that norm undoes.

Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
2023, equations 1-7, https://arxiv.org/abs/2307.08621. Departures: decay by difference of
positions, and reset by segment, where the paper has one unpadded document.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def retention_state(batch: int, heads: int, key_dim: int, value_dim: int) -> State:
    """Gives the memory of rows that have not seen a token: S = 0 [B N H Hv], position, segment -1.

    Source: Sun et al. 2023, equation 6, https://arxiv.org/abs/2307.08621
    """
    position, segment = empty_place(batch)
    S = jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)
    return {"S": S, "position": position, "segment": segment}


def retention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, " N"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes retention in chunks of `chunk` tokens: attention inside, the memory between.

        y_t = sum_{s <= t, same chunk} gamma^(p_t - p_s) (q_t . k_s) v_s + gamma^(p_t - p_c) q_t S_c

    with S_c, p_c the memory and last position before the chunk. Every exponent that is taken is
    at most 0, and what a token must not see is set to zero before it is multiplied: the future and
    other documents change nothing, to the last bit. Operands are float32 (float64 for float64
    inputs), products follow `jax_default_matmul_precision`, y has v's dtype. FLOPs grow as
    T (chunk + 2 Hv), memory as T (chunk + Hv).

    Args:
        log_decay: log gamma of each head, at most 0; any trained or constant array.
        positions: -1 is padding: its q, k and v are not read (they may be NaN) and its y is 0.
        segments: the document of each token; one stretch of a row per document.
        state: where the rows stand; None starts from nothing and returns no state, which is what
            training wants. `retention_state` starts from nothing and returns one.
        chunk: tokens per chunk; any size gives the same values.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Sun et al. 2023, equation 7 (chunkwise), https://arxiv.org/abs/2307.08621
    """
    if chunk < 1:
        raise ConfigError(f"retention: chunk must be at least 1, got {chunk}")
    B, T, N, Hv = v.shape
    chunk = min(chunk, T)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    rows = rows_after(state, positions, segments)
    time = timeline(rows)
    rate = jnp.maximum(log_decay.astype(dtype), NEVER)
    q, k, v_ = (_split(_silent(x.astype(dtype), time), chunk) for x in (q, k, v))
    S = jnp.zeros((B, N, q.shape[-1], Hv), dtype) if state is None else state["S"].astype(dtype)
    inside, read, write, keep = _decays(rate, time, rows.before[0], chunk)
    scores = jnp.einsum("bncth,bncsh->bncts", q, k) * inside
    y = jnp.einsum("bncts,bncsv->bnctv", scores, v_)
    written = jnp.einsum("bncsh,bncsv->cbnhv", k * write[..., None], v_)
    S, entering = jax.lax.scan(_carry, S, (keep, written))
    y = y + jnp.einsum("bncth,cbnhv->bnctv", q, entering) * read[..., None]
    y = _join(y, T).astype(v.dtype)
    if state is None:
        return y, None
    position, segment = place_after(rows)
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def _carry(
    S: Float[Array, "B N H Hv"],
    step: tuple[Float[Array, "B N"], Float[Array, "B N H Hv"]],
) -> tuple[Float[Array, "B N H Hv"], Float[Array, "B N H Hv"]]:
    """The memory after a chunk, and the memory that the chunk itself reads."""
    keep, written = step
    return keep[..., None, None] * S + written, S


def _silent(x: Float[Array, "B T ..."], time: Timeline) -> Float[Array, "B T ..."]:
    """Zero at padding, whatever was there: 0 * NaN is NaN, so a mask must come first."""
    return jnp.where(time.live.reshape(time.live.shape + (1,) * (x.ndim - 2)), x, 0)


def _split(x: Float[Array, "B T N H"], chunk: int) -> Float[Array, "B N c C H"]:
    """Whole chunks of tokens, heads first; the last chunk is filled with padding."""
    B, T, N, H = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % chunk), (0, 0), (0, 0)))
    return x.reshape(B, -1, chunk, N, H).transpose(0, 3, 1, 2, 4)


def _join(y: Float[Array, "B N c C H"], length: int) -> Float[Array, "B T N H"]:
    """Undoes `_split`."""
    B, N, _, _, H = y.shape
    return y.transpose(0, 2, 3, 1, 4).reshape(B, -1, N, H)[:, :length]


def _fade(rate: Float[Array, " N"], gap: Int[Array, "B ..."], seen: Array) -> Array:
    """gamma^gap where `seen`, else 0, heads on axis 1. The exponent is never positive."""
    gap = jnp.where(seen, jnp.maximum(gap, 0), 0).astype(rate.dtype)[:, None]
    return jnp.where(seen[:, None], jnp.exp(rate.reshape((1, -1) + (1,) * (gap.ndim - 2)) * gap), 0)


def _decays(
    rate: Float[Array, " N"], time: Timeline, position: Int[Array, " B"], chunk: int
) -> tuple[
    Float[Array, "B N c C C"],
    Float[Array, "B N c C"],
    Float[Array, "B N c C"],
    Float[Array, "c B N"],
]:
    """The four decays of the chunked form, each already 0 where nothing may pass.

    Token to token inside a chunk; memory before the chunk to token; token to memory after the
    chunk; memory before to memory after.
    """
    fill = ((0, 0), (0, -time.live.shape[1] % chunk))

    def chunks(x: Array, mode: str) -> Array:
        return jnp.pad(x, fill, mode=mode).reshape(x.shape[0], -1, chunk)

    live = chunks(time.live, "constant")
    run, clock = chunks(time.run, "edge"), chunks(time.clock, "edge")
    end_run, end = run[..., -1], clock[..., -1]
    start_run, start = previous(end_run, jnp.zeros_like(position)), previous(end, position)
    past = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]
    pair = live[..., :, None] & live[..., None, :] & (run[..., :, None] == run[..., None, :]) & past
    return (
        _fade(rate, clock[..., :, None] - clock[..., None, :], pair),
        _fade(rate, clock - start[..., None], live & (run == start_run[..., None])),
        _fade(rate, end[..., None] - clock, live & (run == end_run[..., None])),
        _fade(rate, end - start, start_run == end_run).transpose(2, 0, 1),
    )


def parallel_retention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, " N"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes retention as one masked product, (q k^T * D) v with D_ts = gamma^(p_t - p_s).

    The naive form, in the inputs' dtype. Arguments and results as in `retention`.

    Source: Sun et al. 2023, equation 5 (parallel), https://arxiv.org/abs/2307.08621
    """
    T, live = positions.shape[1], positions >= 0
    k, v, q = (jnp.where(live[..., None, None], x, 0) for x in (k, v, q))

    def decay(gap: Array, seen: Array) -> Array:  # heads last
        gap = jnp.where(seen, gap, 0)[..., None]
        rate = log_decay.reshape((1,) * (gap.ndim - 1) + (-1,))
        return jnp.where(seen[..., None], jnp.exp(rate * gap), 0)

    same = segments[:, :, None] == segments[:, None, :]
    seen = same & live[:, :, None] & live[:, None, :] & jnp.tril(jnp.ones((T, T), bool))[None]
    D = decay(positions[:, :, None] - positions[:, None, :], seen)
    y = jnp.einsum("btsn,btnh,bsnh,bsnv->btnv", D, q, k, v)
    if state is None:
        return y, None
    old, old_segment = state["position"], state["segment"]
    onward = live & (segments == old_segment[:, None]) & (old >= 0)[:, None]
    y += decay(positions - old[:, None], onward)[..., None] * jnp.einsum(
        "btnh,bnhv->btnv", q, state["S"].astype(q.dtype)
    )
    last = jnp.max(jnp.where(live, jnp.arange(T)[None], -1), axis=1)
    position, segment = (
        jnp.where(last >= 0, x[jnp.arange(x.shape[0]), last], was)
        for x, was in ((positions, old), (segments, old_segment))
    )
    fresh = decay(position[:, None] - positions, live & (segments == segment[:, None]))
    kept = decay(position - old, segment == old_segment)
    S = kept[..., None, None] * state["S"] + jnp.einsum("bsn,bsnh,bsnv->bnhv", fresh, k, v)
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def recurrent_retention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    log_decay: Float[Array, " N"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes retention token by token: S <- gamma^(p_t - p) S + k_t v_t^T, y_t = q_t S.

    The naive form, in the inputs' dtype. Arguments and results as in `retention`.

    Source: Sun et al. 2023, equation 6 (recurrent), https://arxiv.org/abs/2307.08621
    """
    start = state or retention_state(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    start = start | {"S": start["S"].astype(jnp.promote_types(start["S"].dtype, v.dtype))}
    step = partial(_token, jnp.exp(log_decay))
    time_first = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, positions, segments))
    end, y = jax.lax.scan(step, start, time_first)
    if state is None:
        return jnp.moveaxis(y, 0, 1), None
    return jnp.moveaxis(y, 0, 1), end | {"S": end["S"].astype(state["S"].dtype)}


def _token(
    gamma: Float[Array, " N"], state: State, token: tuple[Array, ...]
) -> tuple[State, Array]:
    """One step of the recurrence for a batch of rows."""
    q, k, v, position, segment = token
    live = position >= 0
    same = (state["position"] >= 0) & (segment == state["segment"])
    elapsed = jnp.where(live & same, position - state["position"], 0)
    faded = gamma[None] ** elapsed[:, None] * same[:, None]
    S = faded[..., None, None] * state["S"] + k[..., :, None] * v[..., None, :]
    S = jnp.where(live[:, None, None, None], S, state["S"])
    y = jnp.where(live[:, None, None], jnp.einsum("bnh,bnhv->bnv", q, S), 0).astype(v.dtype)
    keep = {
        "position": jnp.where(live, position, state["position"]),
        "segment": jnp.where(live, segment, state["segment"]),
    }
    return {"S": S, **keep}, y
