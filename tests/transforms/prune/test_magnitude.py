"""L17: exact counts and the order of ties, against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from effjax.errors import ConfigError
from effjax.transforms.prune.magnitude import magnitude
from effjax.weights import Axes

AXES = {"w": Axes(("embed",), ("ff",))}
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e-40, -1e-40, 1.0, -1.0, 0.5, 1e4, 3e38]
VALUES = st.sampled_from(SPECIAL) | st.floats(-1e4, 1e4, width=32)
WEIGHTS = arrays(np.float32, (7, 3), elements=VALUES) | VALUES.map(
    lambda value: np.full((7, 3), value, np.float32)
)
SPARSITIES = [0, 0.1, 0.5, 0.75, 0.99]


def prune(w, sparsity):
    return magnitude({"w": w}, AXES, sparsity=sparsity)["w"]


def pruned_by_sorting(w, count):
    """The mask of a stable sort: of equals, the earlier entry goes first."""
    mask = np.ones(w.size, bool)
    mask[np.argsort(np.abs(w).ravel(), kind="stable")[:count]] = False
    return mask.reshape(w.shape)


def check(w, pruned, sparsity):
    mask = np.asarray(pruned.mask)
    assert (~mask).sum() == round(sparsity * w.size)
    assert np.array_equal(mask, pruned_by_sorting(w, round(sparsity * w.size)))
    values = np.asarray(pruned.base)
    assert values.tobytes() == np.where(mask, w, np.float32(0)).tobytes()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(w=WEIGHTS)
def test_the_smallest_go_and_no_others(sparsity, w):
    check(w, prune(jnp.asarray(w), sparsity), sparsity)


@pytest.mark.parametrize("fault", ["threshold", "last of ties", "off by one"])
def test_pruning_law_catches(fault):
    """Planted faults: a threshold that takes all ties, ties from the end, one entry too many."""
    w = np.round(np.random.default_rng(0).normal(size=(7, 3)) * 2).astype(np.float32)
    pruned = prune(jnp.asarray(w), 0.5)
    order = np.sort(np.abs(w).ravel())
    mask = {
        "threshold": np.abs(w) >= order[10],
        "last of ties": pruned_by_sorting(w[::-1, ::-1], 10)[::-1, ::-1],
        "off by one": pruned_by_sorting(w, 11),
    }[fault]
    with pytest.raises(AssertionError):
        check(w, pruned.replaced(mask=jnp.asarray(mask), base=jnp.where(mask, w, 0)), 0.5)


def test_half_precision_ties():
    """bfloat16 has few values, so most thresholds are ties."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 30)), jnp.bfloat16)
    pruned = prune(w, 0.5)
    wide = np.asarray(w.astype(jnp.float32))
    assert np.array_equal(pruned.mask, pruned_by_sorting(wide, 105))
    assert pruned.base.dtype == jnp.bfloat16


def test_a_long_weight_is_counted_exactly():
    w = np.random.default_rng(0).integers(-3, 4, size=(300, 1001)).astype(np.float32)
    check(w, prune(jnp.asarray(w), 0.37), 0.37)


def test_pruning_again_only_prunes_further():
    w = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    w[0] = 0  # zeros that were kept are worth more than what was pruned
    half = prune(jnp.asarray(w), 0.5)
    trained = half.replaced(base=half.base + 5)  # a step that forgot to project
    for sparsity in (0.3, 0.5, 0.75):
        again = prune(trained, sparsity)
        assert not np.any(np.asarray(again.mask) & ~np.asarray(half.mask))
        assert (~np.asarray(again.mask)).sum() == max(round(sparsity * 21), 10)
        assert np.all(np.asarray(again.base)[~np.asarray(again.mask)] == 0)


def test_memory_is_a_layer_not_a_stack():
    """No sort and no copy of the stack: temporaries stay near one layer's keys."""
    axes = {"w": AXES["w"].stacked()}
    w = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)
    compiled = jax.jit(lambda w: magnitude({"w": w}, axes, sparsity=0.5)).lower(w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 64 * 4


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), float("inf"), "0.5", True, None])
def test_bad_sparsity_is_refused(sparsity):
    with pytest.raises(ConfigError, match=r"magnitude: sparsity must be in \[0, 1\), got"):
        prune(jnp.ones((2, 2)), sparsity)
