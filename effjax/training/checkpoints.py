"""Checkpoints: a folder of steps, each of config, recipe and arrays, committed whole or not at all.

    checkpoints/1000/meta/metadata   JSON: step, config, recipe, data position, what each leaf is
    checkpoints/1000/arrays/         the arrays by path, written by orbax

A state is any tree of arrays, leaf types, typed PRNG keys, Python scalars, `None` and empty nodes.
JSON and arrays only, so that reading a checkpoint never runs code. The config and the recipe say
how to build an abstract template (`jax.eval_shape`), and the template gives the tree its types; the
manifest of leaves in the JSON is what a template is compared with, before any array is read.

Every path of a state is one array: an object that stands at two paths is saved twice and comes back
as two equal arrays. A tie inside a model is one parameter used twice, so it stays one.
"""

import dataclasses
import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from effjax.errors import CheckpointError, ConfigError, near
from effjax.weights import Tree, is_weight
from effjax.weights.trees import glob_to_regex, path_string

FORMAT = 1
"""Raised when a reader of the old layout would misread the new one."""

_SCALARS = (bool, int, float, str)

_STORED_AS = {"uint4": "int4", "uint2": "int2"}
"""Dtypes that the array store lacks, and those of the same bits that stand in for them."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself, in JSON values.

    leaves: for each path of the state, its type (`float32[4,8]`, `key<fry>[]`, `int`, `empty dict`,
        `LowRank(num_inputs=1)`), the value of a Python scalar and the kind of a PRNG key.
    """

    step: int
    config: Any
    recipe: Any
    position: Any
    leaves: dict[str, dict[str, Any]]
    format: int = FORMAT


class Restored(NamedTuple):
    """A state as it was saved, and the paths whose values the template gave instead."""

    state: Tree
    meta: Meta
    fresh: tuple[str, ...]


Builder: TypeAlias = Callable[[Meta], Tree]


def save(
    directory: str | os.PathLike[str],
    step: int,
    state: Tree,
    *,
    config: Any,
    recipe: Sequence[Any] = (),
    position: Any = None,
) -> None:
    """Writes one step and returns when it is committed; until then no reader sees any of it.

    config, recipe, position: JSON values (`effjax.config.to_json`, the transforms' recipe, the
    loader's position).

    Raises CheckpointError when the step could not be written, or is there already.
    """
    step = operator.index(step)
    if step < 0:
        raise ConfigError(f"the step of a checkpoint must be at least 0, got {step}")
    records, leaves = _describe(state)
    meta = Meta(step, config, list(recipe), position, records)
    _require_json(meta)
    folder = _folder(directory) / str(step)
    if folder.exists():
        state_of_it = "already saved" if _is_committed(folder) else "there, but was never committed"
        raise CheckpointError(f"cannot save step {step}: {folder} is {state_of_it}")
    arrays = {path: _encoded(leaf) for path, leaf in leaves.items() if _has_entries(leaf)}
    _write(folder, dataclasses.asdict(meta), arrays)


def restore(
    directory: str | os.PathLike[str],
    template: Tree | Builder,
    step: int | None = None,
    *,
    shardings: Tree | Callable[[Tree], Tree] | None = None,
    skip: str | None = None,
) -> Restored:
    """Reads a step (the latest by default) into the types and places of a template, bit for bit.

    template: the state's tree with arrays or abstract arrays as leaves, or a function of `Meta`
        that makes it: `lambda meta: jax.eval_shape(...)`. Nothing is cast or resized.
    shardings: a tree of shardings, or a prefix of it, or a function of the template. Without one
        an array goes where the template's own is committed, else to the default device.
    skip: a glob of paths (`optimizer/**|key`) that the checkpoint shall not provide: the template's
        values stay there, and what was saved there is left out.

    Raises CheckpointError, path by path, where the state and the template differ: a LoRA added, an
    optimiser changed. To add a transform, restore first and apply it then.
    """
    step = _step(directory, step)
    folder = _folder(directory) / str(step)
    meta = read_meta(directory, step)
    wanted = template(meta) if callable(template) else template
    records, leaves = _describe(wanted)
    skipped = _skipped(skip, {**meta.leaves, **records})
    _require_same(folder, meta.leaves, records, skipped)
    fresh = tuple(path for path in leaves if path in skipped)
    for path in fresh:
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise CheckpointError(f"skip={skip!r} needs a value for {path}, the template has none")
    places = _places(leaves, wanted, shardings(wanted) if callable(shardings) else shardings)
    read = {path: leaf for path, leaf in leaves.items() if path not in skipped}
    values = {**leaves, **_read(folder, meta, read, places)}
    state = jax.tree.unflatten(jax.tree.structure(wanted), list(values.values()))
    return Restored(state, meta, fresh)


