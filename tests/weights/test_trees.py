"""Paths, what `where` selects, and the split of a tree."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from effjax.errors import ConfigError
from effjax.weights import (
    Axes,
    LowRank,
    Masked,
    Quantized,
    ideal,
    map_where,
    named_axes,
    partition,
    paths,
    project,
)

PATHS = [
    "embed/weight",
    "stack/runs/000/attention_00/mixer/k/kernel",
    "stack/runs/000/attention_00/mixer/q/kernel",
    "stack/runs/000/attention_00/norm/scale",
    "stack/runs/001/attention_00/mixer/q/kernel",
]


def build(leaf_at):
    tree = {}
    for path in PATHS:
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf_at(path)
    return tree


def axes_at(path):
    if path.endswith("scale"):
        return Axes(outputs=("embed",))
    return Axes(("embed",), ("ff",), lookup=path.startswith("embed"))


PARAMS = build(lambda path: jnp.ones(4) if path.endswith("scale") else jnp.ones((4, 4)))
AXES = build(axes_at)


def selected(where):
    hits = []
    map_where(lambda path, w, axes: hits.append(path) or w, PARAMS, AXES, where)
    return hits


def test_paths_stop_at_leaves():
    params = PARAMS | {"embed": {"weight": Quantized(jnp.ones((4, 4), jnp.int8), jnp.ones((4, 1)))}}
    assert paths(params) == paths(PARAMS) == PATHS


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (None, [0, 1, 2, 4]),
        ("**", [0, 1, 2, 3, 4]),
        ("embed/weight", [0]),
        ("embed/*", [0]),
        ("*/weight", [0]),
        ("**/kernel", [1, 2, 4]),
        ("**/q/kernel", [2, 4]),
        ("**/[qv]/kernel", [2, 4]),
        ("**/?/kernel", [1, 2, 4]),
        ("stack/runs/000/**", [1, 2, 3]),
        ("stack/runs/*/attention_00/norm/scale", [3]),
        ("embed/*|**/k/*", [0, 1]),
        ("**/00?/**/q/kernel", [2, 4]),
        (lambda path, w, axes: axes.lookup, [0]),
        (lambda path, w, axes: w.ndim == 1, [3]),
    ],
)
def test_where_selects(where, chosen):
    assert selected(where) == [PATHS[i] for i in chosen]


@pytest.mark.parametrize(
    ("where", "near"),
    [
        ("embed/wieght", "embed/weight"),
        ("stack/*/kernel", "stack/runs/00"),  # one star stays inside a segment
        ("kernel", "kernel"),
        ("embed/weigh", "embed/weight"),  # a glob matches whole paths
        ("embed.weight", "embed/weight"),  # a dot is a dot
        ("", ""),
    ],
)
def test_no_match_is_an_error_with_near_paths(where, near):
    for f in (selected, lambda where: partition(PARAMS, AXES, where)):
        with pytest.raises(ConfigError, match=f"matches none of the 5 weights; near: .*{near}"):
            f(where)


def test_unselected_weights_are_the_same_objects():
    doubled = map_where(lambda path, w, axes: 2 * w, PARAMS, AXES, "embed/*")
    assert doubled["embed"]["weight"][0, 0] == 2
    assert (
        doubled["stack"]["runs"]["001"]["attention_00"]["mixer"]["q"]["kernel"]
        is (PARAMS["stack"]["runs"]["001"]["attention_00"]["mixer"]["q"]["kernel"])
    )


def test_constants_are_never_trained_even_when_named():
    axes = {"decay": Axes(batch=("layers",), constant=True), "scale": Axes(outputs=("embed",))}
    params = {"decay": jnp.ones(2), "scale": jnp.ones(4)}
    trainable, frozen = partition(params, axes, "**")
    assert trainable == {"decay": None, "scale": params["scale"]}
    assert frozen == {"decay": params["decay"], "scale": None}
    with pytest.raises(ConfigError, match="none of the 2"):
        partition(params, axes, "decay")


def test_project_and_ideal_reach_every_leaf():
    mask = jnp.array([[True, False], [False, True]])
    w = Masked(jnp.full((2, 2), 3.0), mask)
    params = {"plain": jnp.ones(3), "deep": {"w": w}}
    assert project(params)["deep"]["w"].base.tolist() == [[3, 0], [0, 3]]
    assert project(params)["plain"] is params["plain"]
    stored = ideal(params)["deep"]["w"]
    assert [stored["values"].shape, stored["bits"].shape] == [(2,), (1,)]


def test_names_of_a_tree():
    base = Quantized(jnp.ones((2, 8, 4), jnp.int4), jnp.ones((2, 2, 4)))
    w = LowRank(base, jnp.ones((2, 8, 3)), jnp.ones((2, 3, 4)), jnp.ones(2))
    axes = Axes(("embed",), ("ff",), ("layers",))
    names = named_axes({"w": w, "v": jnp.ones(4)}, {"w": axes, "v": Axes(outputs=("ff",))})
    assert names["v"] == PartitionSpec("ff")
    assert names["w"].a == PartitionSpec("layers", "embed", "rank")
    assert names["w"].base.scale == PartitionSpec("layers", "embed", "ff")
    assert jax.tree.structure(names["w"]) == jax.tree.structure(w)
