"""The laws of the long convolution, in every form: values, gradients, causality, documents, states.

A convolution is linear in its inputs and in its kernel, so that numpy gives all gradients in closed
form, in float64. Each law is a function of a program; the planted faults are numpy as well, and
each makes its law fail.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.convolution.accounting import long_state_bytes
from effjax.ops.convolution.long import long_convolution, long_state
from effjax.ops.recurrence.bookkeeping import Rows, timeline
from effjax.ops.recurrence.layout import lay_out

B, T, D, S = 2, 19, 3, 9
CAPACITY = S - 1
CHUNKS = {"direct": 5, "fft": 5, "monarch": 8}
LEAK = {"direct": 0.0, "fft": 1e-5, "monarch": 1e-5}
forms = pytest.mark.parametrize("form", CHUNKS)


# Rows of 19 tokens as (positions, segments), two rows each.
def rows(*documents: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each row is a list of (length, segment, first position); first position -1 is padding."""
    positions, segments = (np.full((len(documents), T), -1, np.int32) for _ in range(2))
    for row, pieces in enumerate(documents):
        at = 0
        for length, segment, first in pieces:
            if first >= 0:
                positions[row, at : at + length] = np.arange(first, first + length)
            segments[row, at : at + length] = segment
            at += length
    return positions, segments


WHOLE = rows([(19, 5, 4)], [(19, 2, 0)])
PACKED = rows(
    [(2, 9, -1), (3, 5, 4), (1, 5, -1), (1, 5, 7), (5, 6, 0), (2, 6, -1), (3, 7, 2), (2, 0, -1)],
    [(7, 2, 0), (1, 3, 0), (9, 4, 0), (2, 4, -1)],
)
GAPS = rows(  # too wide for a layout
    [(3, 5, 9), (2, 5, 70), (4, 6, 0), (3, 6, 6), (7, 8, 1)],
    [(5, 2, 0), (1, 2, 5), (1, 2, 7), (3, 2, 99), (9, 3, 0)],
)
EMPTY = rows([(19, 5, -1)], [(3, 1, -1), (1, 1, 0), (15, 1, -1)])
ROWS = {"whole": WHOLE, "packed": PACKED, "gaps": GAPS, "empty": EMPTY}
ALIGNED = rows([(19, 0, 0)], [(19, 0, 0)])


