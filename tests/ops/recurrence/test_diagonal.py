"""The diagonal recurrence against plain numpy: every form, gradients, the ends of the range."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.ops.recurrence.diagonal import (
    FASTEST,
    FORMS,
    diagonal_recurrence,
    diagonal_state,
    fastest,
)

B, T, D = 2, 13, (3, 2)
POSITIONS = np.array(
    [[4, 5, -1, -1, 6, 9, 0, 1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, -1, 3, -1, 4, -1, -1]],
    np.int32,
)
SEGMENTS = np.array(
    [[5, 5, 5, 5, 5, 5, 6, 6, 8, 8, 8, 8, 8], [2, 2, 2, 2, 3, 3, 3, 3, 3, 0, 3, 1, 1]], np.int32
)
PLACE = {"position": np.array([3, -1], np.int32), "segment": np.array([5, -1], np.int32)}


def given(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log_a, b and the memory before the rows: at position 3 of segment 5, none in the second."""
    rng = np.random.default_rng(seed)
    log_a = -rng.exponential(size=(B, T, *D))
    return tuple(
        np.float32(x) for x in (log_a, rng.normal(size=log_a.shape), rng.normal(size=(B, *D)))
    )


def weights(size: tuple[int, ...]) -> np.ndarray:
    return np.sin(1 + np.arange(np.prod(size))).reshape(size)


def plain(log_a, b, h) -> tuple[np.ndarray, np.ndarray]:
    """Every h, and the last one, token by token in float64."""
    y, end = np.zeros(b.shape), np.array(h, np.float64)
    for row in range(B):
        position, segment = (PLACE[k][row] for k in ("position", "segment"))
        for t in np.flatnonzero(POSITIONS[row] >= 0):
            same = position >= 0 and SEGMENTS[row, t] == segment
            faded = np.exp(np.float64(log_a[row, t])) * end[row] if same else 0
            y[row, t] = end[row] = faded + b[row, t]
            position, segment = POSITIONS[row, t], SEGMENTS[row, t]
    return y, end


def plain_gradients(log_a, b, h) -> list[np.ndarray]:
    """Of the weighed sum of what `plain` gives; exact, because it is linear in b and h."""
    point, gradients = [np.float64(x) for x in (log_a, b, h)], []

    def loss(*point):
        y, end = plain(*point)
        return np.sum(weights(y.shape) * y) + np.sum(weights(end.shape) * end)

    for i, x in enumerate(point):
        g, step = np.zeros(x.shape), 1e-6 if i == 0 else 1.0
        for at in np.ndindex(x.shape):
            ahead, behind = ([*point] for _ in range(2))
            ahead[i], behind[i] = x.copy(), x.copy()
            ahead[i][at] += step
            behind[i][at] -= step
            g[at] = (loss(*ahead) - loss(*behind)) / (2 * step)
        gradients.append(g)
    return gradients


