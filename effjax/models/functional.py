"""From a Flax module to pure functions of a plain dict: the border that Flax does not cross."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import jax
from flax import nnx

from effjax.errors import ConfigError
from effjax.weights import Tree

Path = tuple[Any, ...]


class Functional(NamedTuple):
    """What `functional` returns; it unpacks as `init, apply, axes_of`."""

    init: Callable[[jax.Array], Tree]
    apply: Callable[..., Any]
    axes_of: Callable[[Tree], Tree]


class Keys(nnx.Rngs):
    """`nnx.Rngs` with the same keys, fold_in(key, 0), fold_in(key, 1), ..., counted in Python.

    Flax counts in an array: while a model is traced, each of its keys costs milliseconds.
    """

    def __init__(self, key: jax.Array):
        super().__init__(key)
        self.default = _Stream(key, tag="default")


class _Stream(nnx.RngStream):
    """Flax's only stream here: modules that keep it are refused as they were."""

    def __init__(self, key: jax.Array, *, tag: str):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key


def functional(build: Callable[[Keys], nnx.Module]) -> Functional:
    """Turns `build(keys) -> module` into `(init, apply, axes_of)` over plain nested dicts.

    init(key): the parameters. Works under `jit`, `vmap` and `jax.eval_shape`, so that the shapes
        of a model too big for the machine cost nothing.
    apply(params, *args, method="__call__", **kwargs): calls the module with `params` in place.
        Any leaf or subtree may sit where a Param was declared: values go back path by path.
    axes_of(params): a dict of the params' shape with the `Axes` of every weight.

    Call it once per model: each call makes new functions, and so a new jit cache.
    Raises TypeError for a module that holds variables other than `nnx.Param` (dropout counters,
    batch statistics: state goes through arguments here) or a Param without `axes`. `apply` and
    `axes_of` raise ValueError for params that lack a declared name or have another beside them.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(Keys(jax.random.key(0)))))
    declared = list(nnx.to_flat_state(abstract))
    _refuse_undeclared(declared)
    names = _nest(declared)

    def init(key: jax.Array) -> Tree:
        flat = nnx.to_flat_state(nnx.state(build(Keys(key))))
        return _nest([(path, variable.get_value()) for path, variable in flat])

    def apply(params: Tree, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        _require_names(names, params)
        flat = [(path, variable.replace(_at(params, path))) for path, variable in declared]
        module = nnx.merge(graph, nnx.from_flat_state(flat))
        if not hasattr(module, method):
            raise ConfigError(f"apply: {type(module).__name__} has no method {method!r}")
        return getattr(module, method)(*args, **kwargs)

    def axes_of(params: Tree) -> Tree:
        _require_names(names, params)
        flat = [(path, _axes(variable, _at(params, path))) for path, variable in declared]
        return _nest(flat)

    return Functional(init, apply, axes_of)


class Constant(nnx.Param):
    """An array that is pruned, sharded and saved with its axis but never trained (a decay)."""


class RunsAxes(tuple):
    """The axes of one unit of a stack, as (path, Axes) pairs: metadata must be hashable."""


def _axes(variable: Any, value: Tree) -> Any:
    axes = variable.get_metadata()["axes"]
    if isinstance(axes, RunsAxes):
        return {run: _nest(axes) for run in value}
    if isinstance(variable, Constant):
        return replace(axes, constant=True)
    return axes


def _refuse_undeclared(declared: list[tuple[Path, Any]]) -> None:
    for path, variable in declared:
        name, kind = "/".join(map(str, path)), type(variable).__name__
        if not isinstance(variable, nnx.Param):
            raise TypeError(f"functional() takes modules of nnx.Param only, got {kind} at {name!r}")
        if "axes" not in variable.get_metadata():
            raise TypeError(
                f"{kind} {name!r} must declare its axes: nnx.Param(value, axes=Axes(...))"
            )


def _require_names(names: Tree, params: Tree, path: str = "params") -> None:
    """Refuses a missing name, and one too many: what no module reads would be lost in silence."""
    if not isinstance(names, dict):
        return
    got = sorted(params) if isinstance(params, dict) else type(params).__name__
    if got != sorted(names):
        raise ValueError(f"{path} must have the names {sorted(names)}, got {got}")
    for name, inner in names.items():
        _require_names(inner, params[name], f"{path}/{name}")


def _nest(flat: Any) -> Tree:
    tree: dict[str, Any] = {}
    for path, value in flat:
        *parents, name = map(str, path)
        reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = value
    return tree


def _at(tree: Tree, path: Path) -> Any:
    return reduce(lambda node, key: node[str(key)], path, tree)
