"""Next-token prediction: the negative log-likelihood of each target, in nats."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError


def causal_lm(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    *,
    z: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sums over a batch how improbable each next token was, and counts the tokens.

    sum_t [ lse(h_t) - (1 - s) h_t[target_t] - s mean(h_t) + z lse(h_t)^2 ], in at least float32,
    with lse = log sum exp. Targets are already shifted; a negative one is ignored, whatever its
    logits hold, NaN included: nothing of it reaches the sum, the count or a gradient. A target of V
    or more gives NaN rather than a plausible number.

    z: weight of a penalty that keeps the softmax normalised, in training only.
    smoothing: the share s of the target's mass that is spread evenly over all V tokens.
    Returns the sum in nats and the count; `mean_loss` divides, after all parts have been added.
    Raises ConfigError: z or smoothing out of range.

    Source: Bengio et al. 2003, section 2, https://www.jmlr.org/papers/v3/bengio03a.html; smoothing:
    Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567; z: Chowdhery et al. 2022,
    section 5, https://arxiv.org/abs/2204.02311
    """
    if not (math.isfinite(z) and z >= 0):
        raise ConfigError(f"z must be finite and at least 0, got {z}")
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be at least 0 and below 1, got {smoothing}")
    counted = targets >= 0
    h = jnp.where(counted[..., None], logits, 0)
    h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    vocabulary = jnp.arange(h.shape[-1], dtype=targets.dtype)
    chosen = targets[..., None] == jnp.expand_dims(vocabulary, (0, 1))
    # A masked sum, not a gather: its gradient is a mask too, where a gather's is a scatter.
    picked = jnp.where(chosen, h, 0).sum(-1)
    picked = jnp.where(targets < h.shape[-1], picked, jnp.nan)
    log_partition = jax.nn.logsumexp(h, axis=-1)
    loss = log_partition - (1 - smoothing) * picked
    if smoothing:
        loss = loss - smoothing * h.mean(-1)
    if z:
        loss = loss + z * log_partition**2
    return jnp.where(counted, loss, 0).sum(), counted.sum()


def mean_loss(loss_sum: Float[Array, ""], count: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the mean loss per counted token, and 0 where none was counted.

    Source: none; sums and counts of micro-batches and devices add first, so that every token
    weighs the same.
    """
    return loss_sum / jnp.maximum(count, 1).astype(loss_sum.dtype)


def bits(nats: Float[Array, "..."] | float) -> Float[Array, "..."] | float:
    """Converts nats to bits: b = nats / ln 2.

    Source: Shannon 1948, section 1 (units), https://doi.org/10.1002/j.1538-7305.1948.tb01338.x
    """
    return nats / math.log(2)
