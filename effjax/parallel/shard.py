"""Where every array lies: one map from logical axis names to shardings, for all weight leaves."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.errors import ConfigError
from effjax.parallel.rules import DEFAULT, Rules, axes_of, require_known_axes
from effjax.weights import AnyWeight, Axes, Tree, is_weight, named
from effjax.weights.trees import path_string


def shardings(params: Tree, axes: Tree, mesh: Mesh, rules: Rules = DEFAULT) -> Tree:
    """The sharding of every array of a parameter tree, in the same structure.

    params: arrays or abstract arrays, plain or in leaves. axes: `Axes` of every weight.
    A mesh axis divides one axis of an array at most: the first that asks for it. Parts of a leaf
    that are smaller than the dense weight (scales of groups, ranks, packed indices) stay whole
    along an axis that does not divide.

    Raises ConfigError where an axis of full size does not divide, and for an axis without a rule.
    """
    require_known_axes(rules, mesh)

    def visit(path: tuple[Any, ...], w: AnyWeight, ax: Axes) -> Any:
        where = path_string(path)
        if len(ax.names) != len(w.shape):
            raise ValueError(f"{where}: axes {ax.names} do not fit a weight of shape {w.shape}")
        full = set(zip(ax.names, w.shape, strict=True))

        def place(names: PartitionSpec, part: jax.Array) -> NamedSharding:
            spec = _divide(where, tuple(names), part.shape, full, mesh, rules)
            return NamedSharding(mesh, spec)

        is_names = lambda v: isinstance(v, PartitionSpec)  # noqa: E731
        return jax.tree.map(place, named(w, ax), w, is_leaf=is_names)

    return jax.tree_util.tree_map_with_path(visit, params, axes, is_leaf=is_weight)


def _divide(
    where: str,
    names: tuple[str | None, ...],
    shape: tuple[int, ...],
    full: set[tuple[str, int]],
    mesh: Mesh,
    rules: Rules,
) -> PartitionSpec:
    """Mesh axes for the named axes of one array; `full` holds the dense weight's (name, size)."""
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        asked = () if name is None else axes_of(name, rules, where)
        free = tuple(a for a in asked if mesh.shape[a] > 1 and a not in used)
        ways = math.prod(mesh.shape[a] for a in free)
        if size % ways:
            if (name, size) in full:
                raise ConfigError(_indivisible(where, f"axis {name!r}", size, free, mesh))
            free = ()
        used.update(free)
        entries.append(free or None)
    return PartitionSpec(*entries)


def _indivisible(where: str, what: str, size: int, axes: tuple[str, ...], mesh: Mesh) -> str:
    ways = math.prod(mesh.shape[a] for a in axes)
    product = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
    below, above = size // ways * ways, -(-size // ways) * ways
    sizes = f"{below} or {above}" if below else f"{above}"
    return (
        f"{where}: {what} of size {size} must divide over mesh {product} = {ways} devices "
        f"({size} = {size // ways} x {ways} + {size % ways}); nearest sizes: {sizes}, "
        f"nearest number of devices: {math.gcd(size, ways)}"
    )


def shard(params: Tree, axes: Tree, mesh: Mesh, rules: Rules = DEFAULT) -> Tree:
    """The same parameters, bit for bit, each array laid out over the mesh by the rules.

    Raises ConfigError as `shardings` does.
    """
    return jax.device_put(params, shardings(params, axes, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of the mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT, size: int | None = None) -> NamedSharding:
    """The sharding of data whose leading axis is the batch.

    size: the batch size over all devices, to be checked where it is given.

    Raises ConfigError where it does not divide.
    """
    require_known_axes(rules, mesh)
    axes = tuple(a for a in axes_of("batch", rules, "batch") if mesh.shape[a] > 1)
    if size is not None and size % math.prod(mesh.shape[a] for a in axes):
        raise ConfigError(_indivisible("batch", "batch", size, axes, mesh))
    return NamedSharding(mesh, PartitionSpec(axes or None))


def shard_batch(batch: Tree, mesh: Mesh, rules: Rules = DEFAULT) -> Tree:
    """The arrays of a batch, divided along their leading axis.

    On several hosts each passes its own rows, and the result is the batch of all of them.

    Raises ConfigError where the rows do not divide.
    """

    def place(rows: Any) -> jax.Array:
        sharding = batch_sharding(mesh, rules, len(rows) * jax.process_count())
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, batch)


def state_shardings(state: Tree, params: Tree, placed: Tree, mesh: Mesh) -> Tree:
    """Shardings for optimiser state (or any state that mirrors parameters), in its structure.

    state: arrays or abstract arrays, such as `jax.eval_shape(optimizer.init, trainable)`.
    placed: the shardings of `params`. An array of the state lies as the parameter whose path ends
    its own path and whose shape it has (Adam's moments, a running average of the weights); every
    other array (counts, keys, factored moments) is whole on every device.
    """
    known = {
        path: (w.shape, sharding)
        for (path, w), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True
        )
    }
    whole = replicated(mesh)

    def place(path: tuple[Any, ...], array: jax.Array) -> NamedSharding:
        tails = (known.get(path[start:]) for start in range(len(path)))
        shape, sharding = next((tail for tail in tails if tail), (None, whole))
        return sharding if shape == array.shape else whole

    return jax.tree_util.tree_map_with_path(place, state)
