"""The laws of every recurrence: three forms, pieces, padding, packing, causality, gradients.

A member is entered in MEMBERS. Nearly all time here is compiling, so that each member has as few
programs as can be: with y, the state after it and all gradients the chunked form in float32 and,
rematerialised, in float64, and the parallel form in float64; forward the recurrent form in float64,
pieces of 1, 3 and CHUNK tokens, whole rows with and without a state, one row, and a vmap. The laws
differ in what they feed them. The planted faults are in `FAULTS`: each makes its law fail.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.recurrence.bookkeeping import Rows, timeline
from effjax.ops.recurrence.delta import delta_rule, delta_state
from effjax.ops.recurrence.delta_naive import parallel_delta, recurrent_delta
from effjax.ops.recurrence.diagonal import (
    diagonal_recurrence,
    diagonal_state,
    parallel_diagonal,
    recurrent_diagonal,
)
from effjax.ops.recurrence.gated import gated_recurrence, gated_state
from effjax.ops.recurrence.gated_naive import parallel_gated, recurrent_gated
from effjax.ops.recurrence.layout import lay_out
from effjax.ops.recurrence.retention import (
    parallel_retention,
    recurrent_retention,
    retention,
    retention_state,
)
from effjax.ops.recurrence.s4 import s4
from effjax.ops.recurrence.s4_naive import parallel_s4, recurrent_s4
from effjax.ops.recurrence.selective_scan import (
    parallel_selective_scan,
    recurrent_selective_scan,
    selective_scan,
    selective_state,
)
from effjax.ops.recurrence.state_space import diagonal_state_space, state_space_state
from effjax.ops.recurrence.state_space_naive import parallel_state_space, recurrent_state_space
from effjax.ops.recurrence.wkv import wkv, wkv_state
from effjax.ops.recurrence.wkv_naive import parallel_wkv, recurrent_wkv

B, T, N, H, HV, D, P = 2, 19, 2, 4, 3, 6, 4
CHUNK = 7
Arrays = dict[str, Any]


class Member(NamedTuple):
    """Forms take (tokens, parameters) as keywords besides positions, segments and state."""

    forms: dict[str, Callable]  # naive, and "chunked" with a keyword chunk
    tokens: Callable[[Any, int, int], Arrays]  # rng, B, T
    parameters: Callable[[Any], Arrays]
    empty: Callable[[int], Arrays]
    state_bytes: int  # of one row
    valid: Callable[[Arrays], Arrays] = lambda state: state  # what of random numbers is a state
    timed: bool = True  # whether a gap in positions is time; else a token is a step


def normal(rng: Any, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def gated_member(groups: int, gates: tuple[int, ...]) -> Member:
    """Heads of one group share their queries and keys; a gate for each head, or each channel."""
    return Member(
        {"parallel": parallel_gated, "recurrent": recurrent_gated, "chunked": gated_recurrence},
        lambda rng, b, t: {
            "q": normal(rng, b, t, groups, H),
            "k": normal(rng, b, t, groups, H),
            "log_gate": -np.exp(normal(rng, b, t, *gates) - 1),
            "v": normal(rng, b, t, N, HV),
        },
        lambda rng: {},
        lambda b: gated_state(b, N, H, HV),
        4 * N * H * HV + 8,
        timed=False,
    )


def of_unit_keys(form: Callable) -> Callable:
    """A delta rule of tokens of any size: keys of length 1, beta and gates between 0 and 1."""

    def run(k: Any, strength: Any, forgetting: Any, *, positions: Any, **rest: Any) -> tuple:
        live = (positions >= 0)[..., None]
        k = jnp.where(live[..., None], k, 1)
        strength, forgetting = (jnp.where(live, x, 0) for x in (strength, forgetting))
        return form(
            k=k / jnp.linalg.norm(k, axis=-1, keepdims=True),
            beta=jax.nn.sigmoid(strength),
            log_gate=-jnp.exp(jnp.minimum(forgetting, 3.0) - 1),
            positions=positions,
            **rest,
        )

    return run


MEMBERS = {
    "retention": Member(
        {
            "parallel": parallel_retention,
            "recurrent": recurrent_retention,
            "chunked": retention,
        },
        lambda rng, b, t: {
            "q": normal(rng, b, t, N, H),
            "k": normal(rng, b, t, N, H),
            "v": normal(rng, b, t, N, HV),
        },
        lambda rng: {"log_decay": np.array([-0.02, -0.3], np.float32)},
        lambda b: retention_state(b, N, H, HV),
        4 * N * H * HV + 8,
    ),
    "gated_heads": gated_member(1, (N,)),
    "gated_channels": gated_member(N, (N, H)),
    "diagonal": Member(
        {
            "parallel": parallel_diagonal,
            "recurrent": recurrent_diagonal,
            "chunked": partial(diagonal_recurrence, form="chunked"),
        },
        lambda rng, b, t: {
            "log_a": -np.exp(normal(rng, b, t, D) - 1),
            "b": normal(rng, b, t, D),
        },
        lambda rng: {},
        lambda b: diagonal_state(b, D),
        4 * D + 8,
        timed=False,
    ),
    "selective_scan": Member(
        {
            "parallel": parallel_selective_scan,
            "recurrent": recurrent_selective_scan,
            "chunked": lambda *args, chunk=64, **rest: selective_scan(*args, piece=chunk, **rest),
        },
        lambda rng, b, t: {
            "dt": np.exp(normal(rng, b, t, D) - 1),
            "b": normal(rng, b, t, P),
            "c": normal(rng, b, t, P),
            "x": normal(rng, b, t, D),
        },
        lambda rng: {"a_log": normal(rng, D, P) - 1, "skip": normal(rng, D)},
        lambda b: selective_state(b, D, P),
        4 * D * P + 8,
        timed=False,
    ),
    "state_space": Member(
        {
            "parallel": parallel_state_space,
            "recurrent": recurrent_state_space,
            "chunked": diagonal_state_space,
        },
        lambda rng, b, t: {"u": normal(rng, b, t, D)},
        lambda rng: {
            "log_dt": np.log(rng.uniform(0.02, 0.2, D)).astype(np.float32),
            "log_a_real": np.float32(0.5) * normal(rng, D, P),
            "a_imag": 2 * normal(rng, D, P),
            "c_real": normal(rng, D, P),
            "c_imag": normal(rng, D, P),
            "skip": normal(rng, D),
        },
        lambda b: state_space_state(b, D, P),
        2 * 4 * D * P + 8,
    ),
    "s4": Member(
        {"parallel": parallel_s4, "recurrent": recurrent_s4, "chunked": s4},
        lambda rng, b, t: {"u": normal(rng, b, t, D)},
        lambda rng: {
            "log_dt": np.log(rng.uniform(0.02, 0.2, D)).astype(np.float32),
            "log_a_real": np.float32(0.5) * normal(rng, D, P),
            "a_imag": 2 * normal(rng, D, P),
            **{f"{x}_{y}": normal(rng, D, P) for x in "pbc" for y in ("real", "imag")},
            "skip": normal(rng, D),
        },
        lambda b: state_space_state(b, D, P),
        2 * 4 * D * P + 8,
    ),
    "delta_rule": Member(
        {
            "parallel": of_unit_keys(parallel_delta),
            "recurrent": of_unit_keys(recurrent_delta),
            "chunked": of_unit_keys(delta_rule),
        },
        lambda rng, b, t: {
            "q": normal(rng, b, t, N, H),
            "k": normal(rng, b, t, N, H),
            "strength": normal(rng, b, t, N),
            "forgetting": normal(rng, b, t, N),
            "v": normal(rng, b, t, N, HV),
        },
        lambda rng: {},
        lambda b: delta_state(b, N, H, HV),
        4 * N * H * HV + 8,
        timed=False,
    ),
    "wkv": Member(
        {"parallel": parallel_wkv, "recurrent": recurrent_wkv, "chunked": wkv},
        lambda rng, b, t: {"k": 3 * normal(rng, b, t, D), "v": normal(rng, b, t, D)},
        lambda rng: {
            "log_decay": np.array([0, -1e-3, -0.02, -0.1, -0.4, -2], np.float32),
            "bonus": normal(rng, D),
        },
        lambda b: wkv_state(b, D),
        3 * 4 * D + 8,
        lambda state: state | {"denominator": np.exp(state["denominator"])},
    ),
}
members = pytest.mark.parametrize("name", MEMBERS)


# Rows of 19 tokens as (positions, segments), two rows each; the incoming state stands at position
# 3 of segment 5 in the first row, and is empty in the second.
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
GAPS = rows(  # too wide for a state space's layout
    [(3, 5, 9), (2, 5, 70), (4, 6, 0), (3, 6, 30), (7, 8, 1)],
    [(5, 2, 0), (1, 2, 5), (1, 2, 7), (3, 2, 99), (9, 3, 0)],
)
EMPTY = rows([(19, 5, -1)], [(3, 1, -1), (1, 1, 0), (15, 1, -1)])
ROWS = {"whole": WHOLE, "packed": PACKED, "gaps": GAPS, "empty": EMPTY}


def values(name: str, seed: int = 0, b: int = B, t: int = T) -> tuple[Arrays, Arrays, Arrays]:
    """Random tokens, parameters and state."""
    rng, member = np.random.default_rng(seed), MEMBERS[name]
    parameters = member.parameters(np.random.default_rng(1))
    state = {
        k: normal(rng, *x.shape) if x.dtype == jnp.float32 else None
        for k, x in member.empty(b).items()
    }
    state["position"] = np.array([3] + [-1] * (b - 1), np.int32)
    state["segment"] = np.array([5] + [-1] * (b - 1), np.int32)
    return member.tokens(rng, b, t), parameters, member.valid(state)


def memory(state: Arrays) -> Arrays:
    return {k: v for k, v in state.items() if k not in ("position", "segment")}


def loss(form: Callable, tokens, parameters, memory, place, positions, segments, weight):
    """Weighs every output and, by fixed weights, the state after it: (loss, (y, state))."""
    y, state = form(
        **tokens, **parameters, positions=positions, segments=segments, state=memory | place
    )
    total = jnp.sum(y * weight)
    for key in memory:
        total += jnp.sum(jnp.sin(1 + jnp.arange(state[key].size)) * state[key].ravel())
    return total, (y, state)


@cache
def program(name: str, form: str = "chunked", wrap: Callable = lambda f: f, **options: Any):
    """((loss, (y, state)), gradients by tokens, parameters and memory), compiled."""
    f = partial(loss, wrap(partial(MEMBERS[name].forms[form], **options)))
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))


@cache
def forward(name: str, form: str = "chunked"):
    """(y, state), compiled per shape and dtype."""
    options = {"chunk": CHUNK} if form == "chunked" else {}
    form = partial(MEMBERS[name].forms[form], **options)
    return jax.jit(lambda tokens, parameters, **rest: form(**tokens, **parameters, **rest))


def call(run: Callable, given: tuple, where: tuple, weight: Any = None) -> tuple:
    """Runs a `program`; the default weight is fixed and covers every output."""
    tokens, parameters, state = given
    place = {k: state[k] for k in ("position", "segment")}
    if weight is None:
        last = next(reversed(tokens.values()))
        weight = np.random.default_rng(2).normal(size=last.shape).astype(last.dtype)
    (_, (y, after)), gradients = run(tokens, parameters, memory(state), place, *where, weight)
    return np.asarray(y), jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, gradients)


def chunked(name: str, given: tuple, where: tuple, weight: Any = None) -> tuple:
    return call(program(name, chunk=CHUNK), given, where, weight)


def double(tree: Any) -> Any:
    """The same numbers in float64."""
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


@cache
def exact(name: str, at: str) -> tuple:
    """The parallel form's outputs, state and gradients in float64."""
    with jax.enable_x64(True):
        return call(program(name, "parallel"), double(values(name)), ROWS[at])


