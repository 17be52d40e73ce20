"""The selective scan against plain numpy: pieces, gradients, the ends of its range, its cost."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.ops.recurrence.selective_scan import (
    exact_selective_scan_flops,
    selective_scan,
    selective_scan_flops,
)

B, T, D, P = 2, 13, 3, 4
POSITIONS = np.array(
    [[4, 5, -1, -1, 6, 9, 0, 1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, -1, 3, -1, 4, -1, -1]],
    np.int32,
)
SEGMENTS = np.array(
    [[5, 5, 5, 5, 5, 5, 6, 6, 8, 8, 8, 8, 8], [2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 3, 1, 1]], np.int32
)
PLACE = {"position": np.array([3, -1], np.int32), "segment": np.array([5, -1], np.int32)}
NAMES = ("x", "dt", "b", "c", "a_log", "skip", "h")
Arrays = dict[str, np.ndarray]


def given(seed: int = 0, **changed: np.ndarray) -> Arrays:
    """All that is differentiated; the memory stands at position 3 of segment 5, and is empty."""
    rng = np.random.default_rng(seed)
    made = {
        "x": rng.normal(size=(B, T, D)),
        "dt": rng.exponential(size=(B, T, D)),
        "b": rng.normal(size=(B, T, P)),
        "c": rng.normal(size=(B, T, P)),
        "a_log": rng.normal(size=(D, P)) - 1,
        "skip": rng.normal(size=D),
        "h": rng.normal(size=(B, P, D)),
    }
    return {k: v.astype(np.float32) for k, v in (made | changed).items()}


def plain(x, dt, b, c, a_log, skip, h) -> tuple[np.ndarray, np.ndarray]:
    """y and the last memory, token by token and channel by channel in float64."""
    A = -np.exp(np.float64(a_log))
    y, end = np.zeros(x.shape), np.array(h, np.float64)
    for row in range(B):
        position, segment = (PLACE[k][row] for k in ("position", "segment"))
        for t in np.flatnonzero(POSITIONS[row] >= 0):
            if position < 0 or SEGMENTS[row, t] != segment:
                end[row] = 0
            for d in range(D):
                step = np.float64(dt[row, t, d])
                with np.errstate(under="ignore"):
                    end[row, :, d] *= np.exp(step * A[d])
                end[row, :, d] += step * b[row, t] * x[row, t, d]
                y[row, t, d] = c[row, t] @ end[row, :, d] + skip[d] * x[row, t, d]
            position, segment = POSITIONS[row, t], SEGMENTS[row, t]
    return y, end


def weights(size: tuple[int, ...]) -> np.ndarray:
    return np.sin(1 + np.arange(np.prod(size))).reshape(size)


@cache
def program(piece: int = 4):
    """((loss, (y, memory)), gradients by everything), compiled."""

    def loss(given):
        state = {"h": given.pop("h"), **jax.tree.map(jnp.asarray, PLACE)}
        where = {"positions": jnp.asarray(POSITIONS), "segments": jnp.asarray(SEGMENTS)}
        y, state = selective_scan(**given, **where, state=state, piece=piece)
        h = state["h"]
        return jnp.sum(weights(y.shape) * y) + jnp.sum(weights(h.shape) * h), (y, h)

    return jax.jit(jax.value_and_grad(lambda given: loss(dict(given)), has_aux=True))


def agree(got, want, rel: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rel * max(1e-3, np.abs(b).max())


@pytest.mark.parametrize("piece", [4, 64])
def test_it_is_the_recurrence_in_numpy(piece):
    (_, got), _ = program(piece)(given())
    agree(got, plain(**given()))


def test_the_comparison_catches_a_wrong_rate():
    wrong = given() | {"a_log": given()["a_log"] + np.float32(0.001)}
    with pytest.raises(AssertionError):
        agree(program()(wrong)[0][1], plain(**given()))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_written_by_hand_is_the_slope_of_numpy(name):
    _, gradients = program()(given())
    rng = np.random.default_rng(5)
    for _ in range(3):
        way, step, losses = rng.normal(size=given()[name].shape), 1e-6, []
        for sign in (1, -1):
            moved = {k: v.astype(np.float64) for k, v in given().items()}
            moved[name] = moved[name] + sign * step * way
            losses.append(sum(np.sum(weights(v.shape) * v) for v in plain(**moved)))
        slope = (losses[0] - losses[1]) / (2 * step)
        size = np.abs(gradients[name] * way).sum()  # of the terms that rounding is relative to
        assert abs(np.vdot(gradients[name], way) - slope) <= 1e-5 * size
        with pytest.raises(AssertionError):
            assert abs(np.vdot(1.001 * gradients[name], way) - slope) <= 1e-5 * abs(slope)


ENDS = {
    "no step at all": {"dt": np.zeros((B, T, D))},
    "no memory": {"a_log": np.full((D, P), 200.0)},
    "no loss": {"a_log": np.full((D, P), -200.0)},
    "hardly any": {"a_log": np.full((D, P), np.log(1e-7))},
    "products below 1e-38": {"a_log": np.full((D, P), np.log(60.0))},
}


@pytest.mark.parametrize("end", ENDS)
def test_the_ends_of_the_range_are_finite_and_right(end):
    values = given(**ENDS[end])
    (_, got), gradients = program()(values)
    agree(got, plain(**values))
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_padding_may_hold_nan():
    live = (POSITIONS >= 0)[..., None]
    hidden = {
        k: np.where(live, v, np.nan).astype(np.float32) if k in NAMES[:4] else v
        for k, v in given().items()
    }
    (_, got), gradients = program()(hidden)
    agree(got, plain(**given()))
    assert (np.where(live, 0, got[0]) == 0).all()
    _, wanted = program()(given())
    agree(gradients.values(), wanted.values(), 1e-6)


def test_it_holds_no_array_of_every_state_of_every_token():
    """At T = 512 the memories of all tokens are 8 MB; pieces of 16 keep 32 of them."""
    T, D, P = 512, 256, 16
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    where = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(x, dt, b, c, a_log, skip, where):
        y, _ = selective_scan(
            x, dt, b, c, a_log=a_log, skip=skip, positions=where, segments=where, piece=16
        )
        return jnp.sum(y**2)

    tokens = (shape(1, T, D), shape(1, T, D), shape(1, T, P), shape(1, T, P))
    run = jax.jit(jax.grad(loss, argnums=range(6)))
    lowered = run.lower(*tokens, shape(D, P), shape(D), where)
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 8 * 4 * T * D < 4 * T * D * P


@pytest.mark.parametrize("length", [1, 64, 100])
def test_it_costs_its_closed_form(length):
    def run(x, b, a_log, skip, where):
        y, _ = selective_scan(
            x, x, b, b, a_log=a_log, skip=skip, positions=where, segments=where, piece=16
        )
        return jnp.sum(y**2)

    shapes = ((B, length, D), (B, length, P), (D, P), (D,))
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    given.append(jax.ShapeDtypeStruct((B, length), jnp.int32))
    closed = selective_scan_flops(B, length, D, P, 16)
    assert flops.count(run, *given).total == closed.forward
    both = flops.count(jax.grad(run, argnums=(0, 1, 2, 3)), *given)
    assert both.unknown == ()
    assert both.total == closed.forward + closed.backward
    exact = exact_selective_scan_flops(B, length, D, P)
    assert exact.forward <= closed.forward
    assert exact.backward <= closed.backward


def test_bfloat16_inputs_lose_only_their_own_rounding():
    low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in given().items() if k in NAMES[:4]}
    values = given() | {k: np.asarray(v, np.float32) for k, v in low.items()}
    (_, (y, h)), _ = program()(given() | low)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    exact, end = plain(**values)
    agree([h], [end])
    rounded = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact).max()
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2 * rounded


def test_a_piece_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="piece must be at least 1, got 0"):
        program(0)(given())
