"""A mixture of experts as its definition reads: every expert on every token, then a choice."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def naive_switch(
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T E"],
    live: Bool[Array, "B T"],
    apply_expert: Callable[[int, Float[Array, "B T D"]], Float[Array, "B T D"]],
    capacity: int,
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Switch routing by comparing all pairs of a row's tokens and applying all experts to each.

    out_t = p_t[e] E_e(x_t), e = argmax p_t, if fewer than `capacity` live tokens of the row with
    the same e come before t; else 0. Memory O(T^2 + E T D).

    Source: Fedus et al. 2021, section 2, https://arxiv.org/abs/2101.03961
    """
    experts = logits.shape[-1]
    x, logits = (jnp.where(live[..., None], a, 0) for a in (x, logits))
    probabilities = jax.nn.softmax(logits, axis=-1)
    expert = jnp.argmax(probabilities, axis=-1)
    place = jnp.broadcast_to(jnp.arange(x.shape[1])[None], live.shape)
    place = place if positions is None else positions
    group = jnp.zeros_like(place) if segments is None else segments
    before = (group[:, None] < group[..., None]) | (
        (group[:, None] == group[..., None]) & (place[:, None] < place[..., None])
    )
    rivals = (expert[:, None] == expert[..., None]) & live[:, None]  # [B T T]: s rivals t
    kept = live & ((before & rivals).sum(-1) < capacity)
    out = jnp.zeros_like(x)
    for e in range(experts):
        mine = (kept & (expert == e))[..., None]
        out = out + jnp.where(mine, probabilities[..., e][..., None] * apply_expert(e, x), 0)
    return out
