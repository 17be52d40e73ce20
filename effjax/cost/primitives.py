"""What one JAX primitive costs: a closed form for each one that does matrix-like work.

A form takes an equation of a jaxpr and returns FLOPs, with a multiply-add as two. A complex
multiply-add is four real ones, so complex operands count four times (twice when one is real).
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

Equation = Any  # jax.extend.core.JaxprEqn; spelled Any because its parameters are untyped

# Floating-point work with one result per output element.
_ARITHMETIC_NAMES = """abs acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e
cbrt ceil clamp cos cosh digamma div erf erf_inv erfc exp exp2 expm1 floor igamma igammac
integer_pow lgamma log log1p logistic max min mul neg nextafter one_minus_square polygamma pow
regularized_incomplete_beta rem round rsqrt sign sin sinh sqrt square sub tan tanh zeta"""
ARITHMETIC = frozenset(_ARITHMETIC_NAMES.split())

# Floating-point work with one step per input element.
_REDUCTION_NAMES = """argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_max
reduce_min reduce_prod reduce_sum"""
REDUCTIONS = frozenset(_REDUCTION_NAMES.split())

# Factorisations that iterate until they converge, so that their work depends on the values, and
# rarer ones without a closed form here.
_UNCOUNTED_NAMES = "eig eigh hessenberg schur svd symmetric_product tridiagonal tridiagonal_solve"
UNCOUNTED = frozenset(_UNCOUNTED_NAMES.split())

# Calls into code that JAX cannot see.
OPAQUE = frozenset(("ffi_call", "io_callback", "pure_callback"))


def dot_general(equation: Equation) -> int:
    """Counts a batched matrix product: two FLOPs for each output element and contracted element.

    2 |out| prod_c |lhs_c|, exact.
    """
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * _complex(equation) * equation.outvars[0].aval.size * depth


def ragged_dot(equation: Equation) -> int:
    """Counts a grouped matrix product: each row of the left operand meets one group.

    2 |lhs| prod |rhs axes that are not contracted, batched or the group axis|. This is the work
    that the algorithm needs; a backend without a grouped product does it once per group.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    shared = {*contracted, *batched, *numbers.rhs_group_dimensions}
    left, right = (v.aval.shape for v in equation.invars[:2])
    free = math.prod(size for axis, size in enumerate(right) if axis not in shared)
    return 2 * _complex(equation) * math.prod(left) * free


