"""2:4: exactly two of every four, the two largest, stored so that they come back exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effjax.cost.memory import stored_bytes
from effjax.errors import ConfigError
from effjax.transforms.prune.semi_structured import semi_structured
from effjax.weights import Axes

AXES = {"w": Axes(("embed",), ("ff",))}
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e-40, 1.0, -1.0, 0.5, 1e4]
VALUES = st.sampled_from(SPECIAL) | st.floats(-1e4, 1e4, width=32)
WEIGHTS = arrays(np.float32, (8, 3), elements=VALUES) | VALUES.map(
    lambda value: np.full((8, 3), value, np.float32)
)


def by_sorting(w):
    """The kept values of every four rows: of equals, the earlier entry goes first."""
    kept = np.zeros_like(w)
    for start in range(0, w.shape[0], 4):
        for column in range(w.shape[1]):
            four = w[start : start + 4, column]
            for i in np.argsort(np.abs(four), kind="stable")[2:]:
                kept[start + i, column] = four[i]
    return kept


def check(w, pruned):
    index = np.asarray(pruned.index.astype(jnp.int32))
    assert pruned.values.shape == (4, 3)
    assert index.shape == (2, 3)
    assert np.all(index % 4 < index // 4)  # two of the four, in order
    assert np.asarray(pruned.materialize()).tobytes() == by_sorting(w).tobytes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(w=WEIGHTS)
def test_the_two_largest_of_every_four_stay(w):
    check(w, semi_structured({"w": jnp.asarray(w)}, AXES)["w"])


@pytest.mark.parametrize("fault", ["order", "neighbours"])
def test_two_of_four_law_catches(fault):
    """Planted faults: positions out of order, fours that straddle their groups."""
    w = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    pruned = semi_structured({"w": jnp.asarray(w)}, AXES)["w"]
    if fault == "order":
        code = pruned.index.astype(jnp.int32)
        pruned = pruned.replaced(index=(code // 4 + 4 * (code % 4)).astype(jnp.uint4))
    else:
        pruned = semi_structured({"w": jnp.roll(jnp.asarray(w), 2, axis=0)}, AXES)["w"]
        w = np.roll(w, 2, axis=1)
    with pytest.raises(AssertionError):
        check(w, pruned)


@pytest.mark.parametrize(
    ("axes", "shape", "axis"),
    [
        (Axes(("heads", "head"), ("embed",), ("layers",)), (2, 3, 4, 5), -2),
        (Axes(("embed",), ("heads", "head")), (8, 3, 5), -3),
        (Axes(("vocab",), ("embed",), lookup=True), (5, 8), -1),
    ],
)
def test_fours_run_where_the_axes_say(axes, shape, axis):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pruned = semi_structured({"w": jnp.asarray(w)}, {"w": axes})["w"]
    assert pruned.axis == axis
    columns = np.moveaxis(w, axis, 0).reshape(shape[axis], -1)
    whole = np.moveaxis(np.asarray(pruned.materialize()), axis, 0).reshape(shape[axis], -1)
    assert np.array_equal(whole, by_sorting(columns))


def test_it_stores_half_the_values_and_a_bit_for_each_entry():
    pruned = semi_structured({"w": jnp.ones((64, 32))}, AXES)["w"]
    assert stored_bytes(pruned) == 64 * 32 * 4 // 2 + 64 * 32 // 8
    assert pruned.saving == "realised"


def test_an_axis_that_four_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="at 'w': 4 must divide embed, got embed=6"):
        semi_structured({"w": jnp.ones((6, 4))}, AXES)
