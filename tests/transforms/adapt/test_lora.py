"""LoRA: starts as the base, merges into it once, draws as its code does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.errors import ConfigError
from effjax.transforms.adapt.lora import adapters, lora, merge
from effjax.transforms.quantize.round_to_nearest import round_to_nearest
from effjax.weights import Axes, LowRank, combine, partition

AXES = {
    "kernel": Axes(("embed",), ("ff",), ("layers",)),
    "table": Axes(("vocab",), ("embed",), lookup=True),
    "norm": Axes(outputs=("embed",)),
}


def example(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(0.02 * rng.normal(size=(2, 16, 12)), dtype),
        "table": jnp.asarray(rng.normal(size=(24, 16)), dtype),
        "norm": jnp.ones(16),
    }


def adapted(dtype=jnp.float32, base=lambda params: params):
    """The example with an update as training leaves it."""
    params = lora(base(example(dtype)), AXES, rank=4, alpha=8.0)
    rng = np.random.default_rng(1)
    w = params["kernel"]
    b = jnp.asarray(0.01 * rng.normal(size=w.b.shape), jnp.float32)
    return params | {"kernel": w.replaced(b=b)}


def test_the_update_starts_at_zero_with_the_draws_of_its_code():
    params = lora(example(), AXES, rank=4, alpha=8.0)
    kernel, table = params["kernel"], params["table"]
    assert kernel.scale.tolist() == [2.0, 2.0]
    assert table.scale.shape == ()
    assert not kernel.b.any()
    assert not table.a.any()
    bound = 1 / 16**0.5
    assert 0.9 * bound < np.abs(kernel.a).max() <= bound
    assert abs(np.std(kernel.a) - bound / 3**0.5) < 0.03
    assert abs(np.std(table.b) - 1) < 0.3
    assert params["norm"] is not None
    assert {kernel.a.dtype, kernel.b.dtype, kernel.scale.dtype} == {jnp.dtype("float32")}


def test_adapters_alone_are_trained():
    params = lora(example(), AXES, rank=4, alpha=8.0, where="kernel")
    trainable, frozen = partition(params, AXES, adapters)
    assert [v.shape for v in jax.tree.leaves(trainable)] == [(2, 16, 4), (2, 4, 12)]
    assert frozen["norm"] is params["norm"]
    assert frozen["kernel"].base is params["kernel"].base
    assert combine(trainable, frozen)["kernel"].a is params["kernel"].a


def wanted(w, scale):
    a, b = (np.asarray(v, np.float64) for v in (w.a, w.b))
    update = np.stack([scale * x @ y for x, y in zip(a, b, strict=True)])
    base = w.base if not isinstance(w.base, LowRank) else None
    return np.asarray(base.astype(jnp.float32), np.float64) + update


def test_merging_is_the_sum_in_float64():
    params = adapted()
    merged = merge(params, AXES, where="kernel")
    got = np.asarray(merged["kernel"], np.float64)
    right = wanted(params["kernel"], 2.0)
    assert np.abs(got - right).max() <= 1e-6 * np.abs(right).max()
    assert isinstance(merged["table"], LowRank)
    with pytest.raises(AssertionError):  # a wrong scale does not pass
        assert np.abs(got - wanted(params["kernel"], 1.9)).max() <= 1e-6 * np.abs(right).max()


def at(w, layer):
    return jax.tree.map(lambda v: v[layer], w)


def test_merged_computes_what_the_adapter_did():
    params = adapted()
    merged = merge(params, AXES)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 16)), jnp.float32)
    for layer in range(2):
        one, other = (at(p["kernel"], layer) for p in (params, merged))
        y = effjax.einsum("bd,df->bf", x, other)
        np.testing.assert_allclose(y, effjax.einsum("bd,df->bf", x, one), rtol=1e-4, atol=1e-6)


def test_bfloat16_is_cast_once_through_two_updates():
    params = lora(adapted(jnp.bfloat16), AXES, rank=2, alpha=2.0, where="kernel")
    outer = params["kernel"]
    b = jnp.asarray(0.01 * np.random.default_rng(3).normal(size=outer.b.shape), jnp.float32)
    outer = outer.replaced(b=b)
    merged = merge(params | {"kernel": outer}, AXES, where="kernel")["kernel"]
    assert merged.dtype == jnp.bfloat16
    a, b = (np.asarray(v, np.float64) for v in (outer.a, outer.b))
    right = wanted(outer.base, 2.0) + np.stack([x @ y for x, y in zip(a, b, strict=True)])
    exact = np.asarray(jnp.asarray(right, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))
    got = np.asarray(merged.astype(jnp.float32))
    assert np.mean(got == exact) > 0.99  # float32 and float64 sums may straddle a rounding point
    assert np.all(np.abs(got - right) <= np.abs(right) * 2**-8 * 1.001 + 1e-9)
    twice = outer.materialize().astype(jnp.float32)  # casts after each update
    assert np.mean(np.asarray(twice) == exact) < 0.99


def test_an_update_on_codes_merges_into_a_dense_weight():
    params = adapted(base=lambda p: round_to_nearest(p, AXES, bits=4))
    merged = merge(params, AXES, where="kernel")["kernel"]
    np.testing.assert_allclose(merged, params["kernel"].materialize(), rtol=1e-6)


def test_merging_what_has_no_update_is_refused():
    params = lora(example(), AXES, rank=4, alpha=8.0, where="kernel")
    with pytest.raises(ConfigError, match="merge at 'table': no update to merge"):
        merge(params, AXES, where="table|kernel")
    merged = merge(params, AXES)
    with pytest.raises(ConfigError, match="merged already"):
        merge(merged, AXES)
    with pytest.raises(ConfigError, match="merge at 'kernel': no update to merge"):
        merge(
            params | {"kernel": merged["kernel"], "table": adapted()["table"]}, AXES, where="kernel"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "lora: rank must be an integer of at least 1, got 0"),
        ({"rank": 13}, r"lora at 'kernel': rank .* at most 12 \(16 inputs, 12 outputs\), got 13"),
        ({"alpha": 0}, r"lora: alpha must be in \(0, inf\), got 0"),
        ({"alpha": float("nan")}, r"alpha must be in \(0, inf\), got nan"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        lora(example(), AXES, **({"rank": 2, "alpha": 1.0} | arguments))