def convolution(equation: Equation) -> int:
    """Counts the multiply-adds of a convolution that touch an element of the input.

    2 B_out C_out (C_in / groups) prod_s pairs_s, where pairs_s counts, along one spatial axis, the
    (output, tap) pairs that fall on an element, not on padding or on a hole made by dilation. So
    a convolution, its gradient by the input and its gradient by the kernel cost the same.
    """
    p = equation.params
    numbers = p["dimension_numbers"]
    left, right = (v.aval.shape for v in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    work = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
    for axis in range(len(p["window_strides"])):
        work *= _pairs(
            size=left[numbers.lhs_spec[axis + 2]],
            taps=right[numbers.rhs_spec[axis + 2]],
            outputs=out[numbers.out_spec[axis + 2]],
            stride=p["window_strides"][axis],
            padding=p["padding"][axis][0],
            holes=p["lhs_dilation"][axis],
            dilation=p["rhs_dilation"][axis],
        )
    return 2 * _complex(equation) * work


def fft(equation: Equation) -> int:
    """Counts fast Fourier transforms by convention: 5 N log2 N, half where one side is real.

    N is the product of the transformed lengths; the result is rounded to an integer.

    Source: Frigo and Johnson, benchFFT's methodology, https://www.fftw.org/speed/method.html
    """
    lengths = equation.params["fft_lengths"]
    points = math.prod(lengths)
    shape = equation.invars[0].aval.shape
    transforms = math.prod(shape[: len(shape) - len(lengths)])
    real = equation.params["fft_type"].name in ("RFFT", "IRFFT")
    return round(5 * transforms * points * math.log2(max(points, 1)) / (2 if real else 1))


def cholesky(equation: Equation) -> int:
    """Counts n^3 / 3 for each matrix. Source: LAPACK Working Note 41, appendix C."""
    *batch, n, _ = equation.invars[0].aval.shape
    return _complex(equation) * math.prod(batch) * n**3 // 3


def triangular_solve(equation: Equation) -> int:
    """Counts n^2 for each right-hand side. Source: LAPACK Working Note 41, appendix C."""
    n = equation.invars[0].aval.shape[-1]
    return _complex(equation) * equation.invars[1].aval.size * n


def lu(equation: Equation) -> int:
    """Counts m n k - (m + n) k^2 / 2 + k^3 / 3 multiply-adds, k = min(m, n).

    Source: LAPACK Working Note 41, appendix C.
    """
    *batch, m, n = equation.invars[0].aval.shape
    k = min(m, n)
    work = 2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3
    return round(_complex(equation) * math.prod(batch) * work)


def reflectors(equation: Equation) -> int:
    """Counts the Householder reduction of an m x n matrix to triangular form."""
    *batch, m, n = equation.invars[0].aval.shape
    return round(_complex(equation) * math.prod(batch) * _reduction(m, n))


def householder_product(equation: Equation) -> int:
    """Counts the first columns of Q that its k reflectors give."""
    *batch, m, n = equation.invars[0].aval.shape
    k = equation.invars[1].aval.shape[-1]
    return round(_complex(equation) * math.prod(batch) * _columns(m, n, k))


def qr(equation: Equation) -> int:
    """Counts a QR decomposition: the reduction to R, then the columns of Q."""
    *batch, m, n = equation.invars[0].aval.shape
    wide = m if equation.params["full_matrices"] else min(m, n)
    work = _reduction(m, n) + _columns(m, wide, min(m, n))
    return round(_complex(equation) * math.prod(batch) * work)


def _reduction(m: int, n: int) -> float:
    """2 n^2 (m - n/3) for m >= n. Source: Golub and Van Loan, Matrix Computations, section 5.2."""
    return 2 * n**2 * (m - n / 3) if m >= n else 2 * m**2 * (n - m / 3)


def _columns(m: int, n: int, k: int) -> float:
    """4 m n k - 2 (m + n) k^2 + 4 k^3 / 3. Source: LAPACK Working Note 41, appendix C."""
    return 4 * m * n * k - 2 * (m + n) * k**2 + 4 * k**3 / 3


MATRIX: dict[str, Callable[[Equation], int]] = {
    "dot_general": dot_general,
    "ragged_dot": ragged_dot,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
    "fft": fft,
    "cholesky": cholesky,
    "triangular_solve": triangular_solve,
    "lu": lu,
    "qr": qr,
    "geqrf": reflectors,
    "geqp3": reflectors,
    "householder_product": householder_product,
}


def elementwise(equation: Equation) -> int:
    """Counts floating-point work that is no matrix product; integers and comparisons are free.

    One for each output element of an arithmetic primitive, for each input element of a reduction,
    for each update that a scatter combines and for each element under a reducing window.
    """
    name = equation.primitive.name
    if not equation.outvars or not _inexact(equation.outvars[0].aval):
        return _index_reduction(equation)
    size = equation.outvars[0].aval.size
    if name in ARITHMETIC:
        return size
    if name in REDUCTIONS:
        return equation.invars[0].aval.size
    if name in ("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"):
        return equation.invars[2].aval.size
    if name.startswith("reduce_window"):
        return size * math.prod(equation.params["window_dimensions"])
    return 0


def _index_reduction(equation: Equation) -> int:
    """`argmax` and `argmin` work on floats and give integers."""
    if equation.primitive.name not in ("argmax", "argmin"):
        return 0
    operand = equation.invars[0].aval
    return operand.size if _inexact(operand) else 0


def _pairs(
    size: int, taps: int, outputs: int, stride: int, padding: int, holes: int, dilation: int
) -> int:
    """Counts the (output, tap) that fall on an input i in [0, size).

    output * stride + tap * dilation - padding = i * holes.
    """
    offsets = np.arange(taps, dtype=np.int64) * dilation - padding
    if holes == 1:
        return _multiples(-offsets, size - 1 - offsets, stride, outputs)
    if stride == 1:
        return _multiples(offsets, outputs - 1 + offsets, holes, size)
    total = 0
    for output in range(outputs):
        places = output * stride + offsets
        inside = (places >= 0) & (places <= (size - 1) * holes) & (places % holes == 0)
        total += int(inside.sum())
    return total


def _multiples(low: np.ndarray, high: np.ndarray, step: int, size: int) -> int:
    """Counts the x in [0, size) with low <= step x <= high, summed over pairs of bounds."""
    first = np.maximum(-(-low // step), 0)
    last = np.minimum(high // step, size - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def _complex(equation: Equation) -> int:
    """Real multiply-adds in one multiply-add of this equation's operands."""
    operands = [v.aval.dtype for v in equation.invars[:2] if hasattr(v.aval, "dtype")]
    return math.prod(2 if jnp.issubdtype(d, np.complexfloating) else 1 for d in operands)


def _inexact(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, np.inexact)