def read_meta(directory: str | os.PathLike[str], step: int | None = None) -> Meta:
    """Reads what a step (the latest by default) says of itself, without any array.

    Raises CheckpointError when there is no such step or its JSON cannot be read.
    """
    folder = _folder(directory) / str(_step(directory, step))
    try:
        values = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
        if values["format"] > FORMAT:
            raise ValueError(f"format {values['format']} is newer than this version's {FORMAT}")
        return Meta(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the metadata of {folder}: {error}") from error


def steps(directory: str | os.PathLike[str]) -> tuple[int, ...]:
    """The committed steps of a folder, in order; none where there is no folder."""
    folder = _folder(directory)
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(int(f.name) for f in found if f.name.isdecimal() and _is_committed(f)))


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The last committed step of a folder, or None."""
    return max(steps(directory), default=None)


def _folder(directory: str | os.PathLike[str]) -> Path:
    """The absolute path that orbax asks for."""
    if "://" in os.fspath(directory):
        raise ConfigError(f"checkpoints go to a mounted folder, got the address {directory}")
    return Path(directory).absolute()


def _is_committed(folder: Path) -> bool:
    """Whether orbax finished this step: its last write before the folder gets its name."""
    try:
        outer = json.loads((folder / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
        return bool(outer["commit_timestamp_nsecs"]) and (folder / "meta" / "metadata").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _step(directory: str | os.PathLike[str], step: int | None) -> int:
    known = steps(directory)
    if step is None and known:
        return known[-1]
    if step in known:
        return step
    there = f"committed steps: {', '.join(map(str, known))}" if known else "no committed step there"
    what = "a checkpoint" if step is None else f"step {step}"
    raise CheckpointError(f"cannot find {what} in {_folder(directory)}; {there}")


def _describe(state: Tree) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What stands at each path of a state, and the leaves among that in the tree's own order."""
    records: dict[str, dict[str, Any]] = {}
    leaves: dict[str, Any] = {}

    def visit(path: tuple[Any, ...], node: Any) -> None:
        parts = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda v: v is not node)
        name, is_leaf = path_string(path), bool(parts) and not parts[0][0]
        if is_leaf or not parts or is_weight(node):
            if name in records:
                raise ValueError(f"two leaves of the state have the path {name!r}")
            records[name] = _record(name, node, is_leaf)
        if is_leaf:
            leaves[name] = node
            return
        for key, child in parts:
            visit((*path, *key), child)

    visit((), state)
    return records, leaves


def _record(path: str, node: Any, is_leaf: bool) -> dict[str, Any]:
    """The type of a node as a text, and what of its value JSON holds."""
    kind = type(node).__name__
    if is_weight(node):
        static = [f.name for f in dataclasses.fields(node) if f.metadata.get("static")]
        return {"type": f"{kind}({', '.join(f'{n}={getattr(node, n)}' for n in static)})"}
    if not is_leaf:
        return {"type": "None" if node is None else f"empty {kind}"}
    if type(node) in _SCALARS:
        return {"type": kind, "value": node}
    if not (hasattr(node, "shape") and hasattr(node, "dtype")):
        raise TypeError(f"a checkpoint holds arrays and scalars, {path} is of type {kind}")
    record = {"type": _array_type(node)}
    if _is_key(node) and isinstance(node, jax.Array):
        record["impl"] = str(jax.random.key_impl(node))
    return record


def _array_type(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _has_entries(leaf: Any) -> bool:
    """Whether a leaf goes to the array store, which refuses arrays of size 0."""
    return type(leaf) not in _SCALARS and 0 not in leaf.shape


def _require_json(meta: Meta) -> None:
    for name in ("config", "recipe", "position"):
        try:
            json.dumps(getattr(meta, name))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} of a checkpoint must be JSON: {error}") from None


def _skipped(skip: str | None, known: Mapping[str, Any]) -> set[str]:
    if skip is None:
        return set()
    pattern = glob_to_regex(skip)
    chosen = {path for path in known if pattern.match(path)}
    if not chosen:
        raise ConfigError(
            f"skip={skip!r} matches none of the {len(known)} paths{near(skip, known)}"
        )
    return chosen


def _require_same(
    folder: Path,
    saved: Mapping[str, dict[str, Any]],
    wanted: Mapping[str, dict[str, Any]],
    skipped: set[str],
) -> None:
    """Refuses a template that differs from what was saved, path by path."""
    lines = []
    for path in {**saved, **wanted}:
        have, want = (side.get(path, {}).get("type") for side in (saved, wanted))
        if path in skipped or have == want:
            continue
        if have is None:
            lines.append(f"{path}: fresh, wanted {want}")
        else:
            lines.append(f"{path}: saved {have}, {f'wanted {want}' if want else 'not wanted'}")
    if lines:
        text = "".join(f"\n  {line}" for line in lines)
        raise CheckpointError(f"{folder} differs from its template at {len(lines)} paths:{text}")