@cache
def program(form: str, chunk: int = 4):
    """((loss, (h, state)), gradients by log_a, b and the memory), compiled."""

    def loss(log_a, b, h):
        where = {"positions": jnp.asarray(POSITIONS), "segments": jnp.asarray(SEGMENTS)}
        y, state = diagonal_recurrence(
            log_a,
            b,
            **where,
            state={"h": h, **jax.tree.map(jnp.asarray, PLACE)},
            form=form,
            chunk=chunk,
        )
        total = jnp.sum(weights(y.shape) * y) + jnp.sum(weights(h.shape) * state["h"])
        return total, (y, state["h"])

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def agree(got, want, rel: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rel * max(1e-3, np.abs(b).max())


@cache
def wanted() -> list[np.ndarray]:
    return plain_gradients(*given())


@pytest.mark.parametrize(("form", "chunk"), [*((form, 4) for form in FORMS), ("chunked", 64)])
def test_every_form_is_the_recurrence_in_numpy_with_its_gradients(form, chunk):
    (_, got), gradients = program(form, chunk)(*given())
    agree(got, plain(*given()))
    agree(gradients, wanted(), 3e-5)


def test_the_comparison_catches_a_wrong_factor():
    log_a, b, h = given()
    (_, got), gradients = program("sequential")(log_a * np.float32(1.001), b, h)
    for a, b in ((got, plain(*given())), (gradients, wanted())):
        with pytest.raises(AssertionError):
            agree(a, b, 3e-5)


ENDS = {"no memory": -np.inf, "no loss": 0.0, "hardly any": -1e-7, "products below 1e-38": -60.0}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ENDS)
def test_the_ends_of_the_range_are_finite_and_right(form, end):
    log_a, b, h = given()
    log_a = np.full_like(log_a, ENDS[end])
    log_a[:, ::3, 0] = -0.5  # beside usual factors, in the same chunk
    (_, got), gradients = program(form)(log_a, b, h)
    agree(got, plain(log_a, b, h))
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_padding_may_hold_nan(form):
    live = (POSITIONS >= 0)[..., None, None]
    log_a, b, h = given()
    (_, (y, end)), gradients = program(form)(
        np.where(live, log_a, np.nan).astype(np.float32), np.where(live, b, np.nan), h
    )
    agree((y, end), plain(log_a, b, h))
    agree(gradients, wanted(), 3e-5)
    assert all((np.where(live, 0, x) == 0).all() for x in (y, *gradients[:2]))


def test_second_derivatives_pass_through_every_form():
    @jax.jit
    def curved(log_a, b, h):
        def bend(form):
            return jax.grad(lambda x: jnp.sum(program(form)(x, b, h)[1][0] ** 2))(log_a)

        return [bend(form) for form in FORMS]

    first, *others = curved(*given())
    assert np.abs(first).max() > 1e-2
    for other in others:
        agree([other], [first], 1e-4)


def test_auto_is_the_form_that_was_measured_to_be_the_fastest():
    results = Path(__file__).parents[3] / "experiments" / "results" / "scans.json"
    lines = [x for x in json.loads(results.read_text()) if x["workload"].startswith("forms")]
    for name in {line["workload"] for line in lines}:
        took = {x["program"].split()[0]: x["ms"][0] for x in lines if x["workload"] == name}
        assert set(FORMS) <= set(took)
        assert took[FASTEST["cpu"]] <= 1.2 * min(took[form] for form in FORMS)


def test_auto_is_the_platforms_form():
    assert fastest() == FASTEST["cpu"]
    assert fastest("tpu") == FASTEST["tpu"]
    assert fastest("a new platform") in FORMS
    assert set(FASTEST.values()) <= set(FORMS)
    (_, got), _ = program("auto")(*given())
    (_, want), _ = program(FASTEST["cpu"])(*given())
    agree(got, want, 0)


def test_bfloat16_inputs_lose_only_their_own_rounding():
    """Many steps of a memory that stays: sums in bfloat16 would stop at 256."""
    b = np.ones((1, 512, 1), jnp.bfloat16)
    where = {"positions": np.arange(512, dtype=np.int32)[None], "segments": np.zeros((1, 512), int)}
    run = jax.jit(diagonal_recurrence, static_argnames="form")
    for form in FORMS:
        h, state = run(0 * b, b, **where, state=diagonal_state(1, 1), form=form)
        assert h.dtype == jnp.bfloat16
        assert state["h"].dtype == jnp.float32
        np.testing.assert_array_equal(state["h"], 512)


def test_forms_and_chunks_that_are_none_are_refused():
    log_a, b, _ = (jnp.asarray(x) for x in given())
    where = {"positions": jnp.asarray(POSITIONS), "segments": jnp.asarray(SEGMENTS)}
    with pytest.raises(ConfigError, match=r"form must be one of 'auto', .* got 'sequental'"):
        diagonal_recurrence(log_a, b, **where, form="sequental")
    with pytest.raises(ConfigError, match="chunk must be at least 1, got 0"):
        diagonal_recurrence(log_a, b, **where, chunk=0)
