"""Random feature attention: random Fourier features of unit queries and keys, and a gate.

    phi(x) = (sin(w_1 . x), ..., cos(w_1 . x), ...) / sqrt(R),  w_r ~ N(0, I)
    E[phi(q) . phi(k)] = exp(-|q - k|^2 / 2) = exp(q . k - 1)     for q, k of length 1

so that sums of phi(k_s) v_s^T estimate soft-max attention. With a gate g_t in (0, 1) of each head,

    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T        z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)

and y_t = phi(q_t) S_t / phi(q_t) . z_t. Where all gates are the same and near 1, 1 - g cancels, and
the gated form is the plain one.

An estimate of a positive kernel may be 0 or negative. The kernel of two unit vectors is exp(-2) at
least, and so is a denominator, in units of what the token's own key is written with; an estimate
below that is taken to be that. (The authors' code takes 1.0 where it decodes and 1e-3 where it
trains, so that the two differ.)

Source: Peng et al., "Random Feature Attention", 2021, section 3, https://arxiv.org/abs/2103.02143;
the authors' code, https://github.com/Noahs-ARK/RFA, which has no gate.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.recurrence.gated import gated_state
from effjax.ops.recurrence.linear_attention import kernel_sums

State = dict[str, Array]

LEAST = math.exp(-2)  # the kernel of opposite unit vectors
TINY = 1e-30  # where a gate lets nothing in: no denominator is 0


def unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Scales vectors to length 1 in at least float32; those near 0 stay there, with a derivative.

    x / sqrt(|x|^2 + 1e-6).

    Source: Peng et al. 2021, section 3.1, https://arxiv.org/abs/2103.02143; the constant is that of
    https://github.com/fla-org/flash-linear-attention (`fla/modules/l2norm.py`).
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def fourier_features(
    x: Float[Array, "B T N H"], projection: Float[Array, "N R H"]
) -> Float[Array, "B T N E"]:
    """Computes phi(x), of length 1: sines and cosines of R projections in each head.

    Source: Peng et al. 2021, theorem 1, https://arxiv.org/abs/2103.02143
    """
    angle = jnp.einsum("btnh,nrh->btnr", x, projection.astype(x.dtype))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) * angle.shape[-1] ** -0.5


def random_feature_state(batch: int, heads: int, features: int, value_dim: int) -> State:
    """Gives the memory of rows that have not seen a token: S = 0 [B N 2R Hv+1], position, segment.

    Source: Peng et al. 2021, section 3.2, https://arxiv.org/abs/2103.02143
    """
    return gated_state(batch, heads, 2 * features, value_dim + 1)


def random_feature_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N Hv"],
    projection: Float[Array, "N R H"],
    gate: Float[Array, "B T N"] | None = None,
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N Hv"], State | None]:
    """Estimates causal soft-max attention of unit queries and keys, with a gate or without.

    y has v's dtype, 0 at padding. Arguments as in `gated_recurrence`; `random_feature_state` starts
    from nothing.

    Args:
        q, k: of any length; they are scaled to length 1.
        projection: standard normal vectors; scaled channel by channel, they sharpen the kernel.
        gate: logits of g_t; None adds tokens up.

    Raises:
        ConfigError: chunk is less than 1.

    Source: Peng et al. 2021, equations 5 and 7, https://arxiv.org/abs/2103.02143
    """
    live = (positions >= 0)[..., None]
    q_, k_ = (fourier_features(unit(jnp.where(live[..., None], x, 0)), projection) for x in (q, k))
    if gate is None:
        log_gate, written = None, jnp.ones(v.shape[:3], q_.dtype)
    else:
        gate = jnp.where(live, gate.astype(q_.dtype), 0)
        log_gate, written = jax.nn.log_sigmoid(gate), jax.nn.sigmoid(-gate)
    above, below, state = kernel_sums(
        q_,
        k_ * written[..., None],
        v,
        log_gate,
        positions=positions,
        segments=segments,
        state=state,
        chunk=chunk,
    )
    least = LEAST * written[..., None] + TINY
    below = jnp.where(below > least, below, least)
    # The slope of a quotient has a square below it, which underflows where gates let little in.
    size = jax.lax.stop_gradient(below)
    return (above / size / (below / size)).astype(v.dtype), state
