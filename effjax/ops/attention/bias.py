"""Additive biases as functions of positions, and the cotangents of their arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.ops.attention.layout import wide

# A frozen pytree; called with positions and heads that broadcast together, elementwise like them.
Bias = Callable[[Array, Array, Array], Array]


def learned(bias: Bias | None) -> list[Array]:
    """The arrays of a bias that have cotangents: those of floating numbers."""
    return [jnp.asarray(x) for x in jax.tree.leaves(bias) if _is_learned(x)]


def with_learned(bias: Bias | None, values: list[Array]) -> Any:
    """The bias with other learned arrays; the rest stays."""
    remaining = iter(values)
    return jax.tree.map(lambda x: next(remaining) if _is_learned(x) else x, bias)


def pull(bias: Bias | None, places: tuple[Array, Array, Array], g: Array) -> list[Array]:
    """Cotangents of the learned arrays for the cotangent g of `bias(*places)` broadcast."""
    if not learned(bias):
        return []

    def block(values: list[Array]) -> Array:
        s = with_learned(bias, values)(*places)
        return jnp.broadcast_to(s.astype(g.dtype), g.shape)

    return jax.vjp(block, learned(bias))[1](g)[0]


def zeros(bias: Bias | None) -> list[Array]:
    """Where cotangents are summed over blocks: in the wide type."""
    return [jnp.zeros(x.shape, wide(x)) for x in learned(bias)]


def cotangent(bias: Bias | None, totals: list[Array]) -> Any:
    """The sums in the shape and the types of the bias; float0 for what cannot be learned."""
    parts = [x.astype(y.dtype) for x, y in zip(totals, learned(bias), strict=True)]
    rest = jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), bias)
    remaining = iter(parts)
    return jax.tree.map(lambda x, zero: next(remaining) if _is_learned(x) else zero, bias, rest)


def _is_learned(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
