"""The damped moving average against plain numpy: definition, kernel, both sides, pieces, ends."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.flops import count
from effjax.cost.memory import stored_bytes
from effjax.errors import ConfigError
from effjax.ops.recurrence.ema import (
    damped_ema,
    ema_flops,
    ema_kernel,
    ema_state,
    ema_state_bytes,
    exact_ema_flops,
    recurrent_ema,
    two_sided_ema,
)

B, T, D, P, CHUNK = 2, 13, 3, 5, 4
NAMES = ("alpha", "delta", "beta", "eta", "omega")


def row(*documents: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """(length, segment, first position) of each stretch; first position -1 is padding."""
    positions: list[int] = []
    segments: list[int] = []
    for length, segment, first in documents:
        positions += [-1] * length if first < 0 else range(first, first + length)
        segments += [segment] * length
    return positions, segments


def rows(*each: tuple[list[int], list[int]]) -> dict[str, np.ndarray]:
    positions, segments = (np.array(x, np.int32) for x in zip(*each, strict=True))
    return {"positions": positions, "segments": segments}


# The incoming state stands at position 3 of segment 5 in the first row, and is empty in the second.
WHOLE = rows(row((13, 5, 4)), row((13, 2, 0)))
PACKED = rows(
    row((1, 9, -1), (2, 5, 4), (1, 5, -1), (1, 5, 6), (4, 6, 0), (2, 6, -1), (2, 7, 2)),
    row((5, 2, 0), (1, 3, 0), (5, 4, 0), (2, 4, -1)),
)
GAPS = rows(row((3, 5, 9), (2, 5, 70), (8, 6, 0)), row((5, 2, 0), (1, 2, 7), (7, 2, 40)))
PLACES = {"whole": WHOLE, "packed": PACKED, "gaps": GAPS}
places = pytest.mark.parametrize("at", PLACES)


def system(seed: int = 0, sides: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (*sides, D, P)
    made = {
        "alpha": rng.uniform(0.1, 0.9, shape),
        "delta": rng.uniform(0.1, 0.9, shape),
        "beta": rng.normal(size=shape),
        "eta": rng.normal(size=shape),
        "omega": rng.normal(size=D),
    }
    return {k: x.astype(np.float32) for k, x in made.items()}


def inputs(where: dict[str, np.ndarray] = WHOLE) -> np.ndarray:
    """Numbers at live tokens, NaN at padding."""
    u = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)
    return np.where(where["positions"][..., None] >= 0, u, np.float32(np.nan))


def start() -> dict[str, np.ndarray]:
    return {
        "h": np.random.default_rng(3).normal(size=(B, D, P)).astype(np.float32),
        "position": np.array([3, -1], np.int32),
        "segment": np.array([5, -1], np.int32),
    }


def plain(u, p, where, state=None):
    """h_t = phi h_{t-1} + alpha beta u_t, a step for each position, in the paper's own order."""
    p = {k: np.asarray(x, np.float64) for k, x in p.items()}
    phi, taken = 1 - p["alpha"] * p["delta"], p["alpha"] * p["beta"]
    y, left = np.zeros(u.shape), []
    for b in range(u.shape[0]):
        h, position, segment = np.zeros((D, P)), -1, -1
        if state is not None:
            h, position, segment = (
                taken * state["h"][b],
                *(int(state[k][b]) for k in ("position", "segment")),
            )
        for t in range(u.shape[1]):
            at, of = int(where["positions"][b, t]), int(where["segments"][b, t])
            if at < 0:
                continue
            same = position >= 0 and of == segment
            for _ in range(at - position if same else 0):
                h = phi * h
            h = (h if same else 0 * h) + taken * u[b, t, :, None]
            y[b, t] = (p["eta"] * h).sum(-1) / P**0.5 + p["omega"] * u[b, t]
            position, segment = at, of
        left.append(h / taken)
    return y, np.array(left)


@partial(jax.jit, static_argnames=("chunk", "aligned"))
def run(u, p, where, state=None, chunk=CHUNK, aligned=False):
    return damped_ema(u, **p, **where, state=state, chunk=chunk, aligned=aligned)


@cache
def program(form):
    """((loss, (y, state)), gradients by u, parameters and the memory), compiled."""

    def loss(u, p, h, place, where, weight):
        y, state = form(u, **p, **where, state={"h": h, **place})
        return jnp.sum(y * weight) + jnp.sum(jnp.sin(state["h"])), (y, state)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def derived(form, at, p, dtype=np.float32):
    """Values and gradients in a dtype."""
    weight = np.random.default_rng(2).normal(size=(B, T, D)).astype(dtype)
    state = start()
    place = {k: state[k] for k in ("position", "segment")}
    u, p, h = jax.tree.map(lambda x: x.astype(dtype), (inputs(PLACES[at]), p, state["h"]))
    (_, (y, after)), gradients = program(form)(u, p, h, place, PLACES[at], weight)
    return jax.tree.map(np.asarray, {"y": y, "state": after, "gradients": gradients})


