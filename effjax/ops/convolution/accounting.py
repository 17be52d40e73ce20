"""FLOPs and bytes of long convolutions in closed form: of the program that runs, and of the method.

Only products and Fourier transforms count: two FLOPs per multiply-add, 5 n log2 n per transform of
n points and half as much for a real one, rounded as the counter of `effjax.cost` does. Products of
spectra are element-wise work. Everything is for a batch, without an incoming state.

Source: Frigo and Johnson, benchFFT's methodology, https://www.fftw.org/speed/method.html
"""

import math

from effjax.ops.accounting import Flops
from effjax.ops.convolution.blocks import spans
from effjax.ops.convolution.long import Blocks, Form, fastest, long_blocks
from effjax.ops.convolution.monarch_fft import monarch_factors


def long_convolution_flops(
    B: int,
    T: int,
    D: int,
    S: int,
    *,
    form: Form = "auto",
    chunk: int | None = None,
    aligned: bool = False,
) -> Flops:
    """FLOPs of `long_convolution` as written, without a state, for a kernel of S taps.

    Whole chunks, spare ones if not `aligned`, and all pairs that a loop over lags forms. The
    backward pass has two products for each one of the direct form, and one transform for each.
    Rows that do not fit their layout are run by token, without a product; a program is counted by
    its dearest branch. One token makes none.

    Source: our own count of `long.py` and `blocks.py`.
    """
    if T == 1:
        return Flops(0, 0)
    plan = long_blocks(T, S, form=form, chunk=chunk, aligned=aligned)
    if plan.form == "direct":
        work = 2 * B * D * _pairs(plan) * plan.chunk**2
        return Flops(work, 2 * work)
    if plan.form == "fft":
        work = _transforms(plan, D * plan.lags) + 2 * _transforms(plan, D * B * plan.chunks)
    else:
        work = _monarch(plan, B, D)
    return Flops(work, work)


def exact_long_convolution_flops(B: int, T: int, D: int, S: int, *, form: Form = "auto") -> Flops:
    """FLOPs of a long convolution itself, in the form that rows of T tokens are run in.

    Direct: the pairs of tokens less than S apart, a multiply-add each. By transforms: those of the
    inputs and outputs, chunks of them where T is longer; the kernel's is shared by all rows and
    left out, and a Monarch transform counts as any other.

    Source: Gu et al. 2022, section 3.4, https://arxiv.org/abs/2111.00396
    """
    if T == 1:
        return Flops(0, 0)
    if (fastest(T) if form == "auto" else form) == "direct":
        near = min(S, T)
        work = 2 * B * D * (near * (near + 1) // 2 + (T - near) * near)
        return Flops(work, 2 * work)
    chunk = long_blocks(T, S, form="fft").chunk
    work = round(10 * B * D * T * math.log2(2 * chunk))
    return Flops(work, work)


def long_step_flops(B: int, D: int, capacity: int) -> int:
    """FLOPs of one token against the slots of a state, empty ones among them.

    Source: our own count of `long.py`.
    """
    return 2 * B * D * capacity


def long_state_bytes(B: int, D: int, capacity: int) -> int:
    """Bytes of the state: inputs in float32, and in int32 their positions, a count and a place.

    Source: our own count of `long_state`.
    """
    return B * (capacity * (4 * D + 4) + 12)


def _pairs(plan: Blocks) -> int:
    """Pairs of chunks that the loops over lags form."""
    parts = spans(plan.chunks, plan.lags)
    return sum((plan.chunks - first) * (last - first) for first, last in parts)


def _transforms(plan: Blocks, count: int) -> int:
    """Real transforms of twice a chunk's length."""
    points = 2 * plan.chunk
    return round(5 * count * points * math.log2(points) / 2)


def _monarch(plan: Blocks, B: int, D: int) -> int:
    """Two products for each transform; those of lags begin with whole rows, not half of them."""
    rows, columns = monarch_factors(2 * plan.chunk)
    half, signals, lags = rows + 1, D * B * plan.chunks, D * plan.lags
    dense = 8 * half * columns**2
    outer = 4 * rows * half * columns
    return 2 * signals * (dense + outer) + lags * (dense + 2 * outer)
