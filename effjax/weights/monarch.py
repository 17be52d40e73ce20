"""Monarch matrices: two block-diagonal matrices with a permutation between them."""

import math
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effjax.weights.axes import Axes
from effjax.weights.structured import Structured
from effjax.weights.weight import Saving, contract_dense, leaf, take_dense


@leaf
class Monarch(Structured):
    """W[(k p), (s l)] = sum_r right[(k p), l, r] left[k, r, (s l)]: every block (k, l) has rank R.

    right: [*batch *inputs L R]. left: [*batch K R *outputs]. num_inputs = len(inputs).
    The inputs, flattened, are K blocks of neighbours; the outputs, flattened, are L blocks of every
    L-th. With n inputs, n outputs, K = L = sqrt(n) and R = 1 that is the paper's
    W^T = P left P^T right with block-diagonal factors and the permutation P that transposes: of n^2
    entries 2 n^1.5 are stored, and a product costs as many multiply-adds.

    Source: Dao et al. 2022, "Monarch", section 3.1, https://arxiv.org/abs/2204.00595; ranks as in
    its code, https://github.com/HazyResearch/fly, `blockdiag_butterfly_einsum.py`.
    """

    right: jax.Array
    left: jax.Array
    num_inputs: int = field(default=1, metadata={"static": True})

    learned: ClassVar[tuple[str, ...]] = ("right", "left")
    parameters: ClassVar[tuple[str, ...]] = ("right", "left")
    saving: ClassVar[Saving | None] = "realised"

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        outputs = self.right.ndim - self.num_inputs
        batch = self.right.shape[: outputs - 2]
        return batch, self.right.shape[outputs - 2 : -2], self.left.shape[outputs:]

    @property
    def multiply_adds(self) -> int:
        return self.right.size + self.left.size

    def materialize(self) -> jax.Array:
        right, left = self._blocks()
        whole = jnp.einsum("...kplr,...krsl->...kpsl", right, left)
        return whole.reshape(self.shape)

    def times(self, x: jax.Array) -> jax.Array:
        right, left = self._blocks()
        rest, rows = x.shape[:-1], x.reshape(-1, *right.shape[:2])
        h = contract_dense("bkp,kplr->bklr", rows, right)
        return contract_dense("bklr,krsl->bsl", h, left).reshape(*rest, -1)

    def times_transposed(self, x: jax.Array) -> jax.Array:
        right, left = self._blocks()
        rest, rows = x.shape[:-1], x.reshape(-1, *left.shape[2:])
        h = contract_dense("bsl,krsl->bklr", rows, left)
        return contract_dense("bklr,kplr->bkp", h, right).reshape(*rest, -1)

    def take(self, ids: jax.Array) -> jax.Array:
        right, left = self._blocks()
        n, (_, _, outputs) = self.right.shape[0], self.sizes
        block = ids % n // right.shape[1]
        rows = jnp.einsum("...lr,...rsl->...sl", take_dense(self.right, ids), left[block])
        return rows.reshape(*ids.shape, *outputs)

    def named(self, axes: Axes) -> Any:
        return self.replaced(
            right=PartitionSpec(*axes.batch, *axes.inputs, None, "rank"),
            left=PartitionSpec(*axes.batch, None, "rank", *axes.outputs),
        )

    def _blocks(self) -> tuple[jax.Array, jax.Array]:
        """right [*batch K P L R] and left [*batch K R S L]."""
        batch, inputs, outputs = self.sizes
        L, R = self.right.shape[-2:]
        K = self.left.shape[len(batch)]
        right = self.right.reshape(*batch, K, math.prod(inputs) // K, L, R)
        return right, self.left.reshape(*batch, K, R, math.prod(outputs) // L, L)