def close(got, want, rel: float = 2e-5) -> None:
    """Every leaf within `rel` of its largest value."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rel * max(np.abs(b).max(), 1e-6)


chunked = partial(damped_ema, chunk=CHUNK)


@places
def test_both_forms_are_the_definition(at):
    p, where, state = system(), PLACES[at], start()
    want, left = plain(inputs(where), p, where, state)
    got = derived(chunked, at, p)
    close(got["y"], want)
    close(got["state"]["h"], left)
    with jax.enable_x64(True):
        exact = derived(recurrent_ema, at, p, np.float64)
    close(exact["y"], want, 1e-9)
    close(got["gradients"], exact["gradients"], 1e-4)
    close(got["state"], exact["state"])


def test_the_comparison_catches_another_decay_and_steps_in_place_of_positions():
    p, where = system(), PLACES["gaps"]
    want = plain(inputs(where), p, where)[0]
    close(run(inputs(where), p, where)[0], want)
    for changed, told in (({"delta": p["delta"] * np.float32(0.99)}, where), ({}, WHOLE)):
        with pytest.raises(AssertionError):
            close(run(inputs(where), p | changed, told)[0], want)


@pytest.mark.parametrize("chunk", [1, CHUNK, 64])
def test_any_chunk_gives_the_same(chunk):
    got, nothing = run(inputs(), system(), WHOLE, chunk=chunk, aligned=True)
    assert nothing is None
    close(got, plain(inputs(), system(), WHOLE)[0])


def test_the_kernel_is_the_recurrence():
    """METHODS SSM-09: y = u * K, and K has 4 D P numbers."""
    p = system()
    modes = {k: p[k] for k in NAMES[:-1]}
    kernel = np.asarray(jax.jit(partial(ema_kernel, T))(**modes), np.float64)
    u = inputs().astype(np.float64)
    y = p["omega"] * u
    for t in range(T):
        for s in range(t + 1):
            y[:, t] += kernel[:, t - s] * u[:, s]
    close(y, plain(inputs(), p, WHOLE)[0])
    close(run(inputs(), p, WHOLE)[0], y)
    assert sum(x.size for x in modes.values()) == 4 * D * P


def test_pieces_are_the_whole():
    p, u, state, made = system(), inputs(PACKED), start(), []
    whole, last = run(u, p, PACKED, state)
    for begin, end in ((0, 1), (1, 2), (2, 8), (8, 9), (9, 13)):
        where = {k: x[:, begin:end] for k, x in PACKED.items()}
        y, state = run(u[:, begin:end], p, where, state)
        made.append(y)
    close(np.concatenate(made, axis=1), whole)
    close(state, last)


def both_sides(p, where):
    """Each side by `plain`, without what a token is to itself on the second."""
    sides = [{k: p[k][i] for k in NAMES[:-1]} for i in range(2)]
    u, live = inputs(where), where["positions"] >= 0
    y = plain(u, {**sides[0], "omega": p["omega"]}, where)[0]
    mirrored = {"segments": where["segments"][:, ::-1]}
    mirrored["positions"] = np.where(live, 100 - where["positions"], -1)[:, ::-1]
    itself = (sides[1]["eta"] * sides[1]["alpha"] * sides[1]["beta"]).sum(-1) / P**0.5
    return y + plain(u[:, ::-1], {**sides[1], "omega": -itself}, mirrored)[0][:, ::-1]


@pytest.mark.parametrize(("at", "aligned"), [("packed", False), ("whole", True)])
def test_two_sides_are_a_sum_that_reads_a_token_once(at, aligned):
    p, where = system(sides=(2,)), PLACES[at]
    form = jax.jit(partial(two_sided_ema, chunk=CHUNK, aligned=aligned))
    close(form(inputs(where), **p, **where), both_sides(p, where))
    if aligned:
        swapped = {k: x[::-1] if k != "omega" else x for k, x in p.items()}
        with pytest.raises(AssertionError):
            close(form(inputs(where), **swapped, **where), both_sides(p, where))


ENDS = {
    "no memory": {"alpha": 1.0, "delta": 1.0},
    "hardly any memory": {"alpha": 1.0, "delta": 1 - 1e-7},
    "a memory that stays": {"delta": 0.0},
    "a memory that hardly fades": {"alpha": 1.0, "delta": 1e-7},
    "nothing is taken": {"alpha": 0.0},
    "products below the smallest number": {"alpha": 1.0, "delta": 0.9999},
}


@pytest.mark.parametrize("which", ENDS)
def test_the_ends_of_the_range_are_finite_and_right(which):
    p = system()
    p |= {k: np.full_like(p[k], x) for k, x in ENDS[which].items()}
    got = derived(chunked, "packed", p)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got))
    with jax.enable_x64(True):
        exact = derived(recurrent_ema, "packed", p, np.float64)
    close(got["y"], exact["y"])
    if which not in ("no memory", "hardly any memory"):  # 1 - delta has lost its digits there
        close(got["gradients"][0], exact["gradients"][0], 1e-4)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="chunk must be at least 1, got 0"):
        run(inputs(), system(), WHOLE, chunk=0)


@pytest.mark.parametrize("aligned", [True, False])
def test_it_costs_its_closed_form(aligned):
    where = jnp.zeros((B, T), jnp.int32)

    def form(u, p):
        where_ = {"positions": where, "segments": where}
        return damped_ema(u, **p, **where_, chunk=CHUNK, aligned=aligned)[0]

    given = jax.tree.map(jnp.asarray, (inputs(), system()))
    forward = count(form, *given)
    both = count(jax.grad(lambda *x: jnp.sum(form(*x) ** 2), (0, 1)), *given)
    want = ema_flops(B, T, D, P, CHUNK, aligned=aligned)
    assert (forward.total, both.total - forward.total) == want
    assert exact_ema_flops(B, T, D, P, CHUNK).forward == 2 * B * D * (31 + 2 * T * P)
    assert stored_bytes(ema_state(B, D, P)) == ema_state_bytes(B, D, P)
