"""Moving padding to the end of each row, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Order = tuple[Int[Array, "B T"], Int[Array, "B T"]]


def live_first(positions: Int[Array, "B T"]) -> Order:
    """The order that puts live tokens first, each kind in its own order, and its inverse."""
    order = jnp.argsort(positions < 0, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


@jax.custom_vjp
def permute(x: Shaped[Array, "B T ..."], order: Order) -> Shaped[Array, "B T ..."]:
    """x with its tokens in `order`; the cotangent goes back by a gather instead of a scatter."""
    index = order[0].reshape(*order[0].shape, *(1 for _ in x.shape[2:]))
    return jnp.take_along_axis(x, index, axis=1)


def _permute_forward(x: Array, order: Order) -> tuple[Array, Order]:
    return permute(x, order), order


def _permute_backward(order: Order, dy: Array) -> tuple[Array, Any]:
    return permute(dy, order[::-1]), None


permute.defvjp(_permute_forward, _permute_backward)