def exactly(name: str):
    """The chunked form with its gradients, rematerialised, to be run in float64."""
    return program(name, wrap=jax.checkpoint, chunk=4)


def near(got: Any, want: Any, rel: float, what: str = "") -> None:
    """Every leaf within `rel` of its largest value."""
    got, want = (jax.tree_util.tree_leaves_with_path(x) for x in (got, want))
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), (what, path)
        error = np.abs(a - b).max(initial=0) / max(1e-6, np.abs(b).max(initial=0))
        assert error <= rel, (what, jax.tree_util.keystr(path), error)


# L5, L21, L22: three forms agree, in values, states and every gradient, with and against float64.


def forms_agree(got: tuple, want: tuple, rel: float = 2e-5) -> None:
    (y, state, gradients), (y64, state64, gradients64) = got, want
    assert y64.std() > 1e-3
    near(y, y64, rel, "y")
    near(state, state64, rel, "state")
    near(gradients, gradients64, 5 * rel, "gradients")


@members
@pytest.mark.parametrize(
    "chunk",
    [CHUNK, *(pytest.param(chunk, marks=pytest.mark.deep) for chunk in (1, 4, 16, 64))],
)
def test_the_chunked_form_is_the_parallel_one(name, chunk):
    for at, where in ROWS.items():
        forms_agree(call(program(name, chunk=chunk), values(name), where), exact(name, at))


