"""Laid-out rows: every document begins a chunk, index is position inside it, nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.bookkeeping import Rows, timeline
from effjax.ops.recurrence.layout import Layout, lay_out, move, spare_chunks

T, CHUNK = 16, 4
SLOTS = (4 + 2) * CHUNK


@jax.jit
def laid_out(positions, segments, position, segment):
    rows = Rows(positions, segments, (position, segment))
    return lay_out(timeline(rows), position, CHUNK)


def rows(*documents: list[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
    """Rows of (length, segment, first position), -1 for padding; position 3 of segment 5 before."""
    positions, segments = (np.full((len(documents), T), -1, np.int32) for _ in range(2))
    for row, pieces in enumerate(documents):
        at = 0
        for length, segment, first in pieces:
            run = slice(at, at + length)
            positions[row, run] = -1 if first < 0 else np.arange(first, first + length)
            segments[row, run] = segment
            at += length
    n = len(documents)
    return positions, segments, np.full(n, 3, np.int32), np.full(n, 5, np.int32)


FITS = rows(
    [(16, 5, 4)],  # continues
    [(16, 6, 0)],
    [(3, 0, -1), (5, 5, 5), (2, 5, -1), (6, 6, 2)],  # padding, and a dropped position 4
    [(1, 1, 0), (1, 2, 0), (1, 3, 0), (1, 4, 0), (12, 0, -1)],
    [(16, 0, -1)],
    [(5, 7, 3), (3, 7, 9), (8, 7, -1)],  # a hole of one position
)
TIGHT = {
    "many documents": rows([(2, i, 0) for i in range(8)]),
    "a wide gap": rows([(8, 1, 0), (8, 1, 1000)]),
    "a wide gap after the state": rows([(16, 5, 40)]),
    "the largest gaps": rows([(1, 1, 0), (1, 1, 2**31 - 9), (1, 2, 0), (1, 2, 2**31 - 9)] * 4),
    "positions that repeat": rows([(8, 1, 0), (8, 1, 7)]),
    "positions that fall": rows([(8, 1, 8), (8, 1, 0)]),
}


def is_laid_out(layout: Layout, given: tuple) -> None:
    positions, segments, position, segment = given
    slot, source, fresh, fits = (np.asarray(x) for x in layout)
    assert fits
    assert source.shape == (len(positions), SLOTS)
    for b in range(len(positions)):
        live = np.flatnonzero(positions[b] >= 0)
        assert (np.delete(slot[b], live) == -1).all()
        assert (source[b, slot[b, live]] == live).all()
        assert (source[b] >= 0).sum() == len(live)
        document, begin, starts = segment[b], -(position[b] + 1), set()
        for t in live:  # `begin` is the slot of the document's position 0
            if segments[b, t] != document:
                document, begin = segments[b, t], slot[b, t] - positions[b, t]
                assert slot[b, t] % CHUNK == 0
                starts.add(slot[b, t] // CHUNK)
            assert slot[b, t] == begin + positions[b, t]
        assert (np.diff(slot[b, live]) > 0).all()
        assert set(np.flatnonzero(fresh[b])) == starts


def test_documents_begin_chunks_and_slots_are_positions():
    is_laid_out(laid_out(*FITS), FITS)


def test_the_test_catches_a_slot_that_is_off():
    layout = laid_out(*FITS)
    with pytest.raises(AssertionError):
        is_laid_out(layout._replace(slot=jnp.maximum(layout.slot - 1, 0)), FITS)
    with pytest.raises(AssertionError):
        is_laid_out(layout._replace(fresh=~layout.fresh), FITS)


@pytest.mark.parametrize("why", TIGHT)
def test_rows_without_room_stay_as_they_are(why):
    layout = laid_out(*TIGHT[why])
    assert not layout.fits
    np.testing.assert_array_equal(layout.slot, np.arange(T)[None])
    np.testing.assert_array_equal(layout.source[:, :T], np.arange(T)[None])
    assert (layout.source[:, T:] == -1).all()


@pytest.mark.parametrize("chunks", [1, 4, 8, 9, 32])
def test_spare_chunks_hold_some_more_documents(chunks):
    spare = spare_chunks(chunks)
    assert spare >= 2
    assert spare - 1 < chunks / 4 <= spare or spare == 2


def test_moving_there_and_back_loses_nothing_and_its_gradient_is_the_way_back():
    layout, (positions, *_) = laid_out(*FITS), FITS
    live = positions >= 0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*positions.shape, 3)).astype(np.float32)
    g = jnp.asarray(rng.normal(size=(len(positions), SLOTS, 3)), jnp.float32)
    x[~live] = np.nan

    @jax.jit
    def there(x):
        y, back = jax.vjp(lambda x: move(x, layout.source, layout.slot), x)
        return y, back(g)[0], move(y, layout.slot, layout.source)

    y, dx, again = there(x)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(again, np.where(live[..., None], x, 0))
    # The cotangent of a gather, by the definition of an inner product: <g, move x> = <dx, x>.
    inner = np.sum(np.where(live[..., None], x * dx, 0))
    np.testing.assert_allclose(np.sum(g * y), inner, rtol=1e-5)
    assert (dx[~live] == 0).all()
