"""2:4 sparsity: two entries of every four are kept, stored without the zeros."""

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.transforms._lift import group_axis, on_bases, together
from effjax.transforms.prune.magnitude import magnitude_order
from effjax.weights import AnyWeight, Axes, SemiStructured, Tree, Where


def semi_structured(params: Tree, axes: Tree, *, where: Where = None) -> Tree:
    """Keeps the 2 largest |w| of every 4 consecutive entries of the last input axis.

    For a lookup the fours run along its last output axis, so that a row can be gathered alone. Of
    entries of equal magnitude the earlier is pruned first.

    Raises ConfigError: an axis that 4 does not divide.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3,
    https://arxiv.org/abs/2104.08378.
    """

    def one(path: str, w: AnyWeight, ax: Axes) -> SemiStructured:
        name, size = ax.names[group_axis(ax)], w.shape[group_axis(ax)]
        if size % 4:
            raise ConfigError(
                f"semi_structured at {path!r}: 4 must divide {name}, got {name}={size}"
            )
        return together(_keep_two, ax, w)

    return on_bases("semi_structured", one, params, axes, where)


def _keep_two(w: jax.Array, *, axes: Axes) -> SemiStructured:
    axis = group_axis(axes)
    before, after = w.shape[:axis], w.shape[axis:][1:]
    fours = w.reshape(*before, -1, 4, *after)
    w0, w1, w2, w3 = (jax.lax.index_in_dim(fours, i, len(before) + 1, False) for i in range(4))
    k0, k1, k2, k3 = _kept(*(magnitude_order(v) for v in (w0, w1, w2, w3)))
    first = jnp.where(k0, 0, jnp.where(k1, 1, 2))
    second = jnp.where(k3, 3, jnp.where(k2, 2, 1))
    values = jnp.stack(
        [
            jnp.where(k0, w0, jnp.where(k1, w1, w2)),
            jnp.where(k3, w3, jnp.where(k2, w2, w1)),
        ],
        axis=len(before) + 1,
    )
    index = (first + 4 * second).astype(jnp.uint4)
    return SemiStructured(values.reshape(*before, -1, *after), index, axis)


def _kept(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
    """Whether each of four is among the two largest; of equals, the later one is."""
    ab, ac, ad, bc, bd, cd = a > b, a > c, a > d, b > c, b > d, c > d

    def wins(*over: jax.Array) -> jax.Array:
        return sum(v.astype(jnp.int8) for v in over) >= 2  # type: ignore[return-value]

    return wins(ab, ac, ad), wins(~ab, bc, bd), wins(~ac, ~bc, cd), wins(~ad, ~bd, ~cd)
