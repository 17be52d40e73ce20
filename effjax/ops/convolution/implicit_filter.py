"""Hyena's filters: a network of the distance gives every tap, under a window that fades.

    h_d(s) = (exp(-rate_d t) + shift) (W_out sin(w (W_i ... sin(w (W_in z(s) + b_in)) + b_i)))_d
    t = s / (length - 1)      z(s) = (t, cos(f_k a), -sin(f_k a)),  a = 2 pi s / length

with bands f_k evenly spaced from 1e-4 to their number minus one and a learned frequency w for each
hidden unit, the same at every depth. The number of parameters does not depend on the length.

Source: Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models", section
3.3 and appendix D.3, https://arxiv.org/abs/2302.10866, as in the authors' code,
https://github.com/HazyResearch/safari/blob/main/src/models/sequence/hyena.py. There the features z
may be trained as well; here they are constants.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.ops.accounting import Flops


class FilterNetwork(NamedTuple):
    """The weights: w_in [E F], b_in [F], inner [I F F], b_inner [I F], frequency [F], w_out [F D].

    `rate` [D] is each channel's decay over the whole length, 0 or more.
    """

    w_in: Float[Array, "E F"]
    b_in: Float[Array, " F"]
    inner: Float[Array, "I F F"]
    b_inner: Float[Array, "I F"]
    frequency: Float[Array, " F"]
    w_out: Float[Array, "F D"]
    rate: Float[Array, " D"]


def implicit_filter(
    network: FilterNetwork, taps: int, *, length: int, shift: float = 0.0
) -> Float[Array, "D S"]:
    """Computes the first `taps` taps of the filters of a length, in float32 or float64.

    The filters end at `length`: what a longer kernel would weigh there is 0 in the convolution.

    Args:
        length: what t in [0, 1] is measured by, in positions.
        shift: the height above 0 that the window fades to.

    Raises:
        ConfigError: more taps than the length has.

    Source: Poli et al. 2023, section 3.3, https://arxiv.org/abs/2302.10866
    """
    if taps > length:
        raise ConfigError(f"implicit_filter: taps must be at most length={length}, got {taps}")
    dtype = jnp.promote_types(network.w_in.dtype, jnp.float32)
    w_in, b_in, inner, b_inner, frequency, w_out, rate = (x.astype(dtype) for x in network)
    bands = (w_in.shape[0] - 1) // 2
    s = jnp.arange(taps, dtype=jnp.int32)
    x = filter_features(s, length, bands).astype(dtype)
    x = jnp.sin(frequency[None] * (x @ w_in + b_in[None]))
    for w, b in zip(inner, b_inner, strict=True):
        x = jnp.sin(frequency[None] * (x @ w + b[None]))
    t = s.astype(dtype) / max(length - 1, 1)
    window = jnp.exp(-rate[:, None] * t[None]) + shift
    return (x @ w_out).T * window


def filter_features(s: Int[Array, " S"], length: int, bands: int) -> Float[Array, "S E"]:
    """Gives z(s): t, and the cosines and negative sines of `bands` frequencies, in float32.

    Source: Poli et al. 2023, appendix D.3, https://arxiv.org/abs/2302.10866; the authors' code.
    """
    t = s.astype(jnp.float32) / max(length - 1, 1)
    bands_ = jnp.asarray(np.linspace(1e-4, bands - 1, bands), jnp.float32)
    angle = (2 * np.pi / length) * s.astype(jnp.float32)[:, None] * bands_[None]
    return jnp.concatenate([t[:, None], jnp.cos(angle), -jnp.sin(angle)], axis=1)


def decay_rates(
    channels: int, *, fast: float = 0.3, slow: float = 1.5, target: float = 1e-2
) -> Float[Array, " D"]:
    """Gives rates evenly spaced so that the window falls to `target` after slow ... fast lengths.

    rate_d = |log target| / share_d: the first channel reaches the target after `slow` times the
    length, the last after `fast` times.

    Source: the authors' code, `ExponentialModulation`.
    """
    drop = abs(float(np.log(target)))
    return jnp.linspace(drop / slow, drop / fast, channels)


def implicit_filter_flops(taps: int, bands: int, hidden: int, inner: int, channels: int) -> Flops:
    """FLOPs of `implicit_filter`, whatever the batch: every product has two cotangents but the
    first, whose inputs are constants.

    Source: our own count.
    """
    first = 2 * taps * (2 * bands + 1) * hidden
    rest = 2 * taps * (inner * hidden**2 + hidden * channels)
    return Flops(first + rest, first + 2 * rest)
