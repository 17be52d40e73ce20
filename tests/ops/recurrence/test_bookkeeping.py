"""Documents, clocks and places of rows, against a loop over tokens in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.bookkeeping import Rows, empty_place, place_after, rows_after, timeline

T = 12


def random_rows(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Six rows: any padding, short documents, holes in the positions, any incoming place."""
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((6, T)) < 0.3, axis=1)
    positions = np.cumsum(rng.integers(1, 4, (6, T)), axis=1)
    positions[rng.random((6, T)) < 0.3] = -1
    positions[0] = -1
    segments[positions < 0] = rng.integers(-1, 9, (6, T))[positions < 0]
    position = np.where(rng.random(6) < 0.4, -1, rng.integers(0, 2, 6))
    segment = np.where(position < 0, rng.integers(-1, 2, 6), rng.integers(0, 2, 6))
    return tuple(x.astype(np.int32) for x in (positions, segments, position, segment))


def by_loop(positions, segments, position, segment):
    """The definition, token by token: (live, begins, run, clock, elapsed), last place."""
    out, last = np.zeros((5, *positions.shape), int), []
    for b in range(len(positions)):
        at, document, run = position[b], segment[b], 0
        for t in range(T):
            live = positions[b, t] >= 0
            begins = live and (at < 0 or segments[b, t] != document)
            elapsed = positions[b, t] - at if live and not begins else 0
            run += begins
            at, document = (positions[b, t], segments[b, t]) if live else (at, document)
            out[:, b, t] = live, begins, run, at, elapsed
        last.append((at, document))
    return out, np.array(last).T


@jax.jit
def both(positions, segments, position, segment):
    rows = Rows(positions, segments, (position, segment))
    return timeline(rows), place_after(rows)


def agrees(given: tuple, wanted: tuple) -> None:
    time, place = both(*given)
    want, last = by_loop(*wanted)
    np.testing.assert_array_equal(np.stack([np.asarray(x, int) for x in time]), want)
    np.testing.assert_array_equal(np.stack(place), last)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_read_as_the_definition_says(seed):
    agrees(random_rows(seed), random_rows(seed))


def test_the_definition_catches_a_place_that_is_off():
    positions, segments, position, segment = random_rows(3)
    with pytest.raises(AssertionError):
        agrees((positions, segments, position + 1, segment), random_rows(3))
    with pytest.raises(AssertionError):
        agrees((positions, segments * 0, position, segment), random_rows(3))


def test_positions_that_fall_are_no_negative_time():
    positions = jnp.array([[5, 3, 4]])
    elapsed = timeline(rows_after(None, positions, jnp.zeros_like(positions))).elapsed
    np.testing.assert_array_equal(elapsed, [[0, 0, 1]])


def test_no_state_is_the_empty_place():
    where = jnp.zeros((3, 2), jnp.int32)
    for a, b in zip(rows_after(None, where, where).before, empty_place(3), strict=True):
        np.testing.assert_array_equal(a, b)
    state = {"S": where, "position": where[:, 0] + 4, "segment": where[:, 0] + 7}
    np.testing.assert_array_equal(rows_after(state, where, where).before[0], [4, 4, 4])
    np.testing.assert_array_equal(rows_after(state, where, where).before[1], [7, 7, 7])
