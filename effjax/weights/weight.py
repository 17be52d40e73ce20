"""The protocol of a weight leaf, and the one door through which activations meet weights."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effjax.weights.axes import Axes

Saving: TypeAlias = Literal["realised", "simulated"]


class Weight:
    """A pytree that stands where a dense array could stand in a model's parameters.

    A leaf is a frozen dataclass of arrays (and nested leaves) made with `@leaf`. Its methods are
    rank-polymorphic: extra leading axes are batch axes, so stacking layers and slicing one out
    keep it valid. It stores no shape: static fields are counts of core axes or negative axis
    numbers. Constructing does not validate, because transformations of pytrees fill the fields
    with `None`, shapes and tracers; the verb that makes a leaf validates.
    """

    learned: ClassVar[tuple[str, ...]] = ()
    """The fields that training may change; a nested leaf among them decides for itself."""

    parameters: ClassVar[tuple[str, ...]] = ()
    """The fields whose entries are parameters; scales, masks and positions are not."""

    saving: ClassVar[Saving | None] = None
    """Whether the bytes this leaf saves are gone from memory or only would be in another format."""

    def materialize(self) -> jax.Array:
        """The dense equivalent, always right; a leaf without one raises TypeError."""
        raise TypeError(f"{type(self).__name__} has no dense equivalent")

    def contract(self, spec: str, x: jax.Array) -> jax.Array:
        """`einsum(spec, x, W)`; a leaf overrides this where it knows something faster."""
        return contract_dense(spec, x, self.materialize())

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows `W[ids]` of an unstacked weight."""
        return take_dense(self.materialize(), ids)

    def named(self, axes: Axes) -> Any:
        """The same leaf with a `PartitionSpec` of logical axis names in place of each array."""
        raise NotImplementedError(f"{type(self).__name__} does not name its parts")

    def replaced(self, **parts: Any) -> Self:
        """The same leaf with other contents for some parts: arrays, specs, shapes or `None`."""
        return dataclasses.replace(self, **parts)  # type: ignore[type-var]

    def project(self) -> "Weight":
        """The same leaf with its invariant restored, after an optimiser's step."""
        return self

    def ideal(self) -> Any:
        """What a format made for this leaf would store: a tree of arrays or abstract arrays."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense equivalent."""
        return jax.eval_shape(type(self).materialize, self).shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the dense equivalent."""
        return jax.eval_shape(type(self).materialize, self).dtype

    @property
    def ndim(self) -> int:
        """The rank of the dense equivalent."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the dense equivalent."""
        return math.prod(self.shape)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one row with every entry of the batch, as the leaf contracts it."""
        return self.size


AnyWeight: TypeAlias = jax.Array | Weight


T = TypeVar("T")


@dataclass_transform(eq_default=False, frozen_default=True)
def leaf(cls: type[T]) -> type[T]:
    """Makes a class of array fields a frozen, registered weight leaf (identity equality)."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True, eq=False)(cls))


def is_weight(value: Any) -> bool:
    """Whether a value is a weight leaf rather than a plain array."""
    return isinstance(value, Weight)


def dense(w: AnyWeight) -> jax.Array:
    """The dense equivalent of a weight; a plain array is its own."""
    return w.materialize() if isinstance(w, Weight) else w


def contract_dense(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum(spec, x, w)` in x's dtype, accumulated in at least float32."""
    return product(spec, x, w).astype(x.dtype)


def product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum(spec, x, w)` with w in x's dtype; the sums, in at least float32, are not rounded."""
    xs, ws, ys = letters(spec)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    w = w.astype(x.dtype)
    batch = [c for c in xs if c in ws and c in ys]
    if x.dtype == accumulate or not batch:
        return jnp.einsum(spec, x, w, preferred_element_type=accumulate)
    # XLA on CPU sums products of short floats in float32 only where batch axes come first.
    a, b, c = ("".join([*batch, *(i for i in part if i not in batch)]) for part in (xs, ws, ys))
    x, w = jnp.einsum(f"{xs}->{a}", x), jnp.einsum(f"{ws}->{b}", w)
    y = jnp.einsum(f"{a},{b}->{c}", x, w, preferred_element_type=accumulate)
    return jnp.einsum(f"{c}->{ys}", y)


def take_dense(w: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `w[ids]`; an id past the end gives NaN rather than another row's values."""
    return jnp.take(w, ids, axis=0, mode="fill", fill_value=jnp.nan)


def einsum(spec: str, x: jax.Array, w: AnyWeight) -> jax.Array:
    """The door: `einsum(spec, x, W)` for a plain array or any weight leaf.

    spec: two operands, activations first, explicit output, single letters: `"btd,dnh->btnh"`.
        The weight's letters follow its storage order `(*batch, *inputs, *outputs)`.
    Returns x's dtype; the weight is cast to it, and the sum runs in at least float32.
    """
    return w.contract(spec, x) if isinstance(w, Weight) else contract_dense(spec, x, w)


def take(w: AnyWeight, ids: jax.Array) -> jax.Array:
    """The second door: rows `W[ids]` along the first axis, for embeddings. NaN past the end."""
    return w.take(ids) if isinstance(w, Weight) else take_dense(w, ids)


def letters(spec: str) -> tuple[str, str, str]:
    """Splits `"btd,df->btf"` into the letters of activations, weight and result.

    Raises ValueError for another form, and for a letter that is summed over but not shared.
    """
    x, comma, rest = spec.replace(" ", "").partition(",")
    w, arrow, result = rest.partition("->")
    if not (comma and arrow and x and w) or "," in w:
        raise ValueError(f"spec must read like 'btd,df->btf', got {spec!r}")
    if alone := (set(x) ^ set(w)) - set(result):
        raise ValueError(f"spec {spec!r} sums over {', '.join(sorted(alone))} of one operand alone")
    return x, w, result


def named(w: AnyWeight, axes: Axes) -> Any:
    """Logical axis names of every part of one weight, as `PartitionSpec`s in its own structure."""
    return w.named(axes) if isinstance(w, Weight) else PartitionSpec(*axes.names)
