"""Mamba-2's mixing against plain numpy; its FLOPs and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.flops import count
from effjax.cost.memory import stored_bytes
from effjax.ops.accounting import Flops
from effjax.ops.recurrence import accounting
from effjax.ops.recurrence.mamba2 import Mamba2Inputs, Mamba2Weights, mamba2, mamba2_state

B, T, N, H, G, P, W = 2, 22, 4, 3, 2, 5, 3
CHUNK = 4


def weights() -> Mamba2Weights:
    rng = np.random.default_rng(1)
    shapes = [(N, H, W), (G, P, W), (G, P, W), (N, H), (G, P), (G, P), (N,), (N,), (N,), (N, H)]
    return Mamba2Weights(*(rng.normal(size=s).astype(np.float32) for s in shapes))


def inputs() -> Mamba2Inputs:
    """Two documents and padding between them in the second row."""
    rng = np.random.default_rng(2)
    shapes = [(N, H), (N, H), (G, P), (G, P), (N,)]
    made = [rng.normal(size=(B, T, *s)).astype(np.float32) for s in shapes]
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    segments = np.zeros_like(positions)
    segments[1, 10:] = 1
    positions[1, 9:12] = -1
    return Mamba2Inputs(*made, positions, segments)


def silu(x):
    return x / (1 + np.exp(-x))


def plain(given: Mamba2Inputs, w: Mamba2Weights) -> np.ndarray:
    """Token by token in float64, as the paper's own step is written."""
    given, w = (
        type(t)(*(x if x.dtype == np.int32 else x.astype(np.float64) for x in t))
        for t in (given, w)
    )
    out = np.zeros(given.x.shape)
    filters = (w.filter_x, w.filter_b, w.filter_c)
    for row in range(B):
        S, document = np.zeros((N, P, H)), None
        for t in range(given.x.shape[1]):
            if given.positions[row, t] < 0:
                continue
            if document != given.segments[row, t]:
                S, document = np.zeros((N, P, H)), given.segments[row, t]
                last = [np.zeros((W, *x.shape[2:])) for x in (given.x, given.b, given.c)]
            tokens = [x[row, t] for x in (given.x, given.b, given.c)]
            last = [
                np.concatenate([old[1:], new[None]]) for old, new in zip(last, tokens, strict=True)
            ]
            x, b, c = (
                silu((np.moveaxis(old, 0, -1) * f).sum(-1) + bias)
                for old, f, bias in zip(last, filters, (w.bias_x, w.bias_b, w.bias_c), strict=True)
            )
            dt = np.log1p(np.exp(given.dt[row, t] + w.dt_bias))
            for n in range(N):
                g = n // (N // G)
                S[n] = np.exp(-np.exp(w.log_a[n]) * dt[n]) * S[n] + dt[n] * np.outer(b[g], x[n])
                out[row, t, n] = c[g] @ S[n] + w.skip[n] * x[n]
            y = out[row, t] * silu(given.z[row, t])
            y = y.reshape(G, -1) / np.sqrt((y.reshape(G, -1) ** 2).mean(-1, keepdims=True) + 1e-5)
            out[row, t] = y.reshape(N, H) * w.scale
    return out


@jax.jit
def run(given, w):
    """y, and the gradients of a weighted sum of it."""

    def loss(given, w):
        y, _ = mamba2(given, w, chunk=CHUNK)
        return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)), y

    floats, where = given[:5], given[5:]
    (_, y), gradients = jax.value_and_grad(
        lambda x, w: loss(Mamba2Inputs(*x, *where), w), (0, 1), has_aux=True
    )(floats, w)
    return y, gradients


def close(got, want, rel: float = 2e-5) -> None:
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= rel * np.abs(np.asarray(b)).max()


def test_it_is_the_layer_in_numpy():
    y = run(inputs(), weights())[0]
    close(y, plain(inputs(), weights()))
    with pytest.raises(AssertionError):
        close(y, plain(inputs(), weights()._replace(skip=1.001 * weights().skip)))


def test_padding_that_is_not_a_number_changes_nothing():
    given = inputs()
    dead = given.positions < 0
    poisoned = Mamba2Inputs(
        *(np.where(dead.reshape(B, T, *[1] * (x.ndim - 2)), np.nan, x) for x in given[:5]),
        *given[5:],
    )
    got, want = (run(x, weights()) for x in (poisoned, given))
    close(got, want, 0.0)


@pytest.mark.parametrize("length", [CHUNK, T, 1])
def test_flops_are_counted_as_written(length):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((B, length, *x.shape[2:]), x.dtype), inputs()
    )
    for aligned in (False, True):

        def f(x, w, at, aligned=aligned):
            given = Mamba2Inputs(*x, *at)
            return mamba2(given, w, chunk=CHUNK, aligned=aligned)[0]

        arrays = (shapes[:5], weights(), shapes[5:])
        forward = count(f, *arrays)
        both = count(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1)), *arrays)
        assert not both.unknown
        want = accounting.mamba2_flops(B, length, N, P, H, CHUNK, groups=G)
        assert Flops(forward.total, both.total - forward.total) == want


def test_the_state_is_as_large_as_counted():
    state = mamba2_state(Mamba2Weights(*map(jnp.asarray, weights())), B)
    assert stored_bytes(state) == accounting.mamba2_state_bytes(B, N, P, H, groups=G, taps=W)