@members
def test_the_chunked_form_under_remat_is_the_parallel_one_in_float64(name):
    for at, where in ROWS.items():
        with jax.enable_x64(True):
            got = call(exactly(name), double(values(name)), where)
        forms_agree(got, exact(name, at), 1e-10)


@pytest.mark.parametrize("at", ROWS)
def test_these_rows_take_both_of_a_state_spaces_ways(at):
    rows = Rows(*(jnp.asarray(x) for x in ROWS[at]), (jnp.array([3, -1]), jnp.array([5, -1])))
    fits = jax.jit(lambda rows: lay_out(timeline(rows), rows.before[0], CHUNK).fits)(rows)
    assert fits == (at != "gaps")


@members
def test_the_parallel_form_is_the_recurrent_one(name):
    """In values and states: gradients are the chunked form's, and the finite differences."""
    tokens, parameters, state = double(values(name))
    for at, (positions, segments) in ROWS.items():
        with jax.enable_x64(True):
            rest = {"positions": positions, "segments": segments, "state": state}
            got = forward(name, "recurrent")(tokens, parameters, **rest)
        near(got, exact(name, at)[:2], 1e-11, at)


# L4, G5: pieces of any lengths are the whole.

SPLITS = ([1] * 19, [3] * 6 + [1], [CHUNK] * 2 + [3, 1, 1], [1, 7, 3, 1, 7])


