"""Butterfly matrices: the pattern of the fast Fourier transform, with learned coefficients."""

import math
from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effjax.weights.axes import Axes
from effjax.weights.structured import Structured, swapped
from effjax.weights.weight import Saving, leaf


def butterfly_stage(x: jax.Array, coefficients: jax.Array, stride: int) -> jax.Array:
    """y_i = c_i0 x_i + c_i1 x_j, j = i with the bit of value `stride` flipped, over the last axis.

    coefficients: [..., n, 2], as many axes before the last two as x has before its last, of the
    same sizes or 1.
    """
    return coefficients[..., 0] * x + coefficients[..., 1] * swapped(x, stride)


def butterfly_stage_transposed(x: jax.Array, coefficients: jax.Array, stride: int) -> jax.Array:
    """The transpose of `butterfly_stage`: y_i = c_i0 x_i + c_j1 x_j."""
    return coefficients[..., 0] * x + swapped(coefficients[..., 1] * x, stride)


@leaf
class Butterfly(Structured):
    """W^T = blocks S_J ... S_1 of sparse stages: each mixes i with i that has one bit flipped.

    first: [*batch Co A *inputs 2], the stages of strides 1, 2, ..., 2^(A-1).
    last: [*batch Ci B *outputs 2], those of strides 2^A, ..., n / 2, with n = 2^J, J = A + B.
    num_inputs = len(inputs). There are Ci n inputs and Co n outputs; each pair of blocks of n has
    its own stages. A stage's coefficients stand at the numbers that it makes. All of a product is
    element-wise work: 2 n log2 n multiply-adds for a block and row.

    Source: Dao et al. 2019, "Learning Fast Algorithms for Linear Transforms Using Butterfly
    Factorizations", section 3, https://arxiv.org/abs/1903.05895; rectangles are stacks of squares
    as in its code, https://github.com/HazyResearch/butterfly, without padding.
    """

    first: jax.Array
    last: jax.Array
    num_inputs: int = field(default=1, metadata={"static": True})

    learned: ClassVar[tuple[str, ...]] = ("first", "last")
    parameters: ClassVar[tuple[str, ...]] = ("first", "last")
    saving: ClassVar[Saving | None] = "realised"

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        batch = self.first.ndim - self.num_inputs - 3
        inputs, outputs = self.first.shape[batch + 2 : -1], self.last.shape[batch + 2 : -1]
        return self.first.shape[:batch], inputs, outputs

    @property
    def multiply_adds(self) -> int:
        return self.first.size + self.last.size

    def materialize(self) -> jax.Array:
        batch, inputs, _ = self.sizes
        identity = jnp.eye(math.prod(inputs), dtype=self.first.dtype)
        rows = lambda w: w.times(identity)  # noqa: E731
        for _ in batch:
            rows = jax.vmap(rows)
        return rows(self).reshape(self.shape)

    def times(self, x: jax.Array) -> jax.Array:
        stages = self._stages(x)
        n = stages[0].shape[-2]
        h = x.astype(stages[0].dtype).reshape(*x.shape[:-1], 1, -1, n)
        for j, stage in enumerate(stages):
            h = butterfly_stage(h, stage, 2**j)
        return h.sum(axis=-2).reshape(*x.shape[:-1], -1).astype(x.dtype)

    def times_transposed(self, x: jax.Array) -> jax.Array:
        stages = self._stages(x)
        n = stages[0].shape[-2]
        h = x.astype(stages[0].dtype).reshape(*x.shape[:-1], -1, 1, n)
        for j, stage in reversed(list(enumerate(stages))):
            h = butterfly_stage_transposed(h, stage, 2**j)
        return h.sum(axis=-3).reshape(*x.shape[:-1], -1).astype(x.dtype)

    def named(self, axes: Axes) -> Any:
        return self.replaced(
            first=PartitionSpec(*axes.batch, None, None, *axes.inputs, None),
            last=PartitionSpec(*axes.batch, None, None, *axes.outputs, None),
        )

    def _stages(self, x: jax.Array) -> list[jax.Array]:
        """Coefficients [... Co Ci n 2] of every stage, first to last, in at least float32."""
        blocks_out, blocks_in = self.first.shape[0], self.last.shape[0]
        first = self.first.reshape(blocks_out, self.first.shape[1], blocks_in, -1, 2)
        last = self.last.reshape(blocks_in, self.last.shape[1], blocks_out, -1, 2)
        grids = [*jnp.unstack(first, axis=1), *jnp.unstack(last.swapaxes(0, 2), axis=1)]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        axes = [1] * (x.ndim - 1)
        return [grid.astype(x.dtype).astype(wide).reshape(*axes, *grid.shape) for grid in grids]
