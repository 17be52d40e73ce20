"""What this device can do at most, measured: matrix products and memory traffic.

The measured peak is what a share of peak is taken of; a data sheet's figure is not reached by any
program here.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_SECONDS = 0.12  # spent on each measurement, compilation apart
_LONG_ENOUGH = 0.01  # a call shorter than this may be mostly dispatch
_SMALLEST, _LARGEST = 512, 8192  # of a square operand: 1 to 256 MiB in float32
_TRAFFIC_BYTES = 1 << 27  # 128 MiB, beyond the caches of nearly every processor


@dataclass(frozen=True)
class Peaks:
    """Best rates of several calls on one device: FLOP/s and bytes/s.

    `matmul_float32` is at JAX's configured matmul precision; `matmul_bfloat16` accumulates in
    float32; `copy` counts bytes read and written in place, `read` the bytes of a sum.
    """

    device: str
    matmul_float32: float
    matmul_bfloat16: float
    copy: float
    read: float


def peaks(device: Any = None) -> Peaks:
    """Measures the peaks of a device, the first local one by default: one to two seconds, once.

    The result is kept for the life of the process. On a shared machine it is a lower bound.
    """
    return _measured(jax.local_devices()[0] if device is None else device)


@functools.cache
def _measured(device: Any) -> Peaks:
    with jax.default_device(device):
        return Peaks(
            device=f"{device.platform} {device.device_kind}",
            matmul_float32=_matmul(jnp.float32),
            matmul_bfloat16=_matmul(jnp.bfloat16),
            copy=_copy(),
            read=_read(),
        )


def _matmul(dtype: Any) -> float:
    """The best rate over squares of doubling size, up to one whose product takes long enough."""
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    size, rate = _SMALLEST, 0.0
    while True:
        x = jnp.full((size, size), 1 / size, dtype)
        seconds = _best(functools.partial(product, x, x))
        rate = max(rate, 2 * size**3 / seconds)
        if seconds >= _LONG_ENOUGH or size >= _LARGEST:
            return rate
        size *= 2


def _copy() -> float:
    """Reads and writes one buffer in place: a fresh output would pay for page faults as well."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(_TRAFFIC_BYTES // 4, jnp.float32)]

    def step() -> Any:
        held[0] = add(held[0])
        return held[0]

    return 2 * _TRAFFIC_BYTES / _best(step)


def _read() -> float:
    total = jax.jit(jnp.sum)
    x = jnp.zeros(_TRAFFIC_BYTES // 4, jnp.float32)
    return _TRAFFIC_BYTES / _best(lambda: total(x))


def _best(thunk: Callable[[], Any]) -> float:
    """Least wall seconds of a call, after one that compiles."""
    jax.block_until_ready(thunk())
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        begin = time.perf_counter()
        jax.block_until_ready(thunk())
        now = time.perf_counter()
        best = min(best, now - begin)
        if now >= end:
            return best
