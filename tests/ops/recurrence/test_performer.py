"""Positive orthogonal features: unbiased, better with more of them, better for being orthogonal.

And their attention: an estimate of soft-max whose stabiliser no later key moves.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.performer import (
    log_features,
    orthogonal_projection,
    performer_attention,
    performer_state,
    two_sided_performer_attention,
)

B, T, N, H, HV, R = 2, 13, 2, 4, 3, 6
SEGMENTS = np.array([[1] * 3 + [2] * 10, [1] * 1 + [2] * 3 + [3] * 9], np.int32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
POSITIONS[0, [0, 7]] = POSITIONS[1, [8, 12]] = -1
WHERE = {"positions": POSITIONS, "segments": SEGMENTS}
PROJECTION = np.random.default_rng(9).normal(size=(R, H)).astype(np.float32)


def inputs(seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q, k = (scale * rng.normal(size=(B, T, N, H)) for _ in range(2))
    v = rng.normal(size=(B, T, N, HV))
    return tuple(x.astype(np.float32) for x in (q, k, v))


# The estimate.

WIDTH, DRAWS = 8, 4000
PAIR = np.random.default_rng(1).normal(size=(2, 1, 1, 1, WIDTH)).astype(np.float32) * 0.35


@cache
def errors(kind: str, features: int) -> np.ndarray:
    """phi(q) . phi(k) / exp(q . k) - 1 over many draws of the projection."""

    def one(key):
        shape = (features, WIDTH)
        iid, drawn = kind == "iid", (jax.random.normal, orthogonal_projection)
        w = drawn[0](key, shape) if iid else drawn[1](key, shape)
        q, k = (log_features(jnp.asarray(x), w) for x in PAIR)
        return jnp.sum(jnp.exp(q + k))

    estimates = jax.jit(partial(jax.lax.map, one, batch_size=500))(
        jax.random.split(jax.random.key(2), DRAWS)
    )
    return np.asarray(estimates, np.float64) / np.exp(np.sum(PAIR[0] * PAIR[1])) - 1


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
def test_the_estimate_is_unbiased(kind):
    error = errors(kind, 16)
    assert error.std() > 0.05  # there is something to average
    assert abs(error.mean()) < 4 * error.std() / DRAWS**0.5


def test_the_error_falls_as_one_over_the_root_of_the_features():
    """By 4 from 16 features to 256."""
    assert 3.6 < errors("orthogonal", 16).std() / errors("orthogonal", 256).std() < 4.4


def test_orthogonal_features_vary_less():
    assert errors("orthogonal", 16).std() < 0.95 * errors("iid", 16).std()


def test_projections_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    draw = jax.jit(orthogonal_projection, static_argnums=1)
    w = np.asarray(draw(jax.random.key(0), (300, 10, 4)))
    for block in (w[:, :4], w[:, 4:8], w[:, 8:]):
        gram = block @ block.swapaxes(1, 2)
        lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        cosines = gram / lengths[:, :, None] / lengths[:, None, :]
        np.testing.assert_allclose(
            cosines, np.broadcast_to(np.eye(block.shape[1]), cosines.shape), atol=1e-5
        )
    assert abs((w**2).sum(-1).mean() - 4) < 0.2
    assert abs(w.mean()) < 0.03
    assert np.abs(w.mean(axis=0)).max() < 0.25


# Attention.


def plain(q, k, v, causal: bool, numpy=np):
    """Every pair of tokens, exponents as they are."""
    live = POSITIONS >= 0
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    seen = same & live[:, :, None] & live[:, None, :] & (np.tri(T, dtype=bool) | (not causal))
    phi = []
    for x in (q, k):
        x = x * H**-0.25
        phi.append(numpy.exp(x @ PROJECTION.T - (x * x).sum(axis=-1, keepdims=True) / 2))
    weights = numpy.einsum("btnr,bsnr->btsn", *phi) * seen[..., None]
    total = weights.sum(axis=2)
    return numpy.einsum("btsn,bsnv->btnv", weights, v) / numpy.where(total > 0, total, 1)[..., None]


@cache
def program(causal: bool):
    def total(q, k, v, positions, segments):
        at = {"positions": positions, "segments": segments, "chunk": 4}
        if causal:
            y = performer_attention(q, k, v, jnp.asarray(PROJECTION), **at)[0]
        else:
            y = two_sided_performer_attention(q, k, v, jnp.asarray(PROJECTION), **at)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def near(got, want, tolerance: float) -> None:
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_every_pair_of_tokens(causal):
    """Up to the constant that stabilises, in values and gradients; padding holds NaN."""
    q, k, v = (x.copy() for x in inputs())
    for x in (q, k, v):
        x[POSITIONS < 0] = np.nan
    (_, y), got = program(causal)(q, k, v, POSITIONS, SEGMENTS)
    near(y, plain(*inputs(), causal), 2e-5)
    with jax.enable_x64(True):

        @jax.jit
        @partial(jax.grad, argnums=(0, 1, 2))
        def slow(q, k, v):
            y = plain(q, k, v, causal, jnp)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        wants = slow(*(x.astype(np.float64) for x in inputs()))
    for g, want in zip(got, wants, strict=True):
        near(g, want, 1e-4)


def test_many_features_come_near_soft_max():
    q, k, v = inputs(scale=0.4)
    w = np.asarray(jax.jit(orthogonal_projection, static_argnums=1)(jax.random.key(3), (4096, H)))
    y = jax.jit(two_sided_performer_attention)(q, k, v, w, **WHERE)
    live = POSITIONS >= 0
    scores = np.einsum("btnh,bsnh->btsn", q, k) / H**0.5
    seen = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & live[:, :, None] & live[:, None, :]
    weights = np.exp(scores) * seen[..., None]
    want = np.einsum("btsn,bsnv->btnv", weights, v)
    want /= np.maximum(weights.sum(axis=2), 1e-9)[..., None]
    near(y, want, 0.03)


def with_a_late_giant() -> tuple[np.ndarray, ...]:
    q, k, v = (x.copy() for x in inputs())
    k[:, 10:] *= 8
    return q, k, v


def test_no_later_key_moves_the_stabiliser():
    """To the last bit; the maximum over a row, as the authors' code has it, moves all of it."""
    (_, before), _ = program(True)(*inputs(), POSITIONS, SEGMENTS)
    (_, after), _ = program(True)(*with_a_late_giant(), POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.abs(after - before)[:, 10:].max() > 1e-2

    def over_the_row(q, k, v):
        x = [z * H**-0.25 for z in (q, k)]
        q_, k_ = (z @ PROJECTION.T - (z * z).sum(axis=-1, keepdims=True) / 2 for z in x)
        q_ = np.exp(q_ - q_.max(axis=-1, keepdims=True)) + 1e-6
        k_ = np.exp(k_ - k_.max(axis=(1, 3), keepdims=True)) + 1e-6
        weights = np.einsum("btnr,bsnr->btsn", q_, k_) * np.tri(T)[None, :, :, None]
        return np.einsum("btsn,bsnv->btnv", weights, v) / weights.sum(axis=2)[..., None]

    moved = over_the_row(*with_a_late_giant()) - over_the_row(*inputs())
    assert np.abs(moved)[:, :10].max() > 0


@pytest.mark.parametrize("scale", [1, 6])
def test_pieces_are_the_whole(scale):
    """Exponents rise and fall by tens along the row."""
    q, k, v = inputs(4, scale)
    (_, whole), gradients = program(True)(q, k, v, POSITIONS, SEGMENTS)
    assert all(np.isfinite(g).all() for g in gradients)
    state, made = performer_state(B, N, R, HV), []
    step = jax.jit(performer_attention)
    for begin, end in ((0, 1), (1, 2), (2, 3), (3, 8), (8, 13)):
        part = slice(begin, end)
        at = {name: x[:, part] for name, x in WHERE.items()}
        y, state = step(q[:, part], k[:, part], v[:, part], PROJECTION, **at, state=state)
        made.append(y)
    near(np.concatenate(made, axis=1), np.asarray(whole), 1e-5)
    assert state["peak"].shape == (B, N)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_of_any_size_give_finite_means(causal):
    q, k, v = inputs()
    for scale in (0.0, 30.0, 1e4):
        (_, y), gradients = program(causal)(scale * q, scale * k, v, POSITIONS, SEGMENTS)
        assert all(np.isfinite(x).all() for x in (y, *gradients))
        assert np.abs(y).max() <= 1.001 * np.abs(v).max()
        assert (np.asarray(y)[POSITIONS < 0] == 0).all()
