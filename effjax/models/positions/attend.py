"""Attention as a position scheme wants it."""

from typing import Any

import jax

from effjax.errors import ConfigError
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.cache import Cache, keys_values
from effjax.ops.attention.engine import attention
from effjax.ops.attention.relative import relative_attention


def attend(
    scheme: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    bias: Bias | None,
    **options: Any,
) -> jax.Array:
    """The engine's attention with what the scheme adds; q and k have been through `rotate`.

    scheme: from `SCHEMES`, after `drawn`. bias: what is added to the scores, the scheme's part
    included; None where the scheme has tables. options: the engine's.
    """
    if scheme.rotates_cache:
        q, k = scheme.rotate_late(q, k, (q_positions, q_segments), (k_positions, k_segments))
    options |= {
        "q_positions": q_positions,
        "k_positions": k_positions,
        "q_segments": q_segments,
        "k_segments": k_segments,
    }
    tables = scheme.tables()
    if tables is None:
        return attention(q, k, v, bias=bias, **options)
    return relative_attention(q, k, v, tables, **options)


def attend_cached(
    scheme: Any,
    cache: Any,
    q: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array,
    **options: Any,
) -> jax.Array:
    """The same from a piece that has been written to all that a cache holds.

    Raises ConfigError for a cache in pages.
    """
    if not isinstance(cache, Cache):
        raise ConfigError(
            f"position scheme {type(scheme).__name__} reads a Cache, got {type(cache).__name__}"
        )
    return attend(
        scheme,
        q,
        *keys_values(cache),
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segments,
        k_segments=cache.segments,
        **options,
    )
