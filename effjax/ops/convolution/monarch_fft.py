"""The Fourier transform as a Monarch matrix of order two: two small dense ones and a twiddle.

With n = n1 n2 points, t = a n2 + b and f = k1 + n1 k2,

    X_{k1,k2} = sum_b [ exp(-2 pi i b k1 / n) sum_a x_{a,b} exp(-2 pi i a k1 / n1) ]
                      exp(-2 pi i b k2 / n2)

so that n^1.5 multiply-adds in matrix products, which matrix units do, stand for n log n in an FFT,
which they don't. Spectra stay in the order (k1, k2): whoever multiplies two and goes back needs no
permutation. Of a real row only k1 <= n1 / 2 is kept, the rest are conjugates; and rows whose second
half is zeros have only the first half of the a. Complex numbers are pairs of real ones throughout.

Source: Fu et al. 2023, "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores",
sections 2 and 3, https://arxiv.org/abs/2311.05908. They treat a real row as a complex one of half
the length; we keep half of the spectrum instead, and fuse nothing.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


class Factors(NamedTuple):
    """n1 = 2 `rows` and n2 = `columns` of a transform of twice `rows * columns` points.

    `half` counts the k1 that are kept, rows + 1.
    """

    rows: int
    columns: int

    @property
    def half(self) -> int:
        """Rows of the half of a spectrum that is kept."""
        return self.rows + 1


def monarch_factors(points: int) -> Factors:
    """Splits an even number of points into two factors, as nearly equal as its divisors allow.

    Source: Fu et al. 2023, section 3.1, https://arxiv.org/abs/2311.05908
    """
    half = points // 2
    rows = min(
        (d for d in range(1, half + 1) if half % d == 0),
        key=lambda d: abs(np.log(2 * d * d / half)),
    )
    return Factors(rows, half // rows)


def monarch_spectrum(x: Float[Array, "... L"], points: int) -> Complex[Array, "... F"]:
    """Computes the transform of a real row of `points` or half as many numbers, the rest zeros.

    The result is flat, [k1 k2] in that order, k1 <= n1 / 2.

    Source: Fu et al. 2023, equation 2, https://arxiv.org/abs/2311.05908
    """
    rows, columns = monarch_factors(points)
    first, twiddle, second, _ = (jnp.asarray(m, x.dtype) for m in _tables(rows, columns))
    x = x.reshape(*x.shape[:-1], -1, columns)
    pair = jnp.einsum("...ab,aqk->...qkb", x, first[: x.shape[-2]])
    pair = jnp.concatenate(_turned(pair, twiddle), axis=-1)
    real, imag = jnp.split(jnp.einsum("...b,bc->...c", pair, second), 2, axis=-1)
    X = jax.lax.complex(real, imag)
    return X.reshape(*X.shape[:-2], -1)


def monarch_signal(X: Complex[Array, "... F"], points: int, length: int) -> Float[Array, "... L"]:
    """Computes the first `length`, at most half, of the numbers whose `monarch_spectrum` is X.

    Source: Fu et al. 2023, equation 2, https://arxiv.org/abs/2311.05908
    """
    rows, columns = monarch_factors(points)
    _, twiddle, second, last = (jnp.asarray(m, X.real.dtype) for m in _tables(rows, columns))
    X = X.reshape(*X.shape[:-1], -1, columns)
    pair = jnp.concatenate([X.real, X.imag], axis=-1)
    pair = jnp.stack(jnp.split(jnp.einsum("...c,bc->...b", pair, second), 2, axis=-1), axis=-3)
    back = jnp.stack(_turned(pair, twiddle * jnp.array([1, -1], twiddle.dtype)[:, None, None]), -3)
    x = jnp.einsum("...qkb,qka->...ab", back, last)
    return x.reshape(*x.shape[:-2], -1)[..., :length]


def _turned(pair: Float[Array, "... 2 k b"], twiddle: Float[Array, "2 k b"]) -> list[Array]:
    """The real and the imaginary part of a product of complex numbers."""
    a, b = pair[..., 0, :, :], pair[..., 1, :, :]
    c, d = (m.reshape((1,) * (a.ndim - 2) + m.shape) for m in twiddle)
    return [a * c - b * d, a * d + b * c]


@cache
def _tables(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """`first` [a 2 k1], `twiddle` [2 k1 b], `second` [2b 2k2] and `last` [2 k1 a], in float64.

    `second` works on pairs side by side; its transpose is its conjugate's, the way back. `last`
    weighs what stands for two conjugates twice, and divides by the number of points.
    """
    n1, half = 2 * rows, rows + 1
    points = n1 * columns
    k1, b = np.arange(half), np.arange(columns)
    F1 = np.exp(-2j * np.pi * np.outer(np.arange(n1), k1) / n1)
    T = np.exp(-2j * np.pi * np.outer(k1, b) / points)
    F2 = np.exp(-2j * np.pi * np.outer(b, b) / columns)
    second = np.block([[F2.real, F2.imag], [-F2.imag, F2.real]])
    weight = np.where((k1 == 0) | (k1 == rows), 1.0, 2.0) / points
    back = np.conj(F1[:rows]).T * weight[:, None]
    pair = lambda z: np.stack([z.real, z.imag])  # noqa: E731
    return pair(F1).transpose(1, 0, 2), pair(T), second, np.stack([back.real, -back.imag])
