"""Bytes: what a tree stores, what a compiled program needs, what the process and device hold.

Every figure is in bytes; what a platform does not tell is None, with the reason beside it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Memory:
    """Buffers of one compiled program on one device, in bytes, and where the figures come from.

    `peak` = arguments + outputs - aliased + temporaries, an upper bound of what lives at once.
    """

    temporaries: int | None
    arguments: int | None
    outputs: int | None
    aliased: int | None
    source: str

    @property
    def peak(self) -> int | None:
        """Gives the bytes that the program holds at its widest; None where a part is unknown."""
        parts = (self.temporaries, self.arguments, self.outputs, self.aliased)
        if any(part is None for part in parts):
            return None
        temporaries, arguments, outputs, aliased = (part or 0 for part in parts)
        return arguments + outputs - aliased + temporaries


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes in use, their peak since the process began, and the limit, of one device."""

    in_use: int | None
    peak: int | None
    limit: int | None
    source: str


def bits(dtype: Any) -> int:
    """Gives the bits that one element of a dtype stores: 4 for int4, 8 for bool, 16 for bfloat16.

    Raises TypeError for a dtype that stores no numbers.
    """
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys
        return int(dtype.itemsize) * 8
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 8
    if jnp.issubdtype(dtype, np.complexfloating):
        return dtype.itemsize * 8
    if jnp.issubdtype(dtype, np.inexact):
        return int(jnp.finfo(dtype).bits)
    if jnp.issubdtype(dtype, np.integer):
        return int(jnp.iinfo(dtype).bits)
    raise TypeError(f"dtype {dtype} stores no numbers")


def stored_bytes(tree: Any) -> int:
    """Counts the bytes that a tree of arrays stores, from its shapes and dtypes.

    sum over arrays of ceil(size * bits / 8). Abstract arrays count like real ones. `.nbytes` is
    never read: it gives one byte to each int4, two of which share one in XLA and in checkpoints.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        total += -(-int(np.prod(array.shape, dtype=object)) * bits(array.dtype) // 8)
    return total


def compiled_memory(compiled: Any) -> Memory:
    """Reads XLA's buffer assignment from `jax.jit(f).lower(...).compile()`, for one device."""
    try:
        stats = compiled.memory_analysis()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return Memory(None, None, None, None, f"unavailable: {_line(error)}")
    if stats is None:
        return Memory(None, None, None, None, "unavailable: the backend gives no memory_analysis")
    return Memory(
        temporaries=stats.temp_size_in_bytes,
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        source="memory_analysis",
    )


def peak_resident_bytes() -> int | None:
    """Gives the most memory that this process has held so far; None where the system does not say.

    It never falls, so it tells the first heavy program of a process from none, and not two programs
    from each other.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(device: Any = None) -> DeviceMemory:
    """Reads the allocator's counters of a device, the first local one by default."""
    device = jax.local_devices()[0] if device is None else device
    try:
        stats = device.memory_stats()
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return DeviceMemory(None, None, None, f"unavailable: {_line(error)}")
    if not stats:
        reason = f"unavailable: {device.platform} keeps no memory statistics"
        return DeviceMemory(None, None, None, reason)
    return DeviceMemory(
        in_use=stats.get("bytes_in_use"),
        peak=stats.get("peak_bytes_in_use"),
        limit=stats.get("bytes_limit"),
        source="memory_stats",
    )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
