"""The long convolution written for reading: the oracle of `long_convolution`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def naive_long_convolution(
    u: Float[Array, "B T D"],
    kernel: Float[Array, "D S"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    skip: Float[Array, " D"] | None = None,
) -> Float[Array, "B T D"]:
    """Computes y_t = sum_s kernel[:, p_t - p_s] u_s + skip u_t over the document so far.

    Every pair of tokens is visited, in the inputs' dtype. Arguments as in `long_convolution`.

    Source: Gu et al. 2022, section 3.4, https://arxiv.org/abs/2111.00396
    """
    T, live = u.shape[1], positions >= 0
    u = jnp.where(live[..., None], u, 0)
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & live[:, :, None] & live[:, None, :] & jnp.tril(jnp.ones((T, T), bool))[None]
    lag = positions[:, :, None] - positions[:, None, :]
    seen &= lag < kernel.shape[1]
    weight = jnp.where(seen[None], kernel[:, jnp.where(seen, lag, 0)], 0)
    y = jnp.einsum("dbts,bsd->btd", weight, u)
    return y if skip is None else y + skip[None, None] * u
