"""The short convolution against plain numpy: documents, padding, pieces, states, gradients."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.convolution.short import short_convolution, short_state

B, T, D, W = 2, 13, 3, 4
ALIGNED = (np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.zeros((B, T), np.int32))
PACKED = (
    np.array(
        [[-1, 4, 5, -1, -1, 9, 0, 1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, -1, 3, -1, 4, -1, -1]],
        np.int32,
    ),
    np.array(
        [[7, 5, 5, 5, 5, 5, 6, 6, 8, 8, 8, 8, 8], [2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 3, 1, 1]], np.int32
    ),
)
EMPTY = (np.full((B, T), -1, np.int32), np.zeros((B, T), np.int32))
ROWS = {"aligned": ALIGNED, "packed": PACKED, "empty": EMPTY}


def given(width: int = W, seed: int = 0) -> tuple:
    """x, weight, bias, and a state at position 3 of segment 5, empty in the second row."""
    rng = np.random.default_rng(seed)
    x, weight, bias = rng.normal(size=(B, T, D)), rng.normal(size=(D, width)), rng.normal(size=D)
    state = {"inputs": rng.normal(size=(B, width - 1, D)).astype(np.float32)}
    state |= {"position": np.array([3, -1], np.int32), "segment": np.array([5, -1], np.int32)}
    return *(v.astype(np.float32) for v in (x, weight, bias)), state


def plain(x, weight, bias, state, positions, segments) -> tuple[np.ndarray, dict]:
    """A list of inputs per document, token by token, in float64."""
    y, after = np.zeros(x.shape), {k: v.copy() for k, v in state.items()}
    width = weight.shape[1]
    for b in range(len(x)):
        seen, position, segment = (
            list(state["inputs"][b]),
            *(state[k][b] for k in ("position", "segment")),
        )
        for t in np.flatnonzero(positions[b] >= 0):
            if position < 0 or segments[b, t] != segment:
                seen = [np.zeros(x.shape[2])] * (width - 1)
            seen.append(np.float64(x[b, t]))
            position, segment = positions[b, t], segments[b, t]
            y[b, t] = bias + sum(seen[-1 - j] * weight[:, width - 1 - j] for j in range(width))
        after["inputs"][b] = np.reshape(seen[len(seen) - width + 1 :], (width - 1, x.shape[2]))
        after["position"][b], after["segment"][b] = position, segment
    return y, after


@cache
def program(aligned: bool = False, wrap=lambda f: f):
    """((loss, (y, state)), gradients by x, weight, bias and the state's inputs), compiled."""

    def loss(x, weight, bias, inputs, place, positions, segments):
        state = {"inputs": inputs, **place}
        at = {"positions": positions, "segments": segments, "state": state, "aligned": aligned}
        y, state = wrap(partial(short_convolution, **at))(x, weight, bias)
        total = jnp.sum(jnp.sin(1 + jnp.arange(y.size)).reshape(y.shape) * y)
        inputs = state["inputs"]
        weights = jnp.cos(1 + jnp.arange(inputs.size)).reshape(inputs.shape)
        return total + jnp.sum(weights * inputs), (y, state)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def call(at: tuple, x, weight, bias, state, **options):
    place = {k: state[k] for k in ("position", "segment")}
    return program(**options)(x, weight, bias, state["inputs"], place, *at)


def agree(got: tuple, want: tuple, atol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("at", ROWS)
def test_it_is_a_list_of_inputs_in_numpy(at):
    (_, got), _ = call(ROWS[at], *given())
    agree(got, plain(*given(), *ROWS[at]))
    if at == "empty":
        np.testing.assert_array_equal(got[1]["inputs"], given()[3]["inputs"])


def test_the_comparison_catches_a_filter_that_is_off_by_one():
    x, weight, bias, state = given()
    (_, got), _ = call(PACKED, x, np.roll(weight, 1, axis=1), bias, state)
    with pytest.raises(AssertionError):
        agree(got, plain(x, weight, bias, state, *PACKED))


def test_aligned_rows_need_no_moving():
    """The second row starts a document, the first continues one at its next position."""
    at = (ALIGNED[0] + np.array([[4], [0]], np.int32), ALIGNED[1] + np.array([[5], [2]], np.int32))
    fast, slow = (call(at, *given(), aligned=aligned) for aligned in (True, False))
    agree(fast, slow)
    agree(fast[0][1], plain(*given(), *at))


def test_gradients_are_the_finite_differences():
    """It is linear in each argument, so that a difference of any size is exact."""
    with jax.enable_x64(True):
        *point, state = given()
        point = [v.astype(np.float64) for v in (*point, state["inputs"])]
        place = {k: state[k] for k in ("position", "segment")}
        run = program()
        (base, _), gradients = run(*point, place, *PACKED)
        rng = np.random.default_rng(3)
        for i, g in enumerate(gradients):
            way = rng.normal(size=g.shape)
            moved = [*point[:i], point[i] + way, *point[i + 1 :]]
            rise = run(*moved, place, *PACKED)[0][0] - base
            np.testing.assert_allclose(rise, np.vdot(g, way), rtol=1e-9)


def test_padding_may_hold_nan():
    x, weight, bias, state = given()
    live = PACKED[0] >= 0
    (_, want), gradients = call(PACKED, np.where(live[..., None], x, 0), weight, bias, state)
    got = call(PACKED, np.where(live[..., None], x, np.nan).astype(np.float32), weight, bias, state)
    agree((got[0][1], got[1]), (want, gradients), 1e-6)
    assert (np.asarray(got[0][1][0])[~live] == 0).all()


@pytest.mark.parametrize("split", [[1] * T, [2] * 6 + [1], [5, 1, 7]], ids=str)
def test_pieces_shorter_than_the_filter_are_the_whole(split):
    x, weight, bias, state = given()
    y, at = [], 0
    run = jax.jit(short_convolution)
    for length in split:
        part = slice(at, at + length)
        positions, segments = (v[:, part] for v in PACKED)
        out, state = run(
            x[:, part], weight, bias, positions=positions, segments=segments, state=state
        )
        y, at = [*y, out], at + length
    agree((np.concatenate(y, axis=1), state), plain(*given(), *PACKED))


def test_nothing_before_is_the_empty_state():
    x, weight, bias, _ = given()
    where = {"positions": PACKED[0], "segments": PACKED[1]}
    run = jax.jit(short_convolution)
    y, nothing = run(x, weight, bias, **where)
    assert nothing is None
    agree(y, run(x, weight, bias, **where, state=short_state(B, D, W))[0], 1e-6)
    bare, _ = run(x, weight, **where)
    agree(np.where((PACKED[0] >= 0)[..., None], np.asarray(bare) + bias, 0), y, 1e-6)


def test_vmap_remat_and_eager_change_nothing():
    x, weight, bias, state = given()
    want = call(PACKED, x, weight, bias, state)
    agree(call(PACKED, x, weight, bias, state, wrap=jax.checkpoint), want, 1e-6)

    def one(x, state, positions, segments):
        taps = jnp.asarray(weight), jnp.asarray(bias)
        return short_convolution(x, *taps, positions=positions, segments=segments, state=state)

    rows = jax.tree.map(jnp.asarray, (x, state, *PACKED))
    alone = jax.tree.map(lambda v: v[:, None], rows)
    y, after = jax.jit(jax.vmap(one))(*alone)
    agree((y[:, 0], jax.tree.map(lambda v: v[:, 0], after)), want[0][1])


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_filters(width):
    x, weight, bias, state = given(width)
    agree(call(PACKED, x, weight, bias, state)[0][1], plain(x, weight, bias, state, *PACKED))


def test_bfloat16_inputs_lose_only_their_own_rounding():
    x, weight, bias, state = given()
    low = jnp.asarray(x, jnp.bfloat16)
    (_, (y, after)), _ = call(ALIGNED, low, weight, bias, state)
    assert y.dtype == jnp.bfloat16
    assert after["inputs"].dtype == jnp.float32
    exact, _ = plain(np.asarray(low, np.float64), weight, bias, state, *ALIGNED)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_a_state_of_another_width_is_refused():
    x, weight, bias, _ = given()
    with pytest.raises(ValueError, match="must hold 3 inputs for a weight of width 4, got 1"):
        call(ALIGNED, x, weight, bias, given(2)[3])
