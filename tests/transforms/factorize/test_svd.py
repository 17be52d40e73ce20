"""Truncated SVD against numpy's, and the plans of ranks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.memory import stored_bytes
from effjax.errors import ConfigError
from effjax.transforms.adapt.lora import lora
from effjax.transforms.factorize.svd import choose_ranks, svd
from effjax.weights import Axes

HEADS = Axes(("heads", "head"), ("embed",), ("layers",))
AXES = {"heads": HEADS, "table": Axes(("vocab",), ("embed",), lookup=True)}


def example():
    rng = np.random.default_rng(0)
    return {
        "heads": jnp.asarray(rng.normal(size=(2, 3, 4, 9)), jnp.float32),
        "table": jnp.asarray(rng.normal(size=(7, 9)), jnp.float32),
    }


def values(w):
    """Singular values of every layer, in float64."""
    layers = np.asarray(w, np.float64).reshape(-1, *(w.shape if w.ndim == 2 else (12, 9)))
    return np.linalg.svd(layers, compute_uv=False)


def check_error(w, factored, rank):
    """Eckart-Young: the squared error is what the singular values left out say, for each layer."""
    wrong = (np.asarray(factored.materialize(), np.float64) - np.asarray(w)).reshape(2, -1)
    left_out = np.sqrt((values(w)[:, rank:] ** 2).sum(axis=-1))
    np.testing.assert_allclose(np.linalg.norm(wrong, axis=-1), left_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_the_least_that_the_rank_allows(rank):
    params = example()
    factored = svd(params, AXES, rank=rank, where="heads")["heads"]
    check_error(params["heads"], factored, rank)
    assert factored.a.shape == (2, 3, 4, rank)
    assert factored.b.shape == (2, rank, 9)
    assert stored_bytes(factored) == 2 * rank * (12 + 9) * 4
    sides = [np.linalg.norm(v.reshape(2, -1), axis=-1) for v in (factored.a, factored.b)]
    np.testing.assert_allclose(*sides, rtol=1e-5)


def test_error_law_catches_the_wrong_directions():
    params = example()
    factored = svd(params, AXES, rank=4, where="heads")["heads"]
    with pytest.raises(AssertionError):
        check_error(params["heads"], factored.replaced(b=factored.b[:, ::-1]), 4)
    with pytest.raises(AssertionError):
        check_error(params["heads"], factored, 3)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_ranks_for_energy_are_the_least(energy):
    params = example()
    plan = choose_ranks(params, AXES, energy=energy)
    assert json.loads(json.dumps(plan)) == plan
    for name, w in params.items():
        power = np.cumsum(values(w) ** 2, axis=-1)
        share = power / power[:, -1:]
        assert np.all(share[:, plan[name] - 1] >= energy - 1e-6)
        assert plan[name] == 1 or np.any(share[:, plan[name] - 2] < energy)


def test_ranks_for_a_ratio_keep_that_share_of_the_numbers():
    plan = choose_ranks(example(), AXES, ratio=0.5)
    assert plan == {"heads": int(0.5 * 12 * 9 / 21), "table": int(0.5 * 7 * 9 / 16)}
    assert choose_ranks(example(), AXES, ratio=0.01) == {"heads": 1, "table": 1}


def test_a_plan_is_what_svd_follows():
    params = example()
    result = svd(params, AXES, ranks={"heads": 2})
    assert result["heads"].a.shape[-1] == 2
    assert result["table"] is params["table"]
    adapted = lora(params, AXES, rank=1, alpha=1.0)
    assert choose_ranks(adapted, AXES, ratio=0.5) == choose_ranks(params, AXES, ratio=0.5)


def test_bfloat16_weights_keep_their_dtype():
    params = {"table": example()["table"].astype(jnp.bfloat16)}
    factored = svd(params, {"table": AXES["table"]}, rank=7)["table"]
    assert factored.a.dtype == factored.b.dtype == factored.dtype == jnp.bfloat16
    wanted = np.asarray(params["table"], np.float32)
    np.testing.assert_allclose(np.asarray(factored.materialize(), np.float32), wanted, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "svd: give either rank or ranks"),
        ({"rank": 2, "ranks": {"heads": 1}}, "svd: give either rank or ranks"),
        ({"rank": 0}, "svd: rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"rank": 8}, r"svd at 'table': rank must be .* at most 7 \(7 inputs, 9 outputs\), got 8"),
        ({"ranks": {"head": 1}}, "ranks names no weight 'head'; did you mean 'heads'?"),
        ({"ranks": {}}, "ranks must name at least one weight"),
        ({"ranks": {"heads": "2"}}, "svd at 'heads': rank must be an integer"),
    ],
)
def test_bad_ranks_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        svd(example(), AXES, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"energy": 0.9, "ratio": 0.5}, {"energy": 0}, {"ratio": 1.5}, {"energy": np.nan}],
)
def test_bad_plans_are_refused(arguments):
    with pytest.raises(ConfigError, match="choose_ranks: "):
        choose_ranks(example(), AXES, **arguments)


def test_a_plan_needs_values():
    with pytest.raises(TypeError, match="reads values"):
        jax.eval_shape(lambda p: choose_ranks(p, AXES, ratio=0.5), example())
