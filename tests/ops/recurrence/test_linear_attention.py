"""Linear attention, causal and two-sided, against the quadratic form in numpy and its gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.ops.recurrence.linear_attention import (
    elu_features,
    linear_attention,
    linear_attention_state,
    two_sided_flops,
    two_sided_linear_attention,
)

B, T, N, H, HV = 2, 13, 2, 4, 3
# Documents end inside chunks of 4, at their edges and beyond them; padding anywhere.
SEGMENTS = np.array([[1] * 3 + [2] * 10, [1] * 1 + [2] * 3 + [3] * 9], np.int32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
POSITIONS[0, [0, 7]] = POSITIONS[1, [8, 12]] = -1
PLAIN = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.zeros((B, T), np.int32)
WHERE = {"packed": (POSITIONS, SEGMENTS), "plain": PLAIN}


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, N, H), (B, T, N, HV)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def seen(positions, segments, causal: bool) -> np.ndarray:
    live = positions >= 0
    same = segments[:, :, None] == segments[:, None, :]
    return same & live[:, :, None] & live[:, None, :] & (np.tri(T, dtype=bool) | (not causal))


def plain(q, k, v, where, causal: bool, numpy=np):
    """Every pair of tokens, in the inputs' dtype."""
    phi = [numpy.where(x > 0, x + 1, numpy.exp(numpy.where(x > 0, 0, x))) for x in (q, k)]
    weights = numpy.einsum("btnh,bsnh->btsn", *phi) * seen(*where, causal)[..., None]
    total = weights.sum(axis=2)
    return numpy.einsum("btsn,bsnv->btnv", weights, v) / numpy.where(total > 0, total, 1)[..., None]


@cache
def program(causal: bool):
    """y and the gradients of a weighed sum of it."""

    def total(q, k, v, positions, segments):
        at = {"positions": positions, "segments": segments, "chunk": 4}
        y = (
            linear_attention(q, k, v, **at)[0]
            if causal
            else two_sided_linear_attention(q, k, v, **at)
        )
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def near(got, want, tolerance: float) -> None:
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("at", WHERE)
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_every_pair_of_tokens(causal, at):
    q, k, v = (x.copy() for x in inputs())
    want = plain(q, k, v, WHERE[at], causal)
    for x in (q, k, v):
        x[WHERE[at][0] < 0] = np.nan
    (_, y), gradients = program(causal)(q, k, v, *WHERE[at])
    near(y, want, 5e-6)
    assert all((g[WHERE[at][0] < 0] == 0).all() for g in map(np.asarray, gradients))


def test_the_comparison_catches_a_forgotten_document():
    (_, y), _ = program(False)(*inputs(), POSITIONS, np.zeros_like(SEGMENTS))
    with pytest.raises(AssertionError):
        near(y, plain(*inputs(), WHERE["packed"], False), 1e-3)


def test_two_sided_gradients_are_those_of_every_pair():
    _, got = program(False)(*inputs(), *WHERE["packed"])
    with jax.enable_x64(True):

        @jax.jit
        @partial(jax.grad, argnums=(0, 1, 2))
        def slow(q, k, v):
            y = plain(q, k, v, WHERE["packed"], False, jnp)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        wants = slow(*(x.astype(np.float64) for x in inputs()))
    for g, want in zip(got, wants, strict=True):
        near(g, want, 2e-5)


def test_an_aligned_row_is_one_sum():
    aligned = jax.jit(partial(two_sided_linear_attention, aligned=True))
    y = aligned(*inputs(), positions=PLAIN[0], segments=PLAIN[1])
    near(y, plain(*inputs(), PLAIN, False), 5e-6)


def test_token_by_token_is_the_whole():
    step = jax.jit(linear_attention)
    state, made = linear_attention_state(B, N, H, HV), []
    for t in range(T):
        x = (x[:, t : t + 1] for x in inputs())
        at = (x[:, t : t + 1] for x in WHERE["packed"])
        y, state = step(*x, **dict(zip(("positions", "segments"), at, strict=True)), state=state)
        made.append(y)
    near(np.concatenate(made, axis=1), plain(*inputs(), WHERE["packed"], True), 1e-5)
    assert state["S"].shape == (B, N, H, HV + 1)


def test_features_keep_what_elu_plus_one_rounds_away():
    x = np.array([-80.0, -30.0, -1e-3, 0.0, 1e-3, 30.0], np.float32)
    want = np.where(x > 0, x.astype(np.float64) + 1, np.exp(x.astype(np.float64)))
    np.testing.assert_allclose(jax.jit(elu_features)(x), want, rtol=1e-6)
    assert jax.nn.elu(x)[1] + 1 == 0  # what it avoids
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: elu_features(x).sum()))(x[3:]), 1)


def test_queries_far_from_all_keys_give_finite_means():
    q, k, v = inputs()
    (_, y), gradients = program(True)(q - 200, k - 200, v, *PLAIN)
    assert all(np.isfinite(x).all() for x in (y, *gradients))


@pytest.mark.parametrize("aligned", [True, False])
def test_two_sided_flops_are_those_of_the_program(aligned):
    where = {"positions": jnp.zeros((B, T), int), "segments": jnp.zeros((B, T), int)}

    def run(q, k, v):
        return two_sided_linear_attention(q, k, v, **where, aligned=aligned, chunk=4)

    def gradient(*x):
        return jax.grad(lambda *x: jnp.sum(run(*x) ** 2), argnums=(0, 1, 2))(*x)

    forward, both = (flops.count(f, *inputs()) for f in (run, gradient))
    closed = two_sided_flops(B, T, N, H, HV, 4, aligned=aligned)
    assert (forward.total, both.total) == (closed.forward, sum(closed))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="two_sided_sums: chunk must be at least 1, got 0"):
        two_sided_linear_attention(
            *map(jnp.asarray, inputs()),
            **dict(zip(("positions", "segments"), map(jnp.asarray, PLAIN), strict=True)),
            chunk=0,
        )