def _places(leaves: Mapping[str, Any], template: Tree, shardings: Tree) -> dict[str, Any]:
    """The sharding of each path that has one: as given, or else as the template's own arrays."""
    places = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False):
            places[path] = leaf.sharding

    def spread(path: tuple[Any, ...], sharding: Any, part: Tree) -> None:
        for tail, _ in jax.tree_util.tree_leaves_with_path(part):
            places[path_string((*path, *tail))] = sharding

    is_none = lambda v: v is None  # noqa: E731
    if shardings is not None:
        jax.tree_util.tree_map_with_path(spread, shardings, template, is_leaf=is_none)
    return {path: place for path, place in places.items() if place is not None}


def _encoded(leaf: Any) -> Any:
    """A leaf as an array of a dtype that the array store knows."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    dtype = _STORED_AS.get(str(leaf.dtype))
    return jax.lax.bitcast_convert_type(leaf, jnp.dtype(dtype)) if dtype else leaf


def _decoded(stored: Any, leaf: Any, record: Mapping[str, Any], place: Any) -> Any:
    """The inverse of `_encoded`, in the place and of the kind of the template's leaf."""
    if str(leaf.dtype) in _STORED_AS:
        stored = jax.lax.bitcast_convert_type(jnp.asarray(stored), leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(stored)[()] if isinstance(leaf, np.generic) else np.asarray(stored)
    # A copy, because a donated array must not share memory with numpy's.
    value: Any = jnp.array(stored) if isinstance(stored, np.ndarray) else stored
    if _is_key(leaf):
        value = jax.random.wrap_key_data(value, impl=record["impl"])
    return value if place is None else jax.device_put(value, place)


def _empty(leaf: Any, record: Mapping[str, Any]) -> np.ndarray:
    """What the array store would hold for an array of size 0."""
    if _is_key(leaf):
        words = jax.random.key_data(jax.random.key(0, impl=record["impl"]))
        return np.zeros((*leaf.shape, *words.shape), np.uint32)
    return np.zeros(leaf.shape, _STORED_AS.get(str(leaf.dtype), leaf.dtype))


def _read(
    folder: Path, meta: Meta, leaves: Mapping[str, Any], places: Mapping[str, Any]
) -> dict[str, Any]:
    """The saved values of these leaves."""
    stored = [path for path, leaf in leaves.items() if _has_entries(leaf)]
    arrays = _read_arrays(folder, stored, places) if stored else {}
    values = {}
    for path, leaf in leaves.items():
        record = meta.leaves[path]
        if type(leaf) in _SCALARS:
            values[path] = record["value"]
            continue
        array = arrays[path] if path in arrays else _empty(leaf, record)
        values[path] = _decoded(array, leaf, record, places.get(path))
        if _array_type(values[path]) != record["type"]:
            raise CheckpointError(
                f"{folder}: {path} was saved as {record['type']} and was read as "
                f"{_array_type(values[path])}; 64-bit types need jax_enable_x64"
            )
    return values


def _checkpointer() -> Any:
    """Orbax's synchronous writer: an error anywhere before the commit is raised to the caller."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(
            arrays=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
        )
    )


def _write(folder: Path, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {"meta": ocp.args.JsonSave(meta)}
    if arrays:
        items["arrays"] = ocp.args.PyTreeSave(arrays)
    try:
        with _checkpointer() as writer:
            writer.save(folder, args=ocp.args.Composite(**items))
    except Exception as error:
        raise CheckpointError(f"could not save {folder}: {_first_line(error)}") from error
    if not _is_committed(folder):
        raise CheckpointError(f"could not save {folder}: it was written and is not committed")


def _read_arrays(folder: Path, stored: Sequence[str], places: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by path: in their places, or as numpy where none is given."""
    import orbax.checkpoint as ocp

    args = {
        path: ocp.ArrayRestoreArgs(sharding=places[path])
        if path in places
        else ocp.RestoreArgs(restore_type=np.ndarray)
        for path in stored
    }
    item = ocp.args.PyTreeRestore(item=args, restore_args=args, partial_restore=True)
    try:
        with _checkpointer() as reader:
            return dict(reader.restore(folder, args=ocp.args.Composite(arrays=item)).arrays)
    except Exception as error:
        raise CheckpointError(f"could not read {folder}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
