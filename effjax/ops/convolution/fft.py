"""Fourier transforms of real rows whose second half is zeros, with derivatives that stay real.

A product of two spectra is a circular convolution. Rows of C numbers, filled up with as many
zeros, come to no harm from the circle: what would wrap around falls on outputs that nobody reads.

Source: Cooley and Tukey 1965, https://doi.org/10.1090/S0025-5718-1965-0178586-1
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def spectrum(x: Float[Array, "... L"], points: int) -> Complex[Array, "... F"]:
    """Computes X_f = sum_t x_t exp(-2 pi i f t / points) for f = 0 ... points / 2; L <= points.

    JAX differentiates a real transform by way of a complex one of all points, twice the work; here
    the cotangent is dx_t = Re sum_f g_f exp(-2 pi i f t / points), one inverse real transform.

    Source: Sorensen et al. 1987, "Real-valued fast Fourier transform algorithms",
    https://doi.org/10.1109/TASSP.1987.1165220
    """
    return jnp.fft.rfft(x, points)


def _spectrum_forward(x: Array, points: int) -> tuple[Array, Array]:
    return spectrum(x, points), jnp.zeros((x.shape[-1], 0))  # its length alone is remembered


def _spectrum_backward(points: int, like: Array, g: Array) -> tuple[Array]:
    ends = np.zeros(g.shape[-1], bool)
    ends[0] = True
    ends[-1] |= points % 2 == 0
    share = jnp.asarray(np.where(ends, 1.0, 0.5) * points, g.real.dtype)
    whole = jnp.fft.irfft(jnp.conj(g) * share.reshape((1,) * (g.ndim - 1) + (-1,)), points)
    return (whole[..., : like.shape[0]],)


spectrum.defvjp(_spectrum_forward, _spectrum_backward)


def signal(X: Complex[Array, "... F"], points: int, length: int) -> Float[Array, "... L"]:
    """Computes the first `length` of the `points` numbers whose `spectrum` is X.

    Source: as `spectrum`.
    """
    return jnp.fft.irfft(X, points)[..., :length]


def smooth_length(length: int) -> int:
    """Gives the least 2^a or 3 * 2^a that is at least `length`: transforms of such sizes are fast.

    Source: Frigo and Johnson 2005, "The Design and Implementation of FFTW3", section V,
    https://doi.org/10.1109/JPROC.2004.840301
    """
    whole = 1 << max(0, (length - 1).bit_length())
    part = 3 * (whole // 4)
    return part if part >= length else whole
