"""Fourier mixing: a document's tokens and features mixed by a Fourier transform, without weights.

    y = Re(F_n x F_D)      y_te = sum over s, d of cos(2 pi (t s / n + e d / D)) x_sd

of a document of n live tokens and D features, t and s counted from its first one. Every token sees
every other, later ones too. `fourier_mixing` is the form to use, `naive_fourier_mixing` the product
with the matrices that it is tested against.

Source: Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", section 3.2,
https://arxiv.org/abs/2105.03824. Departures: a document is transformed by itself, at its own
length; the paper mixes whole rows of 512, padding among the tokens.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from effjax.ops.accounting import Flops
from effjax.ops.recurrence.bookkeeping import Rows, empty_place, timeline


def naive_fourier_mixing(
    x: Float[Array, "B T D"], *, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Multiplies by the matrices of cosines and sines, written out: T^2 of them a row.

    Source: Lee-Thorp et al. 2021, equation 1 and section 3.2, https://arxiv.org/abs/2105.03824
    """
    place, size, run, *_ = _places(positions, segments)
    live = positions >= 0
    same = live[:, :, None] & live[:, None, :] & (run[:, :, None] == run[:, None, :])
    turns = (place[:, :, None] * place[:, None, :]) % size[:, :, None] / size[:, :, None]
    x = jnp.where(live[..., None], x, 0)
    e = jnp.arange(x.shape[2])
    angles = [2 * jnp.pi * a for a in (turns, jnp.outer(e, e) % x.shape[2] / x.shape[2])]
    rows, features = [(jnp.cos(a).astype(x.dtype), jnp.sin(a).astype(x.dtype)) for a in angles]
    cosines, sines = (
        jnp.einsum("bts,bsd,de->bte", jnp.where(same, of_rows, 0), x, of_features)
        for of_rows, of_features in zip(rows, features, strict=True)
    )
    return cosines - sines


