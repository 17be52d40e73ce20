"""The delta rule written for reading: the oracles of `delta_rule`.

Both work in the inputs' dtype and share no code with the fast form.

Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024,
https://arxiv.org/abs/2412.06464
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

State = dict[str, Array]


def parallel_delta(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    beta: Float[Array, "B T N"],
    log_gate: Float[Array, "B T N"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes the whole row as one attention: y = (q k^T * D) u, u = (I + A)^-1 beta (v - D k S).

    D_ts is the product of the gates after s up to t, 0 across documents, and A_ts =
    beta_t D_ts k_t . k_s for s < t. Arguments and results as in `delta_rule`.

    Source: Yang et al. 2024, section 3.3, https://arxiv.org/abs/2412.06464
    """
    T, live = positions.shape[1], positions >= 0
    q, k, v = (jnp.where(live[..., None, None], x, 0) for x in (q, k, v))
    beta, g = (jnp.where(live[..., None], x, 0) for x in (beta, log_gate))
    t, s, r = np.ogrid[:T, :T, :T]
    between = jnp.asarray((s < r) & (r <= t), v.dtype)
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & live[:, :, None] & live[:, None, :] & jnp.tril(jnp.ones((T, T), bool))[None]
    D = jnp.exp(jnp.einsum("tsr,brn->bnts", between, g)) * seen[:, None]
    old, old_segment = jnp.full(segments.shape[:1], -1), jnp.full(segments.shape[:1], -1)
    S = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), v.dtype)
    if state is not None:
        old, old_segment, S = state["position"], state["segment"], state["S"].astype(v.dtype)
    onward = live & (segments == old_segment[:, None]) & (old >= 0)[:, None]
    entered = jnp.exp(jnp.cumsum(g, axis=1)) * onward[..., None]
    A = jnp.einsum("btn,btnh,bsnh,bnts->bnts", beta, k, k, D * np.tri(T, k=-1)[None, None])
    right = v - jnp.einsum("btn,btnh,bnhv->btnv", entered, k, S)
    eye = jnp.eye(T, dtype=v.dtype)[None, None]
    u = jnp.linalg.solve(eye + A, (beta[..., None] * right).swapaxes(1, 2)).swapaxes(1, 2)
    y = jnp.einsum("btnh,bsnh,bnts,bsnv->btnv", q, k, D, u)
    y += jnp.einsum("btn,btnh,bnhv->btnv", entered, q, S)
    if state is None:
        return y, None
    last = jnp.max(jnp.where(live, jnp.arange(T)[None], -1), axis=1)
    position, segment = (
        jnp.where(last >= 0, x[jnp.arange(x.shape[0]), last], was)
        for x, was in ((positions, old), (segments, old_segment))
    )
    after = jnp.exp(jnp.einsum("sr,brn->bsn", between[-1], g))
    fresh = after * (live & (segments == segment[:, None]))[..., None]
    kept = jnp.exp(jnp.sum(g, axis=1)) * (segment == old_segment)[:, None]
    S = kept[..., None, None] * S + jnp.einsum("bsn,bsnh,bsnv->bnhv", fresh, k, u)
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}


def recurrent_delta(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    beta: Float[Array, "B T N"],
    log_gate: Float[Array, "B T N"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Computes S <- exp(g_t) (I - beta_t k_t k_t^T) S + beta_t k_t v_t^T, y_t = q_t S, by token.

    Arguments and results as in `delta_rule`.

    Source: Yang et al. 2024, equation 10, https://arxiv.org/abs/2412.06464
    """
    live = positions >= 0
    q, k, v = (jnp.where(live[..., None, None], x, 0) for x in (q, k, v))
    beta, g = (jnp.where(live[..., None], x, 0) for x in (beta, log_gate))
    eye = jnp.eye(k.shape[-1], dtype=v.dtype)[None, None]

    def step(
        carry: tuple[Array, Array, Array], token: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        S, position, segment = carry
        q, k, v, beta, g, p, s = token
        live, same = p >= 0, (position >= 0) & (s == segment)
        turn = eye - beta[..., None, None] * k[..., :, None] * k[..., None, :]
        moved = jnp.exp(g)[..., None, None] * jnp.einsum("bngh,bnhv->bngv", turn, S)
        moved = jnp.where(same[:, None, None, None], moved, 0)
        added = beta[..., None, None] * k[..., :, None] * v[..., None, :]
        S = jnp.where(live[:, None, None, None], moved + added, S)
        y = jnp.where(live[:, None, None], jnp.einsum("bnh,bnhv->bnv", q, S), 0)
        return (S, jnp.where(live, p, position), jnp.where(live, s, segment)), y

    nothing = jnp.full(positions.shape[:1], -1, positions.dtype)
    start = (jnp.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1]), v.dtype), nothing, nothing)
    if state is not None:
        start = (state["S"].astype(v.dtype), state["position"], state["segment"])
    rows = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, g, positions, segments))
    (S, position, segment), y = jax.lax.scan(step, start, rows)
    y = jnp.moveaxis(y, 0, 1)
    if state is None:
        return y, None
    return y, {"S": S.astype(state["S"].dtype), "position": position, "segment": segment}
