"""Layer surgery moves layers and changes nothing in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.transforms.grow import keep_layers, split_runs
from effjax.transforms.prune.magnitude import magnitude
from effjax.weights import Axes, Masked, dense

UNIT = {"kernel": Axes(("embed",), ("ff",), ("layers",)), "scale": Axes((), ("ff",), ("layers",))}


def axes_of(params):
    return {"stack": {"runs": dict.fromkeys(params["stack"]["runs"], UNIT)}}


def example(layers=12):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(layers, 4, 4)), jnp.float32)
    unit = {"kernel": kernel, "scale": jnp.arange(layers)[:, None] * jnp.ones((1, 4))}
    return {"stack": {"runs": {"000": unit}}}


def order(params):
    """Which layer stands where, in the order in which JAX visits the runs."""
    runs = jax.tree.leaves({n: u["scale"] for n, u in params["stack"]["runs"].items()})
    return [int(v) for run in runs for v in run[:, 0]]


def split(params, at):
    return split_runs(params, axes_of(params), at=at)


def keep(params, layers):
    return keep_layers(params, axes_of(params), layers=layers)


def test_twelve_layers_split_into_twelve_runs_stay_in_order():
    """Keys are padded, because JAX orders them as text: "10" stands before "9"."""
    runs = split(example(), list(range(1, 12)))
    assert sorted(runs["stack"]["runs"]) == [f"{i:03d}" for i in range(12)]
    assert order(runs) == list(range(12))
    unpadded = {str(int(name)): unit for name, unit in runs["stack"]["runs"].items()}
    assert order({"stack": {"runs": unpadded}}) != list(range(12))


def test_splits_cut_where_they_say_and_only_there():
    runs = split(example(), [3, 8])
    assert [len(u["scale"]) for u in runs["stack"]["runs"].values()] == [3, 5, 4]
    again = split(runs, [3, 10])
    assert [len(u["scale"]) for u in again["stack"]["runs"].values()] == [3, 5, 2, 2]
    assert order(again) == list(range(12))


@pytest.mark.parametrize("layers", [[0, 1, 2], [11, 0], [0, 0, 5, 5], [4, 3, 2, 1]])
def test_kept_layers_stand_in_the_order_given(layers):
    assert order(keep(example(), layers)) == layers
    pieces = keep(split(example(), [4]), layers)
    assert order(pieces) == layers


def test_leaves_are_cut_with_their_layers():
    params = example()
    params = magnitude(params, axes_of(params), sparsity=0.5)
    whole = dense(params["stack"]["runs"]["000"]["kernel"])
    last = split(params, [3])["stack"]["runs"]["001"]["kernel"]
    assert isinstance(last, Masked)
    assert np.array_equal(dense(last), whole[3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: split(p, [0]), "split_runs: at must be .* at least 1 and at most 11, got 0"),
        (lambda p: split(p, [12]), "at most 11, got 12"),
        (lambda p: split(p, [1.5]), "split_runs: at must be an integer"),
        (lambda p: keep(p, []), "keep_layers: layers must name at least one layer"),
        (lambda p: keep(p, [12]), "keep_layers: layers must be .* at most 11, got 12"),
        (lambda p: keep(p, [-1]), "at least 0 and at most 11, got -1"),
        (
            lambda p: keep_layers(p, axes_of(p), layers=[0], stack="stakc"),
            "keep_layers: no stack 'stakc' in .*; did you mean 'stack'?",
        ),
        (
            lambda p: keep_layers(
                p, {"stack": {"runs": {"000": {"w": Axes(outputs=("ff",))}}}}, layers=[0]
            ),
            "a weight of 'stack' has no leading layers",
        ),
    ],
)
def test_bad_surgery_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change(example())
