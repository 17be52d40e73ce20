"""Token shift against a loop in numpy: documents, padding that holds NaN, pieces, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.recurrence.token_shift import token_shift, token_shift_state

B, T, D = 3, 11, 2
POSITIONS = np.array(
    [
        [*range(T)],
        [-1, 0, 1, -1, -1, 2, 7, 0, 1, -1, -1],
        [4, 5, -1, -1, -1, -1, -1, -1, -1, -1, 6],
    ],
    np.int32,
)
SEGMENTS = np.array([[1] * T, [9, 1, 1, 3, 3, 1, 1, 2, 2, 0, 0], [5] * T], np.int32)
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
STATE = token_shift_state(B, D) | {
    "latest": np.full((B, D), 8.0, np.float32),
    "position": np.array([-1, 3, 3], np.int32),
    "segment": np.array([-1, 4, 5], np.int32),
}


def plain(x, positions, segments, state):
    """y, and for each token the index of the one it is given: -1 for the state's, else None."""
    y, source = np.zeros_like(x), np.full((B, T), None)
    for b in range(B):
        latest, at, document = state["latest"][b], -1, state["segment"][b]
        empty = state["position"][b] < 0
        for t in range(T):
            if positions[b, t] < 0:
                continue
            if not empty and segments[b, t] == document:
                y[b, t], source[b, t] = latest, at
            latest, at, document, empty = x[b, t], t, segments[b, t], False
    return y, source


@jax.jit
def run(x, positions, segments, state):
    return token_shift(x, positions=positions, segments=segments, state=state)


def test_it_is_the_token_before():
    poisoned = np.where((POSITIONS < 0)[..., None], np.nan, X)
    want, _ = plain(poisoned, POSITIONS, SEGMENTS, STATE)
    y, after = run(poisoned, POSITIONS, SEGMENTS, STATE)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(after["latest"], X[range(B), [10, 8, 10]])
    assert after["position"].tolist() == [10, 1, 6]
    nothing, _ = plain(poisoned, POSITIONS, SEGMENTS, token_shift_state(B, D))
    y, state = run(poisoned, POSITIONS, SEGMENTS, None)
    np.testing.assert_array_equal(y, nothing)
    assert state is None
    assert (nothing != want).any()


def test_pieces_are_the_whole():
    whole, after = run(X, POSITIONS, SEGMENTS, STATE)
    state, y = STATE, []
    for t in range(T):
        made, state = run(X[:, t : t + 1], POSITIONS[:, t : t + 1], SEGMENTS[:, t : t + 1], state)
        y.append(made)
    np.testing.assert_array_equal(np.concatenate(y, axis=1), whole)
    for key in after:
        np.testing.assert_array_equal(state[key], after[key])


def test_a_gradient_goes_where_the_token_came_from():
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    dx = jax.jit(jax.grad(lambda x: (run(x, POSITIONS, SEGMENTS, STATE)[0] * weight).sum()))(X)
    _, source = plain(X, POSITIONS, SEGMENTS, STATE)
    want = np.zeros_like(X)
    for b, t in np.ndindex(B, T):
        if source[b, t] not in (None, -1):
            want[b, source[b, t]] += weight[b, t]
    np.testing.assert_array_equal(dx, want)


def test_an_aligned_row_is_shifted_by_its_index():
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    at = {"positions": jnp.asarray(positions), "segments": jnp.zeros((B, T), jnp.int32)}
    y, _ = token_shift(jnp.asarray(X), **at, aligned=True)
    np.testing.assert_array_equal(y, run(X, positions, np.zeros_like(positions), None)[0])
    np.testing.assert_array_equal(y[:, 1:], X[:, :-1])