def in_pieces(name: str, where: tuple, split: list[int], between=lambda state: state) -> tuple:
    """Outputs and last state of a text that is given piece by piece."""
    tokens, parameters, state = values(name)
    at, y = 0, []
    for length in split:
        part = slice(at, at + length)
        positions, segments = (x[:, part] for x in where)
        piece = {k: v[:, part] for k, v in tokens.items()}
        out, state = forward(name)(
            piece, parameters, positions=positions, segments=segments, state=between(state)
        )
        y.append(out)
        at += length
    return np.concatenate(y, axis=1), state


@members
@pytest.mark.parametrize("at", ROWS)
def test_pieces_are_the_whole(name, at):
    whole, after, _ = chunked(name, values(name), ROWS[at])
    for split in SPLITS:
        y, state = in_pieces(name, ROWS[at], split)
        near(y, whole, 2e-5)
        near(state, after, 2e-5)


@members
def test_no_state_is_the_empty_state_and_gives_none(name):
    tokens, parameters, _ = values(name)
    at = {"positions": PACKED[0], "segments": PACKED[1]}
    want, _ = forward(name)(tokens, parameters, **at, state=MEMBERS[name].empty(B))
    y, nothing = forward(name)(tokens, parameters, **at, state=None)
    assert nothing is None
    near(y, want, 2e-5)


# L1, L2, L3: the future changes nothing; the past, all of it, changes something.


