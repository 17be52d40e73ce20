"""Magnitude pruning: the smallest entries of every weight become zero."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.transforms._lift import core_shape, in_turn, on_bases
from effjax.transforms._options import require_number
from effjax.weights import AnyWeight, Axes, Masked, Tree, Where, dense


def magnitude(params: Tree, axes: Tree, *, sparsity: float, where: Where = None) -> Tree:
    """Prunes the `round(sparsity * n)` entries of least |w| of every selected weight of n entries.

    Each layer and each expert is pruned to that count on its own. Of entries of equal magnitude the
    earlier in storage order goes first. Pruning a pruned weight again never revives an entry.

    Raises ConfigError: a sparsity outside [0, 1).

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks",
    section 3, https://arxiv.org/abs/1506.02626. We depart in the threshold: an exact count per
    weight in place of a multiple of its standard deviation.
    """
    sparsity = require_number("magnitude", "sparsity", sparsity, 0, 1, "[)")

    def one(path: str, w: AnyWeight, ax: Axes) -> Masked:
        _, inputs, outputs = core_shape(w, ax)
        count = round(sparsity * math.prod(inputs + outputs))
        return in_turn(_prune, ax, w, count=count)

    return on_bases("magnitude", one, params, axes, where, consumes=(Masked,))


def _prune(w: AnyWeight, *, axes: Axes, count: int) -> Masked:
    values = dense(w)
    order = magnitude_order(values)
    if isinstance(w, Masked):
        order = jnp.where(w.mask, order + 1, 0)  # pruned before zeros that were kept
    mask = ~smallest(order, count)
    if isinstance(w, Masked):
        mask &= w.mask
    return Masked(jnp.where(mask, values, jnp.zeros((), values.dtype)), mask)


def magnitude_order(w: jax.Array) -> jax.Array:
    """Integers >= 0 in the order of |w|: a float's bits without the sign, subnormals included.

    Source: IEEE 754-2019, section 3.4: the exponent stands above the significand.
    """
    integer = jnp.dtype(f"int{8 * w.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(w, integer) & jnp.iinfo(integer).max


def smallest(order: jax.Array, count: int) -> jax.Array:
    """True at exactly the `count` smallest of non-negative integers; of equals, the earlier first.

    Bisection on the value, then among its ties on the index: at most 31 + 31 counting passes, no
    sort.

    Source: Knuth 1998, "The Art of Computer Programming" 3, section 6.2.1 (bisection).
    """
    top = jnp.array(jnp.iinfo(order.dtype).max, order.dtype)
    threshold, below = _bisect(lambda t: _count(order < t), count, top)
    index = jnp.arange(order.size, dtype=jnp.int32).reshape(order.shape)
    tied = order == threshold
    end, _ = _bisect(lambda i: _count(tied & (index < i)), count - below, jnp.int32(order.size))
    return (order < threshold) | (tied & (index < end))


def _bisect(
    count_below: Callable[[jax.Array], jax.Array], wanted: int | jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A t in [0, top) at which a rising step function from 0 is `wanted`, and its value there.

    If it jumps over `wanted`, the t just before the jump.
    """

    def narrow(state: Any) -> Any:
        low, high, below = state
        middle = low + (high - low) // 2
        found = count_below(middle)
        fits = found <= wanted
        return (
            jnp.where(fits, middle, low),
            jnp.where(fits, high, middle),
            jnp.where(fits, found, below),
        )

    def goes_on(state: Any) -> jax.Array:
        low, high, below = state
        return (below != wanted) & (high - low > 1)

    start = (jnp.zeros_like(top), top, jnp.int32(0))
    low, _, below = jax.lax.while_loop(goes_on, narrow, start)
    return low, below


def _count(flags: jax.Array) -> jax.Array:
    # Partial sums in float32 vectorise where integer ones do not, and are exact below 2^24.
    return jnp.sum(jnp.sum(flags, axis=-1, dtype=jnp.float32).astype(jnp.int32))
