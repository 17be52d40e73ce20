"""Random Fourier features estimate the kernel of unit vectors; their attention and its gate."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.random_features import (
    LEAST,
    fourier_features,
    random_feature_attention,
    random_feature_state,
    unit,
)

B, T, N, H, HV, R = 2, 13, 2, 4, 3, 64
SEGMENTS = np.array([[1] * 3 + [2] * 10, [1] * 1 + [2] * 3 + [3] * 9], np.int32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
POSITIONS[0, [0, 7]] = POSITIONS[1, [8, 12]] = -1
WHERE = {"positions": POSITIONS, "segments": SEGMENTS}
PROJECTION = np.random.default_rng(9).normal(size=(N, R, H)).astype(np.float32)


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values and logits of gates."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, T, N, H), (B, T, N, HV), (B, T, N)]
    return tuple(rng.normal(size=s).astype(np.float32) for s in shapes)


def test_the_kernel_is_estimated_without_bias():
    """exp(q . k) of unit vectors, up to the constant e, which a mean does not see."""
    draws = 20_000
    w = jax.random.normal(jax.random.key(0), (1, draws, H))
    q, k = (jnp.asarray(x[:1, :4, :1]) for x in inputs()[:2])

    @jax.jit
    def both(q, k, w):
        q, k = unit(q), unit(k)
        each = fourier_features(q, w) * fourier_features(k, w)
        return q, k, draws * (each[..., :draws] + each[..., draws:])  # every w alone

    q, k, estimates = map(np.asarray, both(q, k, w))
    want = np.exp(np.sum(q * k, axis=-1) - 1)
    error = estimates.mean(axis=-1) - want
    assert (np.abs(error) < 4 * estimates.std(axis=-1) / draws**0.5).all()
    assert want.std() > 0.05


def test_features_have_length_one_and_nothing_has_a_derivative():
    x = np.zeros((1, 1, N, H), np.float32)
    phi = jax.jit(lambda x: fourier_features(unit(x), jnp.asarray(PROJECTION)))
    np.testing.assert_allclose(np.sum(np.square(phi(inputs()[0])), axis=-1), 1, rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda x: phi(x).sum()))(x)).all()


def plain(q, k, v, gate):
    """Token by token in float64: fade, write, read."""
    y, w = np.zeros(v.shape), PROJECTION.astype(np.float64)
    phi = []
    for x in (q, k):
        x = x.astype(np.float64) / np.sqrt(
            np.sum(np.square(x, dtype=np.float64), -1, keepdims=True) + 1e-6
        )
        angle = np.einsum("btnh,nrh->btnr", x, w)
        phi.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1) / R**0.5)
    for b in range(B):
        document = None
        for t in range(T):
            if POSITIONS[b, t] < 0:
                continue
            if document != SEGMENTS[b, t]:
                document, S, z = SEGMENTS[b, t], np.zeros((N, 2 * R, HV)), np.zeros((N, 2 * R))
            g = np.ones(N) if gate is None else 1 / (1 + np.exp(-np.float64(gate[b, t])))
            new = np.ones(N) if gate is None else 1 / (1 + np.exp(np.float64(gate[b, t])))
            for n in range(N):
                S[n] = g[n] * S[n] + new[n] * np.outer(phi[1][b, t, n], v[b, t, n])
                z[n] = g[n] * z[n] + new[n] * phi[1][b, t, n]
                below = max(phi[0][b, t, n] @ z[n], LEAST * new[n])
                y[b, t, n] = phi[0][b, t, n] @ S[n] / below
    return y


@cache
def program(gated: bool):
    def total(q, k, v, gate, w):
        at = {k: jnp.asarray(x) for k, x in WHERE.items()}
        y, _ = random_feature_attention(q, k, v, w, gate if gated else None, **at, chunk=4)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))


@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_recurrence_in_numpy(gated):
    want = plain(*inputs()[:3], inputs()[3] if gated else None)
    given = tuple(x.copy() for x in inputs())
    for x in given:
        x[POSITIONS < 0] = np.nan
    (_, y), gradients = program(gated)(*given, PROJECTION)
    np.testing.assert_allclose(y, want, atol=2e-5)
    assert all((g[POSITIONS < 0] == 0).all() for g in map(np.asarray, gradients))


def test_gates_that_are_one_are_none():
    """The limit of equal gates, in values and gradients."""
    with jax.enable_x64(True):
        q, k, v, gate = (x.astype(np.float64) for x in inputs())
        w = PROJECTION.astype(np.float64)
        (_, y), gradients = program(True)(q, k, v, np.full_like(gate, 25), w)
        (_, want), wants = program(False)(q, k, v, gate, w)
        (_, other), _ = program(True)(q, k, v, gate, w)
    np.testing.assert_allclose(y, want, atol=1e-9)
    for a, b in zip(gradients[:3], wants[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    assert np.abs(np.asarray(other) - np.asarray(want)).max() > 1e-2


@pytest.mark.parametrize("gate", [-200.0, 30.0, 45.0, 60.0, 100.0, 200.0])
def test_gates_that_are_all_but_shut_have_finite_slopes(gate):
    """Below a quotient stands its divisor; below its slope, as usually written, the square."""
    q, k, v, other = inputs()
    gates = np.where(np.arange(T)[None, :, None] % 5 == 4, other, gate).astype(np.float32)
    (_, y), gradients = program(True)(q, k, v, gates, PROJECTION)
    assert all(np.isfinite(g).all() for g in gradients)
    if gate <= 45:
        np.testing.assert_allclose(y, plain(q, k, v, gates), atol=1e-4)
    with jax.enable_x64(True):
        exact = program(True)(*(x.astype(np.float64) for x in (q, k, v, gates, PROJECTION)))[1]
    if gate <= 45:
        for one, other in zip(gradients, exact, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4 * np.abs(other).max())


def test_token_by_token_is_the_whole():
    q, k, v, gate = inputs()
    state, made = random_feature_state(B, N, R, HV), []
    step = jax.jit(random_feature_attention)
    for t in range(T):
        now = slice(t, t + 1)
        at = {name: x[:, now] for name, x in WHERE.items()}
        x = (x[:, now] for x in (q, k, v))
        y, state = step(*x, PROJECTION, gate[:, now], **at, state=state)
        made.append(y)
    np.testing.assert_allclose(np.concatenate(made, axis=1), plain(q, k, v, gate), atol=2e-5)


def test_an_estimate_of_nothing_or_less_divides_by_what_one_key_weighs():
    """One frequency that turns the only key to the other side of the query: cos(pi) = -1."""
    q = np.zeros((1, 2, 1, H), np.float32)
    k, v = q.copy(), np.ones((1, 2, 1, HV), np.float32)
    q[..., 0], k[..., 0] = 1, -1
    w = np.zeros((1, 1, H), np.float32)
    w[..., 0] = np.pi / 2
    where = {
        "positions": np.arange(2, dtype=np.int32)[None],
        "segments": np.zeros((1, 2), np.int32),
    }
    attend = jax.jit(partial(random_feature_attention, chunk=4))
    y, _ = attend(q, k, v, w, **where)
    np.testing.assert_allclose(y, [[[[-1 / LEAST] * HV], [[-2 / LEAST] * HV]]], rtol=1e-4)
    shut = np.full((1, 2, 1), 200, np.float32)  # gates that let nothing in
    y, _ = jax.jit(random_feature_attention)(q, k, v, w, shut, **where)
    assert np.isfinite(y).all()
