"""Retention: a matrix memory per head that fades by a fixed rate, in three forms that agree.

    S_t = gamma^(p_t - p_{t-1}) S_{t-1} + k_t v_t^T        y_t = q_t S_t

in every head, with p the positions and gamma = exp(log_decay); a document starts from S = 0.
`retention` is the form to use: the gated recurrence, whose gates here say how much time has passed.
`parallel_retention` and `recurrent_retention` are the naive forms that it is tested against.
`parallel_retention` is meant for reading: O(T^2) memory.

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

from effjax.ops.recurrence.bookkeeping import NEVER, rows_after, timeline
from effjax.ops.recurrence.gated import gated_recurrence, gated_state

State = dict[str, Array]


def retention_state(batch: int, heads: int, key_dim: int, value_dim: int) -> State:
    """Gives the memory of rows that have not seen a token: S = 0 [B N H Hv], position, segment -1.

    Source: Sun et al. 2023, equation 6, https://arxiv.org/abs/2307.08621
    """
    return gated_state(batch, heads, key_dim, value_dim)


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

    with S_c, p_c the memory and last position before the chunk: `gated_recurrence` with the log
    gate (p_t - p_{t-1}) log gamma. FLOPs grow as T (chunk + 2 Hv), memory as T (chunk + Hv).

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
    time = timeline(rows_after(state, positions, segments))
    rate = jnp.maximum(log_decay.astype(jnp.promote_types(v.dtype, jnp.float32)), NEVER)
    fade = rate[None, None] * time.elapsed[..., None].astype(rate.dtype)
    return gated_recurrence(
        q, k, v, fade, positions=positions, segments=segments, state=state, chunk=chunk
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