def values(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, kernel and skip; only the inputs follow the seed."""
    fixed = np.random.default_rng(1)
    u = np.random.default_rng(seed).normal(size=(B, T, D))
    arrays = (u, fixed.normal(size=(D, S)), fixed.normal(size=D))
    return tuple(x.astype(np.float32) for x in arrays)


WEIGHT = np.random.default_rng(2).normal(size=(B, T, D)).astype(np.float32)


def visible(where: tuple) -> np.ndarray:
    """[B T S]: which tokens a token may see, by the definition of a document."""
    positions, segments = where
    live = positions >= 0
    same = segments[:, :, None] == segments[:, None, :]
    return same & live[:, :, None] & live[:, None, :] & np.tri(positions.shape[1], dtype=bool)


def plain(u, kernel, skip, where, weight=WEIGHT, *, seen=visible, late=0):
    """y and the gradients of sum(weight y) by u, kernel and skip: all pairs, in numpy's float64."""
    u, kernel, skip, weight = (np.asarray(x, np.float64) for x in (u, kernel, skip, weight))
    positions, live = where[0], (where[0] >= 0)[..., None]
    lag = positions[:, :, None] - positions[:, None, :] + late
    pair = seen(where) & (lag >= 0) & (lag < S)
    tap = np.where(pair, lag, 0)
    K = np.where(pair[..., None], kernel.T[tap], 0)  # [B T S D]
    x = np.where(live, u, 0) if seen is visible else u
    w = np.where(live, weight, 0)
    y = np.where(live, np.einsum("btsd,bsd->btd", K, x) + skip * x, 0)
    du = np.einsum("btsd,btd->bsd", K, w) + skip * w
    dK = np.zeros(kernel.shape)
    for at in np.argwhere(pair):
        b, t, s = at
        dK[:, tap[b, t, s]] += w[b, t] * x[b, s]
    return y, (np.where(live, du, 0), dK, (w * x).sum((0, 1)))


@cache
def program(form: str, wrap: Callable = lambda f: f, **options):
    """(u, kernel, skip, positions, segments, weight) -> (y, gradients), compiled per shape."""
    options = {"form": form, "chunk": CHUNKS[form]} | options

    def loss(u, kernel, skip, positions, segments, weight):
        y, none = wrap(partial(long_convolution, **options))(
            u, kernel, positions=positions, segments=segments, skip=skip
        )
        assert none is None
        return jnp.sum(y * weight), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def runner(form: str, **options) -> Callable:
    def run(u, kernel, skip, where, weight=WEIGHT):
        (_, y), gradients = program(form, **options)(u, kernel, skip, *where, weight)
        return np.asarray(y), jax.tree.map(np.asarray, gradients)

    return run


def near(got, want, rel: float, what: str = "") -> None:
    """Every leaf within `rel` of its largest value."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), what
        error = np.abs(a - b).max(initial=0) / max(1e-6, np.abs(b).max(initial=0))
        assert error <= rel, (what, error)


# L5, L20, L21: every form is all pairs of tokens, in values and gradients.


def is_the_sum_over_pairs(run: Callable, at: str) -> None:
    got, want = run(*values(), ROWS[at]), plain(*values(), ROWS[at])
    near(got[0], want[0], 2e-5, at)
    near(got[1], want[1], 1e-4, at)


@forms
@pytest.mark.parametrize("at", ROWS)
def test_a_form_is_the_sum_over_pairs(form, at):
    is_the_sum_over_pairs(runner(form), at)


@forms
def test_an_aligned_row_is_the_same_row(form):
    """As one chunk of spectra, or several chunks of numbers."""
    run, want = runner(form, aligned=True, chunk=None), plain(*values(), ALIGNED)
    near(run(*values(), ALIGNED), want, 2e-5)


def test_in_float64_a_form_is_exact_and_remat_changes_nothing():
    arrays = [x.astype(np.float64) for x in (*values(), WEIGHT)]
    with jax.enable_x64(True):
        for form, wrap in (("fft", jax.checkpoint), ("monarch", lambda f: f)):
            got = runner(form, wrap=wrap)(*arrays[:3], PACKED, arrays[3])
            near(got, plain(*arrays[:3], PACKED, arrays[3]), 1e-12)


@pytest.mark.parametrize("at", ROWS)
def test_these_rows_take_both_ways(at):
    place = (jnp.full(B, -1), jnp.full(B, -1))
    given = Rows(*(jnp.asarray(x) for x in ROWS[at]), place)
    fits = jax.jit(lambda rows: lay_out(timeline(rows), rows.before[0], 5).fits)(given)
    assert fits == (at != "gaps")


# L1, L2, L3: what is later, or another document's, changes nothing; all of the past does.


def is_causal(run: Callable, leak: float) -> None:
    u, kernel, skip = values()
    for where in (WHOLE, PACKED):
        before = run(u, kernel, skip, where)[0]
        scale = np.abs(before).max()
        for t in (0, 3, 7, 8, 13, T - 2):
            noise = values(90 + t)[0] * (10 if leak == 0 else 1)
            after = run(np.where(np.arange(T)[:, None] > t, noise, u), kernel, skip, where)[0]
            assert np.abs(after - before)[:, : t + 1].max() <= leak * scale, t


@forms
def test_the_future_changes_nothing(form):
    is_causal(runner(form), LEAK[form])


def sees_its_past(run: Callable, leak: float) -> None:
    u, kernel, skip = values()
    for where in (WHOLE, PACKED):
        positions, segments = where
        touched = np.zeros((B, T, T))
        for t in range(T):
            weight = np.zeros((B, T, D), np.float32)
            weight[:, t] = 1
            touched[:, t] = np.abs(run(u, kernel, skip, where, weight)[1][0]).max(axis=-1)
        lag = positions[:, :, None] - positions[:, None, :]
        seen = visible(where) & (lag < S)
        assert (touched[seen] > 1e-3).all()
        assert touched[~seen].max() <= leak
        assert (touched[segments[:, :, None] != segments[:, None, :]] == 0.0).all()


@forms
def test_a_token_sees_its_document_so_far_and_nothing_else(form):
    sees_its_past(runner(form), LEAK[form])


# L6, L7, L8: batches, padding, neighbours.


def is_independent(run: Callable) -> None:
    """A batch mate that fits no layout sends both rows the slow way; else nothing moves at all."""
    u, kernel, skip = values()
    want = run(u, kernel, skip, PACKED)[0][0]
    other = u.copy()
    other[1] = values(3)[0][1]
    np.testing.assert_array_equal(run(other, kernel, skip, PACKED)[0][0], want)
    mixed = tuple(np.stack([p[0], g[1]]) for p, g in zip(PACKED, GAPS, strict=True))
    near(run(u, kernel, skip, mixed)[0][0], want, 2e-6)


@forms
def test_a_row_does_not_know_its_batch(form):
    is_independent(runner(form))


LINES = {
    "left": [(8, 0, -1), (11, 2, 0)],
    "right": [(11, 2, 0), (8, 0, -1)],
    "middle": [(1, 0, -1), (4, 2, 0), (1, 2, -1), (5, 2, 4), (6, 2, -1), (2, 2, 9)],
}


def ignores_padding(run: Callable) -> None:
    document, kernel, skip = values(8)
    wants = None
    for name, pieces in LINES.items():
        where = rows(pieces, pieces)
        live = where[0][0] >= 0
        for fill in (7.0, np.nan):
            u, weight = np.full((B, T, D), fill, np.float32), np.zeros((B, T, D), np.float32)
            u[:, live], weight[:, live] = document[:, :11], WEIGHT[:, :11]
            y, (du, *rest) = run(u, kernel, skip, where, weight)
            assert (y[:, ~live] == 0).all()
            assert (du[:, ~live] == 0).all()
            got = (y[:, live], du[:, live], *rest)
            wants = got if wants is None else wants
            near(got, wants, 1e-5, f"{name}, {fill}")


@forms
def test_padding_anywhere_is_neither_read_nor_written(form):
    ignores_padding(runner(form))


PLACES = {
    0: [(11, 2, 0), (5, 3, 0), (3, 4, 0)],
    3: [(3, 1, 0), (11, 2, 0), (5, 3, 0)],
    8: [(5, 8, 0), (3, 1, 0), (11, 2, 0)],
}


def ignores_neighbours(run: Callable) -> None:
    document, kernel, skip = values(8)
    wants = None
    for first, pieces in PLACES.items():
        here, seen = slice(first, first + 11), []
        for seed in (20, 21):
            u = values(seed)[0]
            u[:, here] = document[:, :11]
            seen.append(run(u, kernel, skip, rows(pieces, pieces))[0][:, here])
        np.testing.assert_array_equal(*seen)
        wants = seen[0] if wants is None else wants
        near(seen[0], wants, 1e-5)


@forms
def test_a_document_is_the_same_wherever_it_is_packed(form):
    ignores_neighbours(runner(form))


# L4, G5: pieces of any lengths are the whole. The first row has read three tokens of a document.


def begun() -> dict[str, np.ndarray]:
    state = {k: np.array(v) for k, v in long_state(B, D, CAPACITY).items()}
    for p in (1, 2, 3):
        state["inputs"][0, p - 1], state["positions"][0, p - 1] = values(p)[0][0, 0], p
    state["count"][0], state["position"][0], state["segment"][0] = 3, 3, 5
    return state


@cache
def step():
    return jax.jit(
        lambda u, kernel, skip, positions, segments, state: long_convolution(
            u, kernel, positions=positions, segments=segments, state=state, skip=skip, chunk=5
        )
    )


def from_state(where: tuple) -> np.ndarray:
    """What rows give that go on after `begun`: the tokens before them stand in front."""
    state, (u, kernel, skip) = begun(), values()
    before = np.where(state["positions"][:, :3] >= 0, state["segment"][:, None], -2)
    longer = (
        np.concatenate([state["positions"][:, :3], where[0]], axis=1),
        np.concatenate([before, where[1]], axis=1),
    )
    u = np.concatenate([state["inputs"][:, :3], u], axis=1)
    weight = np.zeros(u.shape)
    return plain(u, kernel, skip, longer, weight)[0][:, 3:]


def remembered(state: dict) -> list:
    """The filled slots of each row in order of position, whichever slots they are."""
    rows = zip(state["positions"], state["inputs"], strict=True)
    return [[(p, *x) for p, x in sorted(zip(*row, strict=True), key=lambda slot: slot[0]) if p >= 0]
            for row in jax.tree.map(np.asarray, list(rows))]  # fmt: skip


SPLITS = ([19], [1] * 19, [3] * 6 + [1], [7, 3, 1, 7, 1])


def pieces_are_the_whole(where: tuple, between: Callable = lambda state: state) -> None:
    u, kernel, skip = values()
    want, after = from_state(where), None
    for split in SPLITS:
        at, state, y = 0, begun(), []
        for length in split:
            part = slice(at, at + length)
            positions, segments = (x[:, part] for x in where)
            out, state = step()(u[:, part], kernel, skip, positions, segments, between(state))
            y.append(out)
            at += length
        near(np.concatenate(y, axis=1), want, 2e-5, f"{split}")
        kept = (remembered(state), np.asarray(state["position"]).tolist())
        after = kept if after is None else after
        assert kept == after


@pytest.mark.parametrize("at", ROWS)
def test_pieces_are_the_whole(at):
    pieces_are_the_whole(ROWS[at])


def test_padding_holds_the_state_still():
    u, kernel, skip = values()
    y, state = step()(u, kernel, skip, *EMPTY, begun())
    assert (np.asarray(y)[0] == 0).all()
    for key, before in begun().items():
        np.testing.assert_array_equal(state[key][0], before[0])


def test_the_state_is_float32_and_as_large_as_it_claims():
    empty = long_state(1, D, CAPACITY)
    assert sum(x.nbytes for x in empty.values()) == long_state_bytes(1, D, CAPACITY)
    for t, dtype in ((1, jnp.bfloat16), (40, jnp.float32), (T, jnp.bfloat16)):
        where = np.zeros((1, t), np.int32)
        y, state = jax.eval_shape(
            long_convolution, jax.ShapeDtypeStruct((1, t, D), dtype), values()[1],
            positions=where, segments=where, state=empty,
        )  # fmt: skip
        assert y.dtype == dtype
        assert {k: (x.shape, x.dtype) for k, x in state.items()} == {
            k: (x.shape, x.dtype) for k, x in empty.items()
        }


# Planted faults: each law fails on a program that breaks it.


def later_too(where):
    return visible(where) | visible(where).swapaxes(1, 2)


def every_document(where):
    return np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))


FAULTS = {
    "off by one": (partial(is_the_sum_over_pairs, at="packed"), {"late": 1}),
    "leaks": (partial(is_causal, leak=0.0), {"seen": later_too, "late": 3}),
    "drops a tap": (partial(sees_its_past, leak=0.0), {"late": 1}),
    "forgets segments": (ignores_neighbours, {"seen": every_document}),
    "reads padding": (ignores_padding, {"seen": every_document}),
    "shares its batch": (is_independent, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_law_catches_its_fault(fault):
    law, options = FAULTS[fault]
    run = partial(plain, **options)
    if fault == "shares its batch":
        run = lambda u, *rest: plain(u - u.mean(axis=0), *rest)  # noqa: E731
    with pytest.raises(AssertionError):
        law(run)


@pytest.mark.parametrize("lost", ["inputs", "positions"])
def test_the_law_of_pieces_catches_a_lost_state(lost):
    with pytest.raises(AssertionError):
        pieces_are_the_whole(WHOLE, lambda state: state | {lost: np.zeros_like(begun()[lost])})
