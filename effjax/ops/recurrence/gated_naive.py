"""The gated outer-product recurrence written for reading: the oracles of `gated_recurrence`.

Both work in the inputs' dtype and share no code with the fast form.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024,
https://arxiv.org/abs/2312.06635
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

State = dict[str, Array]


def parallel_gated(
    q: Float[Array, "B T G H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T N Hv"],
    log_gate: Float[Array, "B T N"] | Float[Array, "B T N H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes y_t = sum_{s <= t} sum_h q_th k_sh exp(sum_{s < r <= t} log_gate_rh) v_s.

    Over live tokens s of t's document; every pair of tokens is visited, and every log gate between
    them. Arguments and results as in `gated_recurrence`.

    Source: Yang et al. 2024, equation 4, https://arxiv.org/abs/2312.06635
    """
    T, live = positions.shape[1], positions >= 0
    q, k, v, g = _for_each_head(q, k, v, log_gate, live)
    t, s, r = np.ogrid[:T, :T, :T]
    between = jnp.asarray((s < r) & (r <= t), v.dtype)
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & live[:, :, None] & live[:, None, :] & jnp.tril(jnp.ones((T, T), bool))[None]
    D = jnp.exp(jnp.einsum("tsr,brnh->btsnh", between, g)) * seen[..., None, None]
    y = jnp.einsum("btsnh,btnh,bsnh,bsnv->btnv", D, q, k, v)
    if state is None:
        return y, None
    old, old_segment, S = state["position"], state["segment"], state["S"].astype(v.dtype)
    onward = live & (segments == old_segment[:, None]) & (old >= 0)[:, None]
    entered = jnp.exp(jnp.cumsum(g, axis=1)) * onward[..., None, None]
    y += jnp.einsum("btnh,btnh,bnhv->btnv", entered, q, S)
    last = jnp.max(jnp.where(live, jnp.arange(T)[None], -1), axis=1)
    position, segment = (
        jnp.where(last >= 0, x[jnp.arange(x.shape[0]), last], was)
        for x, was in ((positions, old), (segments, old_segment))
    )
    after = jnp.exp(jnp.einsum("sr,brnh->bsnh", between[-1], g))
    fresh = after * (live & (segments == segment[:, None]))[..., None, None]
    kept = jnp.exp(jnp.sum(g, axis=1)) * (segment == old_segment)[:, None, None]
    S = kept[..., None] * S + jnp.einsum("bsnh,bsnh,bsnv->bnhv", fresh, k, v)
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def recurrent_gated(
    q: Float[Array, "B T G H"],
    k: Float[Array, "B T G H"],
    v: Float[Array, "B T N Hv"],
    log_gate: Float[Array, "B T N"] | Float[Array, "B T N H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes S <- diag(exp(log_gate_t)) S + k_t v_t^T, y_t = q_t S token by token.

    Arguments and results as in `gated_recurrence`.

    Source: Yang et al. 2024, equation 3, https://arxiv.org/abs/2312.06635
    """
    q, k, v, g = _for_each_head(q, k, v, log_gate, positions >= 0)

    def step(
        carry: tuple[Array, Array, Array], token: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        S, position, segment = carry
        q, k, v, g, p, s = token
        live, same = p >= 0, (position >= 0) & (s == segment)
        faded = jnp.where(same[:, None, None, None], jnp.exp(g)[..., None] * S, 0)
        S = jnp.where(live[:, None, None, None], faded + k[..., None] * v[..., None, :], S)
        y = jnp.where(live[:, None, None], jnp.einsum("bnh,bnhv->bnv", q, S), 0)
        return (S, jnp.where(live, p, position), jnp.where(live, s, segment)), y

    nothing = jnp.full(positions.shape[:1], -1, positions.dtype)
    start = (jnp.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1]), v.dtype), nothing, nothing)
    if state is not None:
        start = (state["S"].astype(v.dtype), state["position"], state["segment"])
    rows = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, positions, segments))
    (S, position, segment), y = jax.lax.scan(step, start, rows)
    y = jnp.moveaxis(y, 0, 1)
    if state is None:
        return y, None
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def _for_each_head(
    q: Array, k: Array, v: Array, log_gate: Array, live: Array
) -> tuple[Array, Array, Array, Array]:
    """Queries and keys of each head, a gate for each channel; zeros at padding."""
    if log_gate.ndim == 3:
        log_gate = jnp.broadcast_to(log_gate[..., None], (*v.shape[:3], k.shape[-1]))
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    q, k, v, g = (jnp.where(live[..., None, None], x, 0) for x in (q, k, v, log_gate))
    return q, k, v, g