def fourier_mixing(
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    orthonormal: bool = False,
    aligned: bool = False,
) -> Float[Array, "B T D"]:
    """Mixes the tokens and features of each document by fast Fourier transforms.

    Aligned rows take one transform in two dimensions. Of others, all rows' first documents are
    transformed, then their second ones, and so on: each at its own length n, as a convolution with
    chirps (Bluestein's algorithm) of 2 T points, three transforms a turn. So FLOPs grow as
    D T log T times the documents of the row that has the most. Transforms are float32 (float64 for
    float64 inputs), y has x's dtype. The matrix is symmetric: the gradient is the same mixing.

    Args:
        positions: -1 is padding: its x is not read (it may be NaN) and its y is 0. Live tokens
            stand in their order: what positions they have makes no difference.
        segments: the document of each token; one stretch of a row per document.
        orthonormal: divides by sqrt(n D), so that y is about as large as x. The paper does not: its
            norm follows.
        aligned: promises that each row is one document without padding.

    Raises:
        ValueError: rows that are not aligned of more than 65536 tokens, whose chirps would overrun.

    Source: Lee-Thorp et al. 2021, section 3.2, https://arxiv.org/abs/2105.03824; Bluestein 1970,
    https://doi.org/10.1109/TAU.1970.1162132
    """
    _, T, D = x.shape
    if not aligned and T > 65536:
        raise ValueError(f"fourier_mixing: rows of at most 65536 tokens unless aligned, got {T}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if aligned:
        y, scale = _mixed_rows(wide), (T * D) ** -0.5
        return (y * scale if orthonormal else y).astype(x.dtype)
    live = (positions >= 0)[..., None]
    places = _places(positions, segments)
    y = _mixed_documents(jnp.where(live, wide, 0), places)
    if orthonormal:
        y = y * jax.lax.rsqrt(places.size.astype(y.dtype) * D)[..., None]
    return jnp.where(live, y, 0).astype(x.dtype)


def fourier_mixing_flops(B: int, T: int, D: int, *, aligned: bool = False) -> Flops:
    """FLOPs of `fourier_mixing` as written; rows that are not aligned are counted as one document.

    Each further document of the fullest row costs as much again, but for the transform of features.

    Source: our own count; 5 n log2 n a transform as in https://www.fftw.org/speed/method.html
    """
    if aligned:
        work = round(5 * B * T * D * math.log2(T * D) / 2)
    else:
        work = round(5 * B * T * D * math.log2(D) / 2) + _turn_flops(B, T, D)
    return Flops(work, work)


class _Places(NamedTuple):
    """Where the tokens of each row stand in its documents, which are counted from 1.

    place, size and run of a token: its number in its document, how many there are, and which it is
    (0 at padding). order: the live tokens' indices, in order. lengths, starts [B T+1]: of each
    document, its tokens and those before it.
    """

    place: Int[Array, "B T"]
    size: Int[Array, "B T"]
    run: Int[Array, "B T"]
    order: Int[Array, "B T"]
    lengths: Int[Array, "B documents"]
    starts: Int[Array, "B documents"]


def _places(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> _Places:
    B, T = positions.shape
    time = timeline(Rows(positions, segments, empty_place(B)))
    run = jnp.where(time.live, time.run, 0)
    row = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
    lengths = jnp.zeros((B, T + 1), jnp.int32).at[row, run].add(time.live.astype(jnp.int32))
    starts = jnp.cumsum(lengths, axis=1) - lengths
    before = jnp.cumsum(time.live, axis=1, dtype=jnp.int32) - 1
    place = jnp.maximum(before - jnp.take_along_axis(starts, run, axis=1), 0)
    size = jnp.maximum(jnp.take_along_axis(lengths, run, axis=1), 1)
    order = jnp.argsort(~time.live, axis=1, stable=True)
    return _Places(jnp.where(time.live, place, 0), size, run, order, lengths, starts)


@jax.custom_vjp
def _mixed_rows(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The mixing of whole rows: half of a real transform, and its mirror image."""
    half = jnp.fft.rfftn(x, axes=(1, 2)).real
    return _whole(half, jnp.roll(half[:, ::-1], 1, axis=1), x.shape[2])


_mixed_rows.defvjp(lambda x: (_mixed_rows(x), None), lambda _, g: (_mixed_rows(g),))


@jax.custom_vjp
def _mixed_documents(x: Float[Array, "B T D"], places: _Places) -> Float[Array, "B T D"]:
    """The mixing of each document by itself; x is 0 at padding."""
    return _named_turns(_turn_flops(*x.shape))(jnp.fft.rfft(x, axis=2), x, places)


_mixed_documents.defvjp(
    lambda x, places: (_mixed_documents(x, places), places),
    lambda places, g: (_mixed_documents(g, places), None),
)


@cache
def _named_turns(flops: int) -> Callable[..., Array]:
    """`_turns`, jitted under a name that says what one turn costs: how many is not known before."""

    def turns(z: Array, x: Array, places: _Places) -> Array:
        last = jnp.max(places.run)
        return jax.lax.fori_loop(1, last + 1, partial(_turn, z, places), jnp.zeros_like(x))

    turns.__name__ = f"fourier_documents_flops_{flops}"
    return jax.jit(turns)


def _turn(z: Array, places: _Places, document: Array, y: Array) -> Array:
    """y with the mixing of each row's document of this number."""
    T, D = y.shape[1:]
    number = jnp.broadcast_to(document, (y.shape[0], 1))
    n, start = (jnp.take_along_axis(v, number, axis=1) for v in (places.lengths, places.starts))
    slot = jnp.arange(T, dtype=n.dtype)[None]
    inside = slot < n
    token = jnp.take_along_axis(places.order, jnp.minimum(start + slot, T - 1), axis=1)
    own = jnp.where(inside[..., None], jnp.take_along_axis(z, token[..., None], axis=1), 0)
    half = _transformed(own, jnp.maximum(n, 1)).real
    mirror = jnp.where((slot > 0) & inside, n - slot, 0)
    made = _whole(half, jnp.take_along_axis(half, mirror[..., None], axis=1), D)
    back = jnp.take_along_axis(made, places.place[..., None], axis=1)
    return jnp.where((places.run == document)[..., None], back, y)


def _transformed(z: Complex[Array, "B T F"], n: Int[Array, "B 1"]) -> Complex[Array, "B T F"]:
    """The transform of n points along the first n rows, as a convolution with chirps.

        sum_s e^(-2 pi i t s / n) z_s = w_t sum_s (w_s z_s) conj(w_(t-s)),  w_t = e^(-pi i t^2 / n)

    Squares are taken modulo 2 n as integers: an angle in floats would lose all digits.
    """
    T, M = z.shape[1], _points(z.shape[1])
    t = jnp.arange(T, dtype=jnp.uint32)[None]
    angle = (t * t % (2 * n.astype(jnp.uint32))).astype(z.real.dtype) / n.astype(z.real.dtype)
    w = jax.lax.complex(jnp.cos(jnp.pi * angle), -jnp.sin(jnp.pi * angle))
    gap = jnp.zeros((z.shape[0], M - 2 * T + 1), w.dtype)
    chirp = jnp.concatenate([w, gap, w[:, :0:-1]], axis=1).conj()
    spectrum = jnp.fft.fft(z * w[..., None], M, axis=1) * jnp.fft.fft(chirp, axis=1)[..., None]
    return jnp.fft.ifft(spectrum, axis=1)[:, :T] * w[..., None]


def _whole(half: Float[Array, "B T F"], mirror: Float[Array, "B T F"], D: int) -> Array:
    """All D features from the first D // 2 + 1: Re y_(-t)(-e) = Re y_te."""
    return jnp.concatenate([half, mirror[..., 1 : (D + 1) // 2][..., ::-1]], axis=-1)


def _points(T: int) -> int:
    """A power of two that holds the convolution of T points with T chirps on either side."""
    return 1 << (2 * T - 2).bit_length()


def _turn_flops(B: int, T: int, D: int) -> int:
    """Two complex transforms of every feature, and one of the chirps."""
    points = _points(T)
    return round(5 * B * (2 * (D // 2 + 1) + 1) * points * math.log2(points))