def causal(run: Callable, name: str, where: tuple) -> None:
    given = values(name)
    before = run(name, given, where)[0]
    for seed in range(3):
        noise = MEMBERS[name].tokens(np.random.default_rng(90 + seed), B, T)
        for t in range(T - 1):
            later = {k: x.copy() for k, x in given[0].items()}
            for k in later:
                later[k][:, t + 1 :] = 10 * noise[k][:, t + 1 :]
            y = run(name, (later, *given[1:]), where)[0]
            assert np.abs(y - before)[:, : t + 1].max() == 0.0, t
            if (where[0][:, t + 1] >= 0).any():
                assert np.abs(y - before)[:, t + 1 :].max() > 1e-3


def influence(run: Callable, name: str, where: tuple) -> np.ndarray:
    """[B T S]: the largest derivative of y_t by anything in token s."""
    out = np.zeros((B, T, T))
    shape = next(reversed(values(name)[0].values())).shape
    for t in range(T):
        weight = np.zeros(shape, np.float32)
        weight[:, t] = np.random.default_rng(4).normal(size=shape[2:])
        by_token = run_without_state(run, name, where, weight)
        for g in by_token.values():
            out[:, t] = np.maximum(out[:, t], np.abs(g).reshape(B, T, -1).max(axis=-1))
    return out


def run_without_state(run: Callable, name: str, where: tuple, weight: np.ndarray) -> Arrays:
    """Gradients of the weighed outputs alone: what the state adds is taken off."""
    given = values(name)
    state = run(name, given, where, np.zeros_like(weight))[2][0]
    both = run(name, given, where, weight)[2][0]
    return {k: both[k] - state[k] for k in both}


def visible(where: tuple) -> np.ndarray:
    """[B T S]: which tokens a token may see, by the definition of a document."""
    positions, segments = where
    live = positions >= 0
    same = segments[:, :, None] == segments[:, None, :]
    return same & live[:, :, None] & live[:, None, :] & np.tri(T, dtype=bool)


def sees_its_past(run: Callable, name: str, where: tuple) -> None:
    touched = influence(run, name, where)
    assert (touched[~visible(where)] == 0.0).all()
    assert (touched[visible(where)] > 0.0).all()


@members
@pytest.mark.parametrize("at", ["whole", "packed"])
def test_the_future_changes_nothing(name, at):
    causal(chunked, name, ROWS[at])


@members
def test_a_token_sees_its_document_so_far_and_nothing_else(name):
    sees_its_past(chunked, name, PACKED)
    sees_its_past(chunked, name, WHOLE)


# L6: a row does not know its batch.


def independent(run: Callable, name: str) -> None:
    tokens, parameters, state = values(name)
    positions, segments = (np.stack([x[0], y[1]]) for x, y in zip(PACKED, GAPS, strict=True))
    whole, after = run(tokens, parameters, positions=positions, segments=segments, state=state)
    for row in range(B):
        one, one_after = run(
            {k: v[row : row + 1] for k, v in tokens.items()},
            parameters,
            positions=positions[row : row + 1],
            segments=segments[row : row + 1],
            state={k: v[row : row + 1] for k, v in state.items()},
        )
        near(one[0], whole[row], 2e-6)
        near(*({k: v[i] for k, v in x.items()} for x, i in ((one_after, 0), (after, row))), 2e-6)


@members
def test_a_row_alone_is_the_row_in_a_batch(name):
    independent(forward(name), name)


# L7, L8: padding and neighbours.

SHIFTS = {"left": [(8, 0, -1), (11, 2, 0)], "right": [(11, 2, 0), (8, 0, -1)]}
MIDDLE = [(1, 0, -1), (4, 2, 0), (1, 2, -1), (5, 2, 4), (6, 2, -1), (2, 2, 9)]


def padded(name: str, pieces: list, fill: float) -> tuple[tuple, tuple, np.ndarray]:
    """The same 11 tokens under any padding that holds `fill`: inputs, rows, where they are."""
    where = rows(pieces, pieces)
    live = where[0][0] >= 0
    tokens, parameters, state = values(name)
    document = MEMBERS[name].tokens(np.random.default_rng(8), B, 11)
    for k, x in tokens.items():
        x[:, live] = document[k]
        x[:, ~live] = fill if np.isnan(fill) else fill * x[:, ~live]
    return (tokens, parameters, state), where, live


