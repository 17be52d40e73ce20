"""Pixelated butterfly: its pattern, that it is masked dense plus thin factors, and its fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.structured.pixelated_butterfly import flat_butterfly
from effjax.transforms.factorize.pixelated_butterfly import pixelated_butterfly
from effjax.weights import Axes, einsum

SQUARE = {"w": Axes(("embed",), ("mlp",))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fit(w, **options):
    return pixelated_butterfly({"w": jnp.asarray(w)}, SQUARE, **options)["w"]


def mask(blocks, stride, shape):
    """The pattern entry by entry, from the definition: where a butterfly factor is not zero."""
    allowed = np.eye(blocks, dtype=bool)
    for t in range(stride.bit_length()):
        for i in range(blocks):
            allowed[i, i ^ 2**t] = True
    return np.kron(allowed, np.ones((shape[0] // blocks, shape[1] // blocks), bool))


def test_the_pattern_is_the_union_of_a_butterflys_factors():
    for stride in (0, 1, 2, 4):
        pattern = flat_butterfly(8, stride)
        assert np.array_equal(pattern, mask(8, stride, (8, 8)))
        assert (pattern.sum(0) == 1 + stride.bit_length()).all()


def check_masked_dense(w, blocks, stride):
    """x W is x (mask * dense) + (x a) b, and what the mask leaves out is 0."""
    x, pattern = normal(5, w.shape[0], seed=1), mask(blocks, stride, w.shape)
    sparse, a, b = (np.asarray(v, np.float64) for v in (w.sparse(), w.a, w.b))
    assert not sparse[~pattern].any()
    assert (sparse[pattern] != 0).all()
    wanted = x @ (pattern * sparse) + x @ a @ b
    got = np.asarray(einsum("bd,df->bf", jnp.asarray(x), w))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "stride"), [((16, 24), 4), ((24, 8), 1), ((8, 8), 0)])
def test_it_is_masked_dense_plus_thin_factors(shape, stride):
    w = fit(normal(*shape), blocks=8, stride=stride, rank=2)
    check_masked_dense(w, 8, stride)
    slots = 1 + stride.bit_length()
    assert w.multiply_adds == slots * shape[0] * shape[1] // 8 + 2 * sum(shape)


def test_the_law_of_masked_dense_catches_blocks_outside_the_pattern():
    w = fit(normal(16, 24), blocks=8, rank=2)
    with pytest.raises(AssertionError):
        check_masked_dense(w, 8, 2)


def test_the_fit_gets_nearer_with_each_round_and_fits_its_own_blocks():
    w, errors = normal(16, 16), []
    for rounds in (1, 2, 4):
        made = fit(w, blocks=4, rank=3, rounds=rounds)
        errors.append(np.linalg.norm(made.materialize() - w))
    assert errors[0] > errors[1] > errors[2]
    inside = mask(4, 2, w.shape)
    np.testing.assert_allclose(np.asarray(made.materialize())[inside], w[inside], atol=1e-5)
    true = fit(np.where(inside, w, 0), blocks=4, rank=1, rounds=40)
    assert np.linalg.norm(true.materialize() - np.where(inside, w, 0)) < 0.05 * np.linalg.norm(w)
    kept = fit(w, blocks=4, rank=1, stride=0, keep_norm=True)
    np.testing.assert_allclose(np.linalg.norm(kept.materialize()), np.linalg.norm(w), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 3}, "blocks must be a power of two, got 3"),
        ({"blocks": 1}, "blocks must be an integer of at least 2, got 1"),
        ({"blocks": 16}, "blocks must divide 16 inputs and 24 outputs, got 16; at most 8"),
        ({"blocks": 8, "stride": 3}, "stride must be a power of two, got 3"),
        ({"blocks": 8, "stride": 8}, r"stride .* at most 4 \(half of blocks\), got 8"),
        ({"blocks": 8, "rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"blocks": 8, "rank": 17}, "rank must be .* at most 16"),
    ],
)
def test_what_has_no_such_pattern_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"pixelated_butterfly.*{message}"):
        fit(normal(16, 24), **({"rank": 1} | arguments))
