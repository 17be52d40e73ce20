"""Attention of one query: what each step of decoding does."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.ops.attention.bias import Bias
from effjax.ops.attention.layout import clear, dot
from effjax.ops.attention.plan import Plan
from effjax.ops.attention.scores import NO_KEY, NO_QUERY, Marks


def single_query_attention(
    plan: Plan,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    marks: Marks,
    bias: Bias | None,
) -> Float[Array, "B 1 N H"]:
    """Two products and a masked soft-max over all keys, without blocks; for use without gradients.

    Source: the definition, as in `naive.py`.
    """
    B, _, N, H = q.shape
    K = k.shape[2]
    q = clear(q, marks.q_live).reshape(B, K, N // K, H)
    places = (
        jnp.maximum(marks.q_positions, 0)[:, :, None, None],
        jnp.maximum(marks.k_positions, 0)[:, None, None, :],
        (plan.group * N + jnp.arange(N)).reshape(1, K, N // K, 1),
    )
    q_segments = jnp.where(marks.q_live, marks.q_segments, NO_QUERY)[:, :, None, None]
    k_segments = jnp.where(marks.k_live, marks.k_segments, NO_KEY)[:, None, None, :]

    s = dot("bkgh,bskh->bkgs", q, k) * plan.scale
    if bias is not None:
        s = s + bias(*places).astype(s.dtype)
    s = jnp.where((q_segments == k_segments) & plan.pattern.allowed(*places), s, -jnp.inf)
    p = jnp.exp(s - jnp.maximum(s.max(axis=-1, keepdims=True), jnp.finfo(s.dtype).min))
    l = p.sum(axis=-1, keepdims=True)
    p = p / jnp.where(l > 0, l, 1)
    y = dot("bkgs,bskh->bkgh", p.astype(v.dtype), clear(v, marks.k_live))
    return y.reshape(B, 1, N, H).astype(q.dtype)
