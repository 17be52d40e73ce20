"""The delta rule against loops in numpy, at the ends of its gates, and where keys repeat."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.recurrence.delta import delta_rule, delta_state
from effjax.ops.recurrence.delta_naive import recurrent_delta

B, T, N, H, HV = 2, 13, 2, 4, 3
WHERE = {
    "positions": np.broadcast_to(np.arange(1, T + 1, dtype=np.int32), (B, T)),
    "segments": np.zeros((B, T), np.int32),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys of length 1, values, beta in [0, 1] and log gates."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, N, size)) for size in (H, H, HV))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, log_gate = rng.uniform(size=(B, T, N)), -np.exp(rng.normal(size=(B, T, N)) - 1)
    return tuple(x.astype(np.float32) for x in (q, k, v, beta, log_gate))


def memory() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(B, N, H, HV)).astype(np.float32)


def plain(q, k, v, beta, log_gate, S) -> tuple[np.ndarray, np.ndarray]:
    """Erase, write, read, token by token, head by head in float64."""
    y, after = np.zeros(v.shape), np.zeros(S.shape)
    for b in range(B):
        for n in range(N):
            M = S[b, n].astype(np.float64)
            for t in range(T):
                M = np.exp(np.float64(log_gate[b, t, n])) * M
                held = k[b, t, n] @ M
                M = M + beta[b, t, n] * np.outer(k[b, t, n], v[b, t, n] - held)
                y[b, t, n] = q[b, t, n] @ M
            after[b, n] = M
    return y, after


@cache
def program(form: str):
    """(y, S after) and gradients of a sum that weighs both, for rows that continue a document."""
    run = partial(delta_rule, chunk=4) if form == "chunked" else recurrent_delta

    def total(*x):
        state = {"S": x[5], "position": jnp.zeros(B, int), "segment": jnp.zeros(B, int)}
        y, after = run(*x[:5], **jax.tree.map(jnp.asarray, WHERE), state=state)
        weights = (1 + jnp.arange(z.size).reshape(z.shape) for z in (y, after["S"]))
        parts = zip((y, after["S"]), weights, strict=True)
        return sum(jnp.sum(z * jnp.sin(w)) for z, w in parts), (y, after["S"])

    return jax.jit(jax.value_and_grad(total, argnums=range(6), has_aux=True))


def near(got, want, rel: float) -> None:
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rel * np.abs(b).max()


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_it_is_the_recurrence_in_numpy(form):
    (_, made), _ = program(form)(*inputs(), memory())
    near(made, plain(*inputs(), memory()), 2e-6)


def test_the_comparison_catches_a_wrong_gate():
    q, k, v, beta, log_gate = inputs()
    (_, made), _ = program("chunked")(q, k, v, beta, 1.01 * log_gate, memory())
    with pytest.raises(AssertionError):
        near(made, plain(*inputs(), memory()), 2e-4)


def ends(kind: str) -> tuple[np.ndarray, ...]:
    """Inputs at the ends of beta and of the gate, or all of them along each row."""
    q, k, v, beta, log_gate = inputs(1)
    gates = {"shut": -np.inf, "open": 0.0, "almost": -1e-7, "under": -60.0, "near SHUT": -1000.0}
    if kind == "mixed":
        beta, log_gate = beta.copy(), log_gate.copy()
        beta[:, ::3], beta[:, 1::3] = 0, 1
        for t, gate in enumerate([*gates.values(), *reversed(gates.values())]):
            log_gate[:, t] = gate
    elif kind in gates:
        log_gate = np.full_like(log_gate, gates[kind])
    else:
        beta = np.full_like(beta, float(kind))
    return q, k, v, beta, log_gate


@pytest.mark.parametrize("kind", ["0", "1", "2", "shut", "open", "almost", "under", "mixed"])
def test_the_ends_of_the_range_are_finite_and_right(kind):
    """Values in float32, and in float64 every gradient as through the recurrence."""
    (_, made), gradients = program("chunked")(*ends(kind), memory())
    near(made, plain(*ends(kind), memory()), 5e-6)
    assert all(np.isfinite(g).all() for g in gradients)
    with jax.enable_x64(True):
        x = [a.astype(np.float64) for a in (*ends(kind), memory())]
        (_, made), got = program("chunked")(*x)
        (_, slow), want = program("recurrent")(*x)
    near(made, slow, 1e-12)
    for a, b in zip(got, want, strict=True):
        # The derivative by a gate's logarithm is 0 where the gate is: exp(-inf) * -inf is none.
        np.testing.assert_allclose(a, np.nan_to_num(b), atol=1e-11 * max(1, np.nanmax(np.abs(b))))


def test_a_key_reads_back_what_was_written_under_it():
    """Beta 1 replaces: of 64 equal keys the last value stays, without a trace of the others."""
    rng, length = np.random.default_rng(3), 64
    k = np.zeros((1, length, 1, H), np.float32)
    k[..., 0] = 1
    v = rng.normal(size=(1, length, 1, HV)).astype(np.float32)
    flat = np.zeros((1, length), np.int32)
    rule = jax.jit(partial(delta_rule, chunk=64))
    one, none = np.ones((1, length, 1), np.float32), np.zeros((1, length, 1), np.float32)
    y, _ = rule(k, k, v, one, none, positions=flat, segments=flat)
    np.testing.assert_allclose(y, v, atol=1e-5)


def test_bfloat16_inputs_lose_only_their_own_rounding():
    low = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs())
    state = delta_state(B, N, H, HV)
    y, after = jax.jit(partial(delta_rule, chunk=4))(*low, **WHERE, state=state)
    assert (y.dtype, after["S"].dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = plain(*(np.asarray(x, np.float64) for x in low), np.zeros((B, N, H, HV)))
    rounded = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max()
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * rounded


@pytest.mark.parametrize("chunk", [0, -4])
def test_a_chunk_of_nothing_is_refused(chunk):
    with pytest.raises(ConfigError, match=f"delta_rule: chunk must be at least 1, got {chunk}"):
        jax.jit(partial(delta_rule, chunk=chunk))(*inputs(), **WHERE)
