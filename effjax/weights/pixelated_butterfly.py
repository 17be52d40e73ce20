"""Pixelated butterfly: a fixed pattern of dense blocks, and a product of thin factors beside it."""

import math
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from effjax.weights.axes import Axes
from effjax.weights.factored import contract_factors, factor_product
from effjax.weights.structured import Structured, swapped
from effjax.weights.weight import Saving, contract_dense, leaf, take_dense


@leaf
class PixelatedButterfly(Structured):
    """W = B + a b; of B's M x M blocks (i, j) all are 0 but those with i = j or one bit different.

    blocks: [*batch *inputs C S], C = 1 + log2 of the largest difference: of the inputs, flattened,
        M blocks of neighbours, each input's part of block (i, i) and of each (i, i with bit t of i
        flipped), t = 0, 1, ..., C - 2. S = outputs / M.
    a: [*batch *inputs R]. b: [*batch R *outputs]. num_inputs = len(inputs).
    B is the flat block butterfly: the sum of the factors of a butterfly instead of their product.

    Source: Chen et al. 2021, "Pixelated Butterfly", section 3, https://arxiv.org/abs/2112.00029;
    a rectangle is its square stretched, the weights gamma and 1 - gamma of both parts are absorbed.
    """

    blocks: jax.Array
    a: jax.Array
    b: jax.Array
    num_inputs: int = field(default=1, metadata={"static": True})

    learned: ClassVar[tuple[str, ...]] = ("blocks", "a", "b")
    parameters: ClassVar[tuple[str, ...]] = ("blocks", "a", "b")
    saving: ClassVar[Saving | None] = "realised"

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        batch = self.a.ndim - 1 - self.num_inputs
        return self.a.shape[:batch], self.a.shape[batch:-1], self.b.shape[batch + 1 :]

    @property
    def multiply_adds(self) -> int:
        return self.blocks.size + self.a.size + self.b.size

    def materialize(self) -> jax.Array:
        return self.sparse() + factor_product(self.a, self.b, self.num_inputs)

    def sparse(self) -> jax.Array:
        """The dense equivalent of B."""
        batch, _, _ = self.sizes
        values = self._grid()
        M, C = values.shape[-4], values.shape[-2]
        i, j = np.mgrid[:M, :M]
        of = jnp.stack([i ^ j == _difference(t) for t in range(C)])
        spread = jnp.where(
            of.reshape(*[1] * len(batch), C, M, 1, M, 1),
            jnp.moveaxis(values, -2, -4)[..., None, :],
            jnp.zeros((), values.dtype),
        )
        return spread.sum(axis=-5).reshape(self.shape)

    def times(self, x: jax.Array) -> jax.Array:
        values = self._grid()
        M, P, C, _ = values.shape
        rest, x = x.shape[:-1], x.reshape(-1, M * P)
        columns = jnp.stack([_partner(w, t, -3) for t, w in enumerate(jnp.unstack(values, axis=2))])
        rows = _partners(x.reshape(-1, M, P), C)
        y = contract_dense("tbip,tips->bis", rows, columns).reshape(x.shape[0], -1)
        return (y + contract_factors("bi,io->bo", x, *self._thin(), 1)).reshape(*rest, -1)

    def times_transposed(self, x: jax.Array) -> jax.Array:
        values = self._grid()
        M, _, C, S = values.shape
        rest, x = x.shape[:-1], x.reshape(-1, M * S)
        rows = _partners(x.reshape(-1, M, S), C)
        y = contract_dense("tbis,ipts->bip", rows, values).reshape(x.shape[0], -1)
        return (y + contract_factors("bo,io->bi", x, *self._thin(), 1)).reshape(*rest, -1)

    def take(self, ids: jax.Array) -> jax.Array:
        values = self._grid()
        M, P, C, S = values.shape
        rows = take_dense(values.reshape(M * P, C, S), ids)
        block = ids[..., None] % (M * P) // P ^ jnp.arange(M).reshape(*[1] * ids.ndim, M)
        same = jnp.stack([block == _difference(t) for t in range(C)], axis=-2)
        sparse = jnp.where(same[..., None], rows[..., None, :], jnp.zeros((), rows.dtype)).sum(-3)
        sparse = sparse.reshape(*ids.shape, *self.sizes[2])
        return sparse + jnp.tensordot(take_dense(self.a, ids), self.b, 1)

    def named(self, axes: Axes) -> Any:
        return self.replaced(
            blocks=PartitionSpec(*axes.batch, *axes.inputs, None, None),
            a=PartitionSpec(*axes.batch, *axes.inputs, "rank"),
            b=PartitionSpec(*axes.batch, "rank", *axes.outputs),
        )

    def _grid(self) -> jax.Array:
        """blocks [*batch M P C S]: P inputs and S outputs in each block."""
        batch, inputs, outputs = self.sizes
        C, S = self.blocks.shape[-2:]
        M = math.prod(outputs) // S
        return self.blocks.reshape(*batch, M, math.prod(inputs) // M, C, S)

    def _thin(self) -> tuple[jax.Array, jax.Array]:
        """a [inputs R] and b [R outputs] of an unstacked weight."""
        R = self.a.shape[-1]
        return self.a.reshape(-1, R), self.b.reshape(R, -1)


def _difference(t: int) -> int:
    """By what the two indices of a block of slot t differ."""
    return 0 if t == 0 else 2 ** (t - 1)


def _partner(x: jax.Array, t: int, axis: int) -> jax.Array:
    """x at the other index of each block of slot t, along the (negative) axis of blocks."""
    return x if t == 0 else swapped(x, _difference(t), axis)


def _partners(rows: jax.Array, slots: int) -> jax.Array:
    """rows [b M w] at the other index of the blocks of every slot: [C b M w]."""
    return jnp.stack([_partner(rows, t, -2) for t in range(slots)])
