"""Bytes against sums made by hand, and every way in which a platform may stay silent."""

import resource
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.memory import (
    Memory,
    bits,
    compiled_memory,
    device_memory,
    peak_resident_bytes,
    stored_bytes,
)

BITS = {
    "bool": 8,
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "int8": 8,
    "int32": 32,
    "float8_e4m3fn": 8,
    "bfloat16": 16,
    "float16": 16,
    "float32": 32,
    "complex64": 64,
}


@pytest.mark.parametrize("name", BITS)
def test_bits(name):
    assert bits(getattr(jnp, name if name != "bool" else "bool_")) == BITS[name]


def test_bits_of_what_stores_no_numbers():
    with pytest.raises(TypeError, match="stores no numbers"):
        bits(np.dtype("U3"))


def test_stored_bytes_counts_true_bits():
    tree = {
        "codes": jax.ShapeDtypeStruct((3, 5), jnp.int4),  # 15 nibbles
        "scale": np.ones((3, 1), np.float16),
        "layers": [jnp.zeros((2, 2), jnp.bfloat16), None],
        "empty": np.zeros((0, 7)),
        "scalar": jnp.float32(1),
        "key": jax.random.key(0),
    }
    assert stored_bytes(tree) == 8 + 6 + 8 + 0 + 4 + 8


def test_stored_bytes_is_not_nbytes():
    codes = jnp.zeros((64, 64), jnp.int4)
    assert stored_bytes(codes) == 2048 != codes.nbytes


def test_compiled_memory_agrees_with_the_arrays():
    size = 64
    f = jax.jit(lambda x, y: jnp.sort(x @ y) @ y, donate_argnums=0)
    x = jax.ShapeDtypeStruct((size, size), jnp.float32)
    memory = compiled_memory(f.lower(x, x).compile())
    one = 4 * size * size
    assert memory.source == "memory_analysis"
    assert memory.arguments == 2 * one
    assert memory.outputs == one
    assert memory.aliased == one
    assert memory.temporaries >= one
    assert memory.peak == 2 * one + memory.temporaries


def _refuses():
    raise NotImplementedError("not here")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (SimpleNamespace(memory_analysis=lambda: None), "gives no memory_analysis"),
        (SimpleNamespace(memory_analysis=_refuses), "not here"),
        (object(), "no attribute"),
    ],
)
def test_what_is_missing_is_none_with_a_reason(program, reason):
    memory = compiled_memory(program)
    assert memory.temporaries is None
    assert memory.peak is None
    assert reason in memory.source


def test_peak_needs_every_part():
    assert Memory(0, 0, 0, 0, "").peak == 0
    assert Memory(None, 1, 1, 1, "").peak is None


def test_peak_resident_bytes_agrees_with_the_system():
    held = np.ones(1 << 21)
    peak = peak_resident_bytes()
    assert peak >= held.nbytes
    assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)


def test_device_memory_says_why_it_is_silent():
    memory = device_memory()
    assert (memory.in_use is None) == memory.source.startswith("unavailable")
    stats = {"bytes_in_use": 1, "peak_bytes_in_use": 2, "bytes_limit": 3}
    known = device_memory(SimpleNamespace(platform="gpu", memory_stats=lambda: stats))
    assert (known.in_use, known.peak, known.limit, known.source) == (1, 2, 3, "memory_stats")
    refused = device_memory(SimpleNamespace(platform="gpu", memory_stats=_refuses))
    assert refused.peak is None
    assert "not here" in refused.source