def ignores_padding(run: Callable, name: str) -> None:
    weight = (
        np.random.default_rng(6)
        .normal(size=next(reversed(values(name)[0].values())).shape)
        .astype(np.float32)
    )
    wants = None
    for pieces in (*SHIFTS.values(), MIDDLE):
        for fill in (1.0, np.nan):
            given, where, live = padded(name, pieces, fill)
            placed = np.zeros_like(weight)
            placed[:, live] = weight[:, :11]
            y, state, gradients = run(name, given, where, placed)
            assert (y[:, ~live] == 0).all()
            assert all((g[:, ~live] == 0).all() for g in gradients[0].values())
            by_token = {k: g[:, live] for k, g in gradients[0].items()}
            got = (y[:, live], state, by_token, gradients[1:])
            wants = got if wants is None else wants
            near(got[:2], wants[:2], 5e-6, f"{pieces}, {fill}")
            near(got[2:], wants[2:], 2e-5, f"{pieces}, {fill}")


@members
def test_padding_anywhere_is_neither_read_nor_written(name):
    ignores_padding(chunked, name)


# A gap in positions is time to some, to others nothing.


def gaps_are(timed: bool, run: Callable, name: str) -> None:
    steps = rows([(8, 5, 4), (11, 6, 0)], [(12, 2, 0), (7, 3, 0)])
    positions, segments = steps
    gapped = positions + 2 * (positions >= 3) + 5 * (positions >= 6)
    got, want = run(name, values(name), (gapped, segments)), run(name, values(name), steps)
    moved = np.abs(got[0] - want[0]).max()
    assert moved > 1e-3 if timed else moved == 0.0
    if not timed:
        near(memory(got[1]), memory(want[1]), 1e-6)


@members
def test_a_gap_is_time_or_nothing(name):
    gaps_are(MEMBERS[name].timed, chunked, name)


PLACES = {
    0: [(11, 2, 0), (5, 3, 0), (3, 4, 0)],
    3: [(3, 1, 0), (11, 2, 0), (5, 3, 0)],
    8: [(5, 8, 0), (3, 1, 0), (11, 2, 0)],
}


def ignores_neighbours(run: Callable, name: str) -> None:
    document = MEMBERS[name].tokens(np.random.default_rng(8), B, 11)
    weight = (
        np.random.default_rng(6)
        .normal(size=next(reversed(values(name)[0].values())).shape)
        .astype(np.float32)
    )
    wants = None
    for first, pieces in PLACES.items():
        here, where = slice(first, first + 11), rows(pieces, pieces)
        alone = np.zeros_like(weight)
        alone[:, here] = weight[:, :11]
        seen = []
        for seed in (20, 21):
            given = values(name, seed)
            for k, x in given[0].items():
                x[:, here] = document[k]
            by_state = run(name, given, where, np.zeros_like(weight))[2][0]
            y, _, gradients = run(name, given, where, alone)
            by_token = {k: (g - by_state[k])[:, here] for k, g in gradients[0].items()}
            seen.append((y[:, here], by_token))
        np.testing.assert_array_equal(seen[0][0], seen[1][0])
        wants = seen[0] if wants is None else wants
        near(seen[0][0], wants[0], 1e-5)
        near(seen[0][1], wants[1], 1e-4)


@members
def test_a_document_is_the_same_wherever_it_is_packed(name):
    ignores_neighbours(chunked, name)


# The state: its size and dtype are a constant; it stays where it was through padding.


def constant_size(init: Callable, name: str) -> None:
    empty = init(1)
    assert sum(x.nbytes for x in empty.values()) == MEMBERS[name].state_bytes
    for t, dtype in ((1, jnp.bfloat16), (64, jnp.float32), (19, jnp.bfloat16)):
        tokens, parameters, _ = values(name, b=1, t=t)
        tokens = {k: jax.ShapeDtypeStruct(x.shape, dtype) for k, x in tokens.items()}
        where = np.zeros((1, t), np.int32)
        y, state = jax.eval_shape(
            partial(MEMBERS[name].forms["chunked"], chunk=CHUNK),
            **tokens, **parameters, positions=where, segments=where, state=empty,
        )  # fmt: skip
        assert y.dtype == dtype
        assert {k: (x.shape, x.dtype) for k, x in state.items()} == {
            k: (x.shape, x.dtype) for k, x in empty.items()
        }


