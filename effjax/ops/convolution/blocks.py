"""Convolutions chunk by chunk: every chunk of inputs meets every chunk of lags, in some domain.

Rows are cut into chunks of C tokens in which index is position. Output chunk i gathers the input
chunks i - m of its own document, each through the lags m C - C + 1 ... m C + C - 1. How a chunk
meets its lags is a `Domain`: as numbers, by a Toeplitz matrix (exact to the last bit where nothing
is to be seen), or as spectra, by a product. A long row that is one document may be one chunk.

Source: block Toeplitz products as in Dao and Gu 2024, section 6, https://arxiv.org/abs/2405.21060;
of spectra, the overlap-save method as in Oppenheim and Schafer, "Discrete-Time Signal Processing",
section 8.7.3, with a filter cut up as well.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.convolution.fft import signal, spectrum
from effjax.ops.convolution.monarch_fft import monarch_signal, monarch_spectrum


class Domain(NamedTuple):
    """Where a chunk of inputs and a chunk of lags meet, and how to get there and back.

    `enter(x)` takes inputs [D B c C], `enter_lags(g)` lags [m D 2C] to the domain, `meet(X, G)` is
    linear in both: inputs [D B c ...] through one chunk of lags [D ...]. `leave(Y, C)` gives back
    [D B c C].
    """

    enter: Callable[[Array], Array]
    enter_lags: Callable[[Array], Array]
    meet: Callable[[Array, Array], Array]
    leave: Callable[[Array, int], Array]


def lag_chunks(kernel: Float[Array, "D S"], chunk: int, count: int) -> Float[Array, "m D L"]:
    """Cuts a kernel into `count` chunks of lags, each with those that its pairs of tokens need.

    Chunk m holds lags m C ... m C + C - 1, then m C - C ... m C - 1, as a circle of L = 2C would;
    lags below 0 and from S on are 0.

    Source: our own layout.
    """
    D, size = kernel.shape[0], chunk * count
    kernel = jnp.pad(kernel[:, :size], ((0, 0), (0, max(0, size - kernel.shape[1]))))
    own = kernel.reshape(D, count, chunk)
    before = jnp.pad(own, ((0, 0), (1, 0), (0, 0)))[:, :count]
    return jnp.concatenate([own, before], axis=-1).swapaxes(0, 1)


def toeplitz(lags: Float[Array, "D L"]) -> Float[Array, "D C C"]:
    """Lays a chunk of lags out as matrices [s, t] = lag t - s, from a circle of L = 2C lags.

    Rows of a repeated line that are one shorter than its period are shifted by one each: copies
    forward and sums backward, no gather and no scatter.

    Source: our own layout.
    """
    D, L = lags.shape
    C = L // 2
    line = jnp.broadcast_to(lags[:, None], (D, C, L)).reshape(D, C * L)
    return line[:, : C * (L - 1)].reshape(D, C, L - 1)[:, :, :C]


def convolve_chunks(
    x: Float[Array, "D B c C"],
    lags: Float[Array, "m D L"],
    documents: Int[Array, "B c"],
    domain: Domain,
) -> Float[Array, "D B c C"]:
    """Computes y_i = sum_m x_{i-m} met with lags m, over the chunks of i's own document.

    documents: the number, 0 or more, of the document of each chunk. The far half of the lags only
    meets the far half of the chunks, and so on (`spans`); nothing but x and the lags is kept for
    the backward pass.

    Source: see the module.
    """
    X, G = domain.enter(x), domain.enter_lags(lags)
    parts = spans(x.shape[2], lags.shape[0])
    Y = _span(X, G, documents, domain, *parts[0])
    for first, last in parts[1:]:
        Y = Y.at[:, :, first:].add(_span(X, G, documents, domain, first, last))
    return domain.leave(Y, x.shape[-1])


SPAN = 4
"""Lags of a loop, at least: a loop more costs compiling, a loop less products of zeros."""


def spans(chunks: int, lags: int) -> list[tuple[int, int]]:
    """Parts of the range of lags, (first, last), that are met with chunks from `first` on.

    Source: our own count: with four parts 5/8 of all pairs are formed, where 1/2 is needed.
    """
    count = max(1, min(4, lags // SPAN))
    ends = [round(lags * k / count) for k in range(count + 1)]
    return [(a, b) for a, b in pairwise(ends) if a < min(b, chunks)]


def _span(X: Array, G: Array, documents: Array, domain: Domain, first: int, last: int) -> Array:
    """What chunks from `first` on gather through lags `first` ... `last` - 1."""
    c, width = X.shape[2], last - first
    X = X[:, :, : c - first]
    padding = ((0, 0), (0, 0), (width - 1, 0), *((0, 0),) * (X.ndim - 3))
    X = jnp.pad(X, padding)
    earlier = jnp.pad(documents[:, : c - first], ((0, 0), (width - 1, 0)), constant_values=-1)

    def one(X: Array, G: Array, m: Array) -> Array:
        take = partial(
            jax.lax.dynamic_slice_in_dim, start_index=width - 1 - m, slice_size=c - first
        )
        same = take(earlier, axis=1) == documents[:, first:]
        same = same.reshape((1, *same.shape) + (1,) * (X.ndim - 3))
        return domain.meet(jnp.where(same, take(X, axis=2), 0), G)

    if width == 1:
        return one(X, G[first], jnp.int32(0))

    kept = jax.checkpoint(one, prevent_cse=False)

    def add(Y: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        return Y + kept(X, *step), None

    shape = jax.eval_shape(one, X, G[first], jnp.int32(0))
    steps = (G[first:last], jnp.arange(width, dtype=jnp.int32))
    return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), steps)[0]


def _by_matrix(x: Array, lags: Array) -> Array:
    return jnp.einsum("dbis,dst->dbit", x, toeplitz(lags))


def _by_frequency(X: Array, G: Array) -> Array:
    return X * G[:, None, None]


def _same(x: Array) -> Array:
    return x


def _transformed(forward: Callable[..., Any], back: Callable[..., Any]) -> Domain:
    """The domain of a Fourier transform of twice a chunk's length."""
    return Domain(
        lambda x: forward(x, 2 * x.shape[-1]),
        lambda g: forward(g, g.shape[-1]),
        _by_frequency,
        lambda Y, chunk: back(Y, 2 * chunk, chunk),
    )


DOMAINS: dict[str, Domain] = {
    "direct": Domain(_same, _same, _by_matrix, lambda Y, chunk: Y),
    "fft": _transformed(spectrum, signal),
    "monarch": _transformed(monarch_spectrum, monarch_signal),
}
