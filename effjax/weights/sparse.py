"""Weights with zeros: a mask over a base, and two kept entries of every four."""

from dataclasses import field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effjax.weights.axes import Axes
from effjax.weights.weight import AnyWeight, Saving, Weight, dense, leaf, named


@leaf
class Masked(Weight):
    """W = where(mask, base, 0); the zeros save nothing here, so the saving is simulated.

    Training changes the base; `project` sets what is masked back to zero, because momentum and
    weight decay would otherwise revive it.
    """

    base: AnyWeight
    mask: jax.Array

    learned: ClassVar[tuple[str, ...]] = ("base",)
    parameters: ClassVar[tuple[str, ...]] = ("base",)
    saving: ClassVar[Saving | None] = "simulated"

    def materialize(self) -> jax.Array:
        base = dense(self.base)
        return jnp.where(self.mask, base, jnp.zeros((), base.dtype))

    def named(self, axes: Axes) -> Any:
        return self.replaced(base=named(self.base, axes), mask=PartitionSpec(*axes.names))

    def project(self) -> "Masked":
        if isinstance(self.base, Weight):
            return self.replaced(base=self.base.project())
        return self.replaced(base=self.materialize())

    def ideal(self) -> Any:
        """The kept values beside one bit per entry."""
        kept = int(jnp.sum(self.mask))
        return {
            "values": jax.ShapeDtypeStruct((kept,), self.dtype),
            "bits": jax.ShapeDtypeStruct((-(-self.mask.size // 8),), jnp.uint8),
        }


@leaf
class SemiStructured(Weight):
    """W keeps 2 of every 4 consecutive entries along `axis`: values in order, and where they stood.

    values: half of W's length along `axis`.
    index: uint4, a quarter of W's length: `first + 4 * second`, the two kept positions (0..3) of
        each group, first < second. One bit per entry of W.
    axis: negative, so that stacking and slicing leave it true.
    """

    values: jax.Array
    index: jax.Array
    axis: int = field(default=-1, metadata={"static": True})

    learned: ClassVar[tuple[str, ...]] = ("values",)
    parameters: ClassVar[tuple[str, ...]] = ("values",)
    saving: ClassVar[Saving | None] = "realised"

    def materialize(self) -> jax.Array:
        values = jnp.moveaxis(self.values, self.axis, -1)
        code = jnp.moveaxis(self.index, self.axis, -1).astype(jnp.int32)[..., None]
        pairs = values.reshape(*values.shape[:-1], -1, 2)
        slot = jnp.arange(4).reshape(*[1] * (code.ndim - 1), 4)
        zero = jnp.zeros((), values.dtype)
        groups = jnp.where(slot == code % 4, pairs[..., :1], zero)
        groups = jnp.where(slot == code // 4, pairs[..., 1:], groups)
        return jnp.moveaxis(groups.reshape(*values.shape[:-1], -1), -1, self.axis)

    def named(self, axes: Axes) -> Any:
        spec = PartitionSpec(*axes.names)
        return self.replaced(values=spec, index=spec)