@members
def test_the_state_is_float32_and_as_large_at_any_length(name):
    constant_size(MEMBERS[name].empty, name)


@members
def test_padding_holds_the_state_still(name):
    given = values(name)
    y, state, _ = chunked(name, given, EMPTY)
    assert (y[0] == 0).all()
    for key, before in given[2].items():
        np.testing.assert_array_equal(state[key][0], before[0])


# L20: gradients against finite differences in float64.


def direction(point: tuple, only: int, seed: int) -> tuple:
    """Random numbers in the shape of one of the parts of `point`, zeros in the others'."""
    rng = np.random.default_rng(seed)
    return tuple(
        jax.tree.map(lambda x, on=(i == only): on * rng.normal(size=x.shape), part)
        for i, part in enumerate(point)
    )


def differences_agree(run: Callable, name: str, where: tuple, scale: float = 1.0) -> None:
    """f(x + h d) - f(x - h d) = 2 h (gradient . d) along random directions d."""
    tokens, parameters, state = double(values(name))
    place = {k: state[k] for k in ("position", "segment")}
    point, h = (tokens, parameters, memory(state)), 1e-6
    weight = np.random.default_rng(2).normal(size=next(reversed(tokens.values())).shape)
    gradients = run(*point, place, *where, weight)[1]
    for seed in range(6):
        way = direction(point, seed % 3, 30 + seed)
        ahead = jax.tree.map(lambda x, d: x + h * d, point, way)
        behind = jax.tree.map(lambda x, d: x - h * d, point, way)
        rise = [float(run(*x, place, *where, weight)[0][0]) for x in (ahead, behind)]
        slope = sum(map(np.vdot, jax.tree.leaves(gradients), jax.tree.leaves(way)))
        measured = (rise[0] - rise[1]) / (2 * h)
        assert abs(measured - scale * slope) <= 1e-6 * max(1.0, abs(measured)), seed


@members
def test_gradients_are_the_finite_differences(name):
    with jax.enable_x64(True):
        for where in (PACKED, GAPS):
            differences_agree(exactly(name), name, where)


# L22: jit and vmap change nothing (remat: above).


def same_without_jit(run: Callable, name: str, length: int = 1) -> None:
    """Without jit every operation is compiled on its own: many for a chunk, few for a token."""
    given = jax.tree.map(jnp.asarray, values(name, t=length))
    positions, segments = (jnp.asarray(x[:, :length]) for x in WHOLE)
    rest = {"positions": positions, "segments": segments, "state": given[2]}
    eager = MEMBERS[name].forms["chunked"](**given[0], **given[1], **rest, chunk=CHUNK)
    near(run(*given[:2], **rest), eager, 2e-6)


@members
@pytest.mark.parametrize("length", [1, pytest.param(CHUNK, marks=pytest.mark.deep)])
def test_jit_is_eager(name, length):
    same_without_jit(forward(name), name, length)


@cache
def stacked(name: str) -> list[tuple]:
    """Two batches with different rows, and what a vmap over them gives."""
    texts = [values(name, seed) for seed in (0, 1)]
    wheres = [PACKED, GAPS]
    each = [(tokens, state, where) for (tokens, _, state), where in zip(texts, wheres, strict=True)]

    def one(tokens: Arrays, state: Arrays, where: tuple) -> tuple:
        positions, segments = where
        run, parameters = forward(name), values(name)[1]
        return run(tokens, parameters, positions=positions, segments=segments, state=state)

    together = jax.jit(jax.vmap(one))(*jax.tree.map(lambda *x: np.stack(x), *each))
    return [(x, jax.tree.map(lambda y, i=i: y[i], together)) for i, x in enumerate(each)]


