"""H3 against numpy, with heads and a state; and the associative recall that it was made for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.h3 import h3, h3_state
from effjax.ops.recurrence.modes import Modes
from effjax.ops.recurrence.state_space import discretise

B, T, N, H, W, P = 2, 11, 2, 3, 3, 2


def inputs() -> list[np.ndarray]:
    return list(np.random.default_rng(9).normal(size=(3, B, T, N, H)).astype(np.float32))


def parameters() -> tuple[np.ndarray, Modes]:
    rng = np.random.default_rng(0)
    modes = Modes(
        (-rng.uniform(0.01, 1, (N, P)), rng.normal(size=(N, P))),
        (rng.normal(size=(N, P)), rng.normal(size=(N, P))),
        rng.normal(size=N),
    )
    return rng.normal(size=(N, H, W)).astype(np.float32), jax.tree.map(np.float32, modes)


@partial(jax.jit, static_argnames=("aligned",))
def run(q, k, v, taps, modes, positions, segments, state=None, aligned=False):
    where = {"positions": positions, "segments": segments, "state": state}
    return h3(q, k, v, taps, modes, **where, chunk=4, aligned=aligned)


def plain(q, k, v, taps: np.ndarray, modes: Modes) -> np.ndarray:
    """The paper's algorithm on rows of one document: filter, outer product, memory, read."""
    y = np.zeros(q.shape)
    (size, angle), (real, imag) = (tuple(np.float64(x) for x in y) for y in modes[:2])
    A, C = np.exp(size + 1j * angle), real + 1j * imag
    for n in range(q.shape[2]):
        x = np.zeros((q.shape[0], *q.shape[3:] * 2, A.shape[1]), complex)
        for t in range(q.shape[1]):
            lags = range(min(t + 1, taps.shape[2]))
            shifted = sum(taps[n, :, -1 - j] * k[:, t - j, n] for j in lags)
            pair = shifted[:, :, None] * v[:, t, n, None, :]
            x = x * A[n] + pair[..., None]
            out = (x @ C[n]).real + modes.skip[n] * pair
            y[:, t, n] = np.einsum("bi,bij->bj", q[:, t, n], out)
    return y


def close(got: jax.Array, want: np.ndarray, rel: float = 2e-5) -> None:
    assert np.abs(np.asarray(got, np.float64) - want).max() <= rel * np.abs(want).max()


def rows() -> tuple[np.ndarray, np.ndarray]:
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return positions, np.zeros_like(positions)


def test_heads_are_the_papers_algorithm():
    given, own = inputs(), parameters()
    for aligned in (True, False):
        y, _ = run(*given, *own, *rows(), aligned=aligned)
        close(y, plain(*given, *own))


def test_pieces_are_the_whole_and_padding_is_stepped_over():
    """Token by token with a state; in the middle a hole that holds NaN, and a gap in positions."""
    given, own = inputs(), parameters()
    positions, segments = (x.copy() for x in rows())
    positions[:, 6:] += 2
    positions[:, 4] = -1
    for x in given:
        x[:, 4] = np.nan
    whole, nothing = run(*given, *own, positions, segments)
    assert nothing is None
    assert (np.asarray(whole)[:, 4] == 0).all()
    state, made = h3_state(B, N, H, W, P), []
    for t in range(T):
        part = slice(t, t + 1)
        piece = [x[:, part] for x in (*given, positions, segments)]
        y, state = run(*piece[:3], *own, *piece[3:], state)
        made.append(y)
    close(np.concatenate(made, axis=1), np.asarray(whole, np.float64))


KEYS, VALUES, PAIRS = 6, 5, 4


def recall(shift: int) -> tuple[np.ndarray, Modes]:
    """One head as wide as the vocabulary: a filter looks `shift` tokens back; nothing fades."""
    taps = np.zeros((1, KEYS + VALUES, 2), np.float32)
    taps[:, :, -1 - shift] = 1
    one = jnp.ones((1, 1))
    modes = discretise(jnp.zeros(1), -30 * one, 0 * one, one / 2, 0 * one, jnp.zeros(1))
    return taps, modes


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Rows of key, value, key, value ..., then a key that was there; and the value after it."""
    rng, made, answers = np.random.default_rng(3), [], []
    for _ in range(32):
        keys, values = rng.permutation(KEYS)[:PAIRS], rng.integers(0, VALUES, PAIRS)
        asked = rng.integers(0, PAIRS)
        made.append([*np.stack([keys, KEYS + values], axis=1).ravel(), keys[asked]])
        answers.append(KEYS + values[asked])
    return np.array(made), np.array(answers)


def recalled(shift: int) -> np.ndarray:
    tokens, _ = texts()
    hot = np.eye(KEYS + VALUES, dtype=np.float32)[tokens][:, :, None]
    keys = hot * (np.arange(KEYS + VALUES) < KEYS)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    y, _ = run(keys, keys, hot - keys, *recall(shift), positions, 0 * positions, aligned=True)
    return np.asarray(y)[:, -1, 0].argmax(-1)


def test_it_solves_associative_recall():
    """METHODS SSM-05, by weights that are written down: every question is answered."""
    assert (recalled(shift=1) == texts()[1]).all()


def test_without_the_shift_it_does_not():
    assert (recalled(shift=0) == texts()[1]).mean() < 0.5


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ValueError, match="weight of width 3, got 1"):
        run(*inputs(), *parameters(), *rows(), h3_state(B, N, H, 2, P))
