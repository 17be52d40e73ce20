"""What the kernels compute and move: for the FLOP counter, XLA's scheduler and a roofline."""

import math

import jax
from jax.experimental import pallas as pl

FORWARD = 4  # per element: the square, its sum, times r, times scale
BACKWARD = 11  # the square, its sum; n, g, g n, its sum; n mean, minus, times r; dy n, its sum


def forward_flops(shape: tuple[int, ...]) -> int:
    """Returns the element-wise FLOPs of the forward kernel."""
    return FORWARD * math.prod(shape)


def backward_flops(shape: tuple[int, ...]) -> int:
    """Returns the element-wise FLOPs of the backward kernel."""
    return BACKWARD * math.prod(shape)


def forward_bytes(x: jax.Array, scale: jax.Array) -> int:
    """Returns the bytes that the forward kernel must move: x in, y out, the scale once."""
    return 2 * x.size * x.dtype.itemsize + scale.size * scale.dtype.itemsize


def backward_bytes(x: jax.Array, scale: jax.Array, partials: int) -> int:
    """Returns the bytes that the backward kernel must move: x, dy in, dx and partial sums out."""
    sums = partials * scale.size * 4
    return 3 * x.size * x.dtype.itemsize + scale.size * scale.dtype.itemsize + sums


def forward_estimate(x: jax.Array, scale: jax.Array) -> pl.CostEstimate:
    """Returns the forward kernel's cost for `pallas_call`; its transcendentals: an rsqrt a row."""
    return pl.CostEstimate(
        flops=forward_flops(x.shape),
        transcendentals=x.shape[0],
        bytes_accessed=forward_bytes(x, scale),
    )


def backward_estimate(x: jax.Array, scale: jax.Array, partials: int) -> pl.CostEstimate:
    """Returns the backward kernel's cost for `pallas_call`."""
    return pl.CostEstimate(
        flops=backward_flops(x.shape),
        transcendentals=x.shape[0],
        bytes_accessed=backward_bytes(x, scale, partials),
    )