def same_under_vmap(run: Callable, name: str) -> None:
    for (tokens, state, (positions, segments)), together in stacked(name):
        at = {"positions": positions, "segments": segments, "state": state}
        near(together, run(tokens, values(name)[1], **at), 2e-6)


@members
def test_vmap_is_a_loop(name):
    same_under_vmap(forward(name), name)


# Every law has been seen to fail: each of these is the law above with a fault planted in it.


def faulty(change: Callable) -> Callable:
    """`chunked` on changed inputs: `change(tokens, positions, segments)`."""

    def run(name: str, given: tuple, where: tuple, weight: Any = None) -> tuple:
        tokens, *where = change(given[0], *where)
        return chunked(name, (tokens, *given[1:]), tuple(where), weight)

    return run


def worse(name: str) -> Callable:
    """`forward` with a mean over the batch leaking into y."""

    def run(*args: Any, **rest: Any) -> tuple:
        y, state = forward(name)(*args, **rest)
        return y + 1e-4 * y.mean(0, keepdims=True), state

    return run


def shifted(name: str, by: float) -> tuple:
    """Values, tokens and parameters a little off."""
    *given, state = values(name)
    return *({k: v * np.float32(1 + by) for k, v in part.items()} for part in given), state


one_early = faulty(lambda x, p, s: ({k: np.roll(v, -1, axis=1) for k, v in x.items()}, p, s))
one_document = faulty(
    lambda x, p, s: (x, np.where(p < 0, -1, np.arange(T, dtype=np.int32)), np.ones_like(s))
)
forgets_chunks = faulty(lambda x, p, s: (x, p, s * 100 + np.arange(T, dtype=np.int32) // CHUNK))
counts_padding = faulty(lambda x, p, s: (x, np.where(p < 0, -1, np.arange(T, dtype=np.int32)), s))


def pieces_agree(name: str, between: Callable) -> None:
    y, state = in_pieces(name, WHOLE, [3] * 6 + [1], between)
    near((y, state), chunked(name, values(name), WHOLE)[:2], 2e-5)


def half_precision(name: str) -> Callable:
    return lambda b: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, MEMBERS[name].empty(b)
    )


def wrong_slope(name: str) -> None:
    with jax.enable_x64(True):
        differences_agree(exactly(name), name, PACKED, scale=1.001)


FAULTS: dict[str, Callable[[str], None]] = {
    "forms: inputs 0.1% off": lambda name: forms_agree(
        call(program(name, chunk=CHUNK), shifted(name, 1e-3), WHOLE),
        exact(name, "whole"),
    ),
    "pieces: the state is lost": lambda name: pieces_agree(
        name, lambda state: MEMBERS[name].empty(B)
    ),
    "pieces: positions off by one": lambda name: pieces_agree(
        name, lambda state: state | {"position": state["position"] - 1}
    ),
    "causality: one token early": lambda name: causal(one_early, name, WHOLE),
    "visibility: segments ignored": lambda name: sees_its_past(one_document, name, PACKED),
    "liveness: chunks forgotten": lambda name: sees_its_past(forgets_chunks, name, WHOLE),
    "batch: a mean leaks": lambda name: independent(worse(name), name),
    "padding: holes count as time": lambda name: ignores_padding(counts_padding, name),
    "gaps: taken for the opposite": lambda name: gaps_are(not MEMBERS[name].timed, chunked, name),
    "packing: segments ignored": lambda name: ignores_neighbours(one_document, name),
    "state: half precision": lambda name: constant_size(half_precision(name), name),
    "gradients: 0.1% too large": wrong_slope,
    "jit: a mean leaks": lambda name: same_without_jit(worse(name), name),
    "vmap: a mean leaks": lambda name: same_under_vmap(worse(name), name),
}


TIMED = ("pieces: positions off by one", "padding: holes count as time")
"""Faults of those alone to which a gap is time."""


@pytest.mark.parametrize(
    ("fault", "name"),
    [(f, n) for f in FAULTS for n in MEMBERS if MEMBERS[n].timed or f not in TIMED],
)
def test_the_law_catches(fault, name):
    with pytest.raises(AssertionError):
        FAULTS[fault](name)
