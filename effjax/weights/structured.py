"""What structured matrices have in common: a fast product with rows, from either side."""

import math

import jax
import jax.numpy as jnp

from effjax.weights.weight import Weight, letters


class Structured(Weight):
    """A matrix from all inputs, flattened, to all outputs, flattened, that is not stored as one.

    A leaf gives the sizes of its axes and both products of an unstacked weight; batch axes are
    mapped over, and a contraction of anything but all inputs or all outputs takes the dense
    equivalent.
    """

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the batch, input and output axes."""
        raise NotImplementedError(f"{type(self).__name__} must define sizes")

    def times(self, x: jax.Array) -> jax.Array:
        """x W: rows [... inputs] to rows [... outputs] of x's dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define times")

    def times_transposed(self, x: jax.Array) -> jax.Array:
        """x W^T: rows [... outputs] to rows [... inputs] of x's dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define times_transposed")

    def contract(self, spec: str, x: jax.Array) -> jax.Array:
        xs, ws, ys = letters(spec)
        batch, inputs, outputs = self.sizes
        if batch and ws[0] in ys:
            return self._over_batch(xs, ws, ys, x)
        first, last = ws[: len(inputs)], ws[len(inputs) :]
        for summed, made, product, shape in (
            (first, last, self.times, outputs),
            (last, first, self.times_transposed, inputs),
        ):
            if not batch and not set(summed) & set(ys) and not set(made) & set(xs):
                rest = "".join(c for c in xs if c not in summed)
                rows = jnp.einsum(f"{xs}->{rest}{summed}", x)
                y = product(rows.reshape(*rows.shape[: len(rest)], -1))
                return jnp.einsum(f"{rest}{made}->{ys}", y.reshape(*y.shape[:-1], *shape))
        return super().contract(spec, x)

    def _over_batch(self, xs: str, ws: str, ys: str, x: jax.Array) -> jax.Array:
        """The contraction of each entry along the weight's first batch axis."""
        entry = ws[0]
        spec = f"{xs.replace(entry, '')},{ws[1:]}->{ys.replace(entry, '')}"
        along = xs.index(entry) if entry in xs else None
        one = jax.vmap(lambda w, x: w.contract(spec, x), (0, along), ys.index(entry))
        return one(self, x)

    @property
    def shape(self) -> tuple[int, ...]:
        batch, inputs, outputs = self.sizes
        return (*batch, *inputs, *outputs)


def swapped(x: jax.Array, stride: int, axis: int = -1) -> jax.Array:
    """Each x_i at the index that differs from i in one bit, along a (negative) axis.

    stride: a power of two, the value of that bit; 2 stride divides the axis.
    """
    before, after = x.shape[:axis], x.shape[axis:][1:]
    pairs = x.reshape(*before, -1, 2, stride, *after)
    return jnp.flip(pairs, axis - 1).reshape(x.shape)


def power_of_two(*sizes: int) -> int:
    """The largest power of two that divides all sizes."""
    common = math.gcd(*sizes)
    return common & -common
