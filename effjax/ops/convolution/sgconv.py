"""SGConv's kernel: pieces that double in length and fade, each from the same number of weights.

    K = [k_0, k_1, ..., k_{N-1}] / Z      k_i = decay^i Upsample_{2^max(i-1, 0)}(w_i)

with w_i [D W] for every scale i: 2^(N-1) W taps from N W weights a channel, the logarithm of the
length; farther scales are smoother and smaller.

Source: Li et al. 2022, "What Makes Convolutional Models Great on Long Sequence Modeling?", section
3, equation 1, https://arxiv.org/abs/2210.09298, and the authors' code,
https://github.com/ctlllll/SGConv/blob/main/gconv_standalone.py
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sgconv_scales(length: int, taps: int) -> int:
    """Counts the scales of `taps` weights whose pieces together reach at least `length`.

    N = 1 + ceil(log2(length / taps)), at least 1.

    Source: the authors' code.
    """
    return 1 + max(0, (-(-length // taps) - 1).bit_length())


def sgconv_kernel(
    weights: Float[Array, "D G W"], norm: Float[Array, " D"] | None = None, *, decay: float = 0.5
) -> Float[Array, "D S"]:
    """Builds the kernel of G scales of W weights a channel: S = 2^(G-1) W taps.

    Args:
        norm: Z, what each channel is divided by; None is 1. The paper's is the kernel's own norm
            as it starts (`sgconv_norm`), held constant ever after.
        decay: the weight of a scale relative to the one before.

    Source: Li et al. 2022, equation 1, https://arxiv.org/abs/2210.09298; upsampling is linear
    between the centres of taps and constant beyond the outer ones, as in the authors' code.
    """
    scales = [
        decay**i * upsampled(weights[:, i], 1 << max(i - 1, 0)) for i in range(weights.shape[1])
    ]
    kernel = jnp.concatenate(scales, axis=1)
    return kernel if norm is None else kernel / norm[:, None]


def sgconv_norm(kernel: Float[Array, "D S"]) -> Float[Array, " D"]:
    """Gives Z: each channel's Euclidean norm, so that a convolution keeps the scale of white noise.

    Source: Li et al. 2022, section 3, https://arxiv.org/abs/2210.09298; the authors' code.
    """
    return jnp.sqrt(jnp.sum(kernel**2, axis=1))


def upsampled(w: Float[Array, "D W"], factor: int) -> Float[Array, "D S"]:
    """Stretches rows by a factor, linearly: output j lies at (j + 1/2) / factor - 1/2.

    Source: as `torch.nn.functional.interpolate(mode="linear", align_corners=False)`.
    """
    if factor == 1:
        return w
    at = (np.arange(factor) + 0.5) / factor - 0.5  # of the outputs around one tap
    share = jnp.asarray(np.abs(at), w.dtype)[None, None]
    padded = jnp.concatenate([w[:, :1], w, w[:, -1:]], axis=1)
    before, after = padded[:, :-2, None], padded[:, 2:, None]
    side = jnp.where(jnp.asarray(at < 0)[None, None], before, after)
    return (w[:, :, None] * (1 - share) + side * share).reshape(w.shape[0], -1)
