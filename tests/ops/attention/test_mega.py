"""Mega against plain numpy: Laplace attention, the whole layer, its gates, chunks, pieces, cost."""

from functools import cache, partial
from itertools import chain, pairwise
from math import erf, pi, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.flops import count
from effjax.models.configs import DecoderConfig, EncoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers import MIXERS
from effjax.models.sections import EMAConfig, MegaConfig
from effjax.ops.attention.laplace import (
    exact_laplace_flops,
    laplace,
    laplace_attention,
    laplace_flops,
    laplace_row,
)
from effjax.ops.attention.patterns import Causal, Cells, Full

B, T, D, P, Z, E, CHUNK = 2, 13, 8, 3, 4, 10, 5
SIZES = {"width": D, "ema": EMAConfig(P, 4)}
FUNCTIONS = ("softmax", "laplace")
KINDS = ("mega", "mega_chunk")
WIDTH = {"mega": None, "mega_chunk": CHUNK}
both = pytest.mark.parametrize("function", FUNCTIONS)
kinds = pytest.mark.parametrize("kind", KINDS)


def rows(*each: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(length, segment, first position) of each stretch; first position -1 is padding."""
    positions, segments = [], []
    for row in each:
        at = [[-1] * n if first < 0 else [*range(first, first + n)] for n, _, first in row]
        positions.append([*chain(*at)])
        segments.append([of for n, of, _ in row for _ in range(n)])
    return np.array(positions, np.int32), np.array(segments, np.int32)


WHOLE = rows([(13, 0, 0)], [(13, 0, 0)])
PACKED = rows(
    [(2, 9, -1), (6, 1, 3), (2, 1, -1), (3, 2, 0)], [(4, 1, 0), (5, 1, 30), (3, 2, 8), (1, 3, -1)]
)


def values(*sizes: int, at: tuple = WHOLE, seed: int = 0) -> np.ndarray:
    """Numbers at live tokens, NaN at padding."""
    x = np.random.default_rng(seed).normal(size=(B, T, *sizes)).astype(np.float32)
    return np.where((at[0] >= 0).reshape(B, T, *(1 for _ in sizes)), x, np.float32(np.nan))


def close(got, want, rel: float = 2e-5) -> None:
    """Every leaf within `rel` of its largest value."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert b.std() > 1e-4
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= rel * np.abs(b).max()


# Laplace attention


def normal(x: float) -> float:
    """Of a normal variable of mean sqrt(1/2) and variance 1 / (4 pi), the share below x."""
    return 0.5 * (1 + erf((x - sqrt(0.5)) * sqrt(2 * pi)))


def reads(at: tuple, b: int, t: int, width: int | None, causal: bool) -> list[int]:
    """The tokens that token t of row b reads."""
    p, s = at[0][b], at[1][b]
    found = [j for j in range(T) if p[j] >= 0 and s[j] == s[t] and (p[j] <= p[t] or not causal)]
    return [j for j in found if width is None or p[j] // width == p[t] // width]


def weigh(q, k, v, at, width, causal, function, content):
    """y_t = sum_s a_ts v_s, pair by pair; the features behind `content` are a bias."""
    y = np.zeros((*q.shape[:2], v.shape[-1]))
    for b, t in np.argwhere(at[0] >= 0):
        seen = reads(at, b, t, width, causal)
        by = sqrt(content) if function == "softmax" else len(seen)
        s = np.array([q[b, t, :content] @ k[b, j, :content] / by for j in seen])
        s += [q[b, t, content:] @ k[b, j, content:] for j in seen]
        a = np.exp(s - s.max()) if function == "softmax" else np.array([normal(x) for x in s])
        y[b, t] = (a / (a.sum() if function == "softmax" else 1)) @ v[b, seen]
    return y


def test_the_function_touches_the_square_of_the_rectifier():
    """At sqrt(1/2), where the paper fits it: value 1/2, slope sqrt(2)."""
    x = np.linspace(-3, 4, 29).astype(np.float32)
    np.testing.assert_allclose(laplace(jnp.asarray(x)), [normal(v) for v in x], atol=1e-6)
    value, slope = jax.value_and_grad(laplace)(jnp.float32(sqrt(0.5)))
    np.testing.assert_allclose((value, slope), (0.5, sqrt(2)), rtol=1e-6)


@cache
def derived(form, pattern, **options):
    """((loss, y), gradients), compiled."""

    def loss(q, k, v, positions, segments, weight):
        y = form(q, k, v, pattern=pattern, positions=positions, segments=segments, **options)
        return jnp.sum(y * weight), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def dense(q, k, v, *, positions, segments, **options):
    at = {"q_positions": positions, "k_positions": positions}
    return laplace_attention(q, k, v, **at, q_segments=segments, k_segments=segments, **options)


def tokens(at):
    return values(1, 6, at=at), values(1, 6, at=at, seed=1), values(1, 3, at=at, seed=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("at", "aligned"), [(PACKED, False), (WHOLE, True)], ids=["packed", "row"])
def test_blocks_are_the_definition(at, aligned, causal):
    pattern = Cells(CHUNK, 0) & (Causal() if causal else Full())
    q, k, v = tokens(at)
    weight = np.random.default_rng(3).normal(size=v.shape).astype(np.float32)
    q_, k_, v_ = (np.nan_to_num(x[:, :, 0].astype(np.float64)) for x in (q, k, v))
    want = weigh(q_, k_, v_, at, CHUNK, causal, "laplace", 4)
    run = derived(laplace_row, pattern, aligned=aligned, content=4)
    (_, y), gradients = run(q, k, v, *at, weight)
    close(y[:, :, 0], want)
    (_, y), exact = derived(dense, pattern, content=4)(q, k, v, *at, weight)
    close(y[:, :, 0], want)
    close(gradients, exact, 1e-4)


def test_the_comparison_catches_a_normaliser_that_reads_the_whole_row():
    """The keys of the mask, not those of the row: else a causal score knows what follows."""
    q, k, v = tokens(WHOLE)
    want = weigh(q[:, :, 0], k[:, :, 0], v[:, :, 0], WHOLE, None, True, "laplace", 4)
    of_row = np.ones_like(q)
    of_row[..., :4] = (np.arange(1, T + 1) / T)[None, :, None, None]
    run, weight = derived(dense, Causal(), content=4), np.ones_like(v)
    close(run(q, k, v, *WHOLE, weight)[0][1][:, :, 0], want)
    wrong = run(q * of_row, k, v, *WHOLE, weight)[0][1]
    with pytest.raises(AssertionError):
        close(wrong[:, :, 0], want)


def test_a_query_that_reads_nothing_gives_zero():
    q, k, v = tokens(PACKED)
    empty = np.full((B, T), -1, np.int32)
    (_, y), gradients = derived(dense, Causal(), content=4)(q, k, v, empty, empty, np.ones_like(v))
    assert all(not np.asarray(x).any() for x in (y, *gradients))


# The layer


class Mixer:
    """A mixer with random parameters and its programs, compiled once a shape."""

    def __init__(self, kind: str, config):
        self.cls, self.config = MIXERS[kind], config
        init, self.apply, self.axes_of = functional(lambda rngs: self.cls(config, rngs))
        # Biases and places that matter: all numbers are drawn, none is what it starts as.
        rng, shapes = np.random.default_rng(1), jax.eval_shape(init, jax.random.key(0))
        draw = lambda w: jnp.asarray(0.5 * rng.normal(size=w.shape), jnp.float32)  # noqa: E731
        self.params = jax.tree.map(draw, shapes)
        self.run = jax.jit(lambda p, x, *at: self.apply(p, x, Context(*at))[0])
        self.step = jax.jit(lambda p, s, x, *at: self.apply(p, x, Context(*at), s)[:2])

    def whole(self, at, params=None):
        return np.asarray(self.run(self.params if params is None else params, X(at), *at))

    def pieces(self, at, cuts):
        state, made = self.apply(self.params, B, T, 7, jnp.float32, method="init_state"), []
        for begin, end in pairwise(cuts):
            part = (x[:, begin:end] for x in (X(at), *at))
            y, state = self.step(self.params, state, *part)
            made.append(np.asarray(y))
        return np.concatenate(made, axis=1)


def X(at):
    return values(D, at=at, seed=4)


def section(function: str, chunk: int = CHUNK) -> MegaConfig:
    return MegaConfig(Z, E, function, chunk)


@cache
def mixer(kind: str, function: str, chunk: int = CHUNK, causal: bool = True) -> Mixer:
    config = DecoderConfig if causal else EncoderConfig
    return Mixer(kind, config(**SIZES, mega=section(function, chunk), pattern=(kind,)))


def silu(x):
    return x / (1 + np.exp(-x))


def average(p, x, at, causal):
    """Each side's kernel over the distances in positions, within a document."""
    sigmoid = {k: 1 / (1 + np.exp(-p[k])) for k in ("alpha", "delta")}
    phi = 1 - sigmoid["alpha"] * sigmoid["delta"]
    taken = p["eta"] * sigmoid["alpha"] * p["beta"] / sqrt(P)
    y = p["omega"] * x
    for b, t in np.argwhere(at[0] >= 0):
        for j in reads(at, b, t, None, causal):
            gap = at[0][b, t] - at[0][b, j]
            side = 0 if gap >= 0 else 1
            y[b, t] += (taken[side] * phi[side] ** abs(gap)).sum(-1) * x[b, j]
    return silu(y)


def turned(row, positions):
    """The halves of a vector rotated by position, 10000^(-i / half) radians each."""
    half = row.size // 2
    angle = positions[..., None] * 10_000.0 ** (-np.arange(half) / half)
    a, b, c, s = row[:half], row[half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def layer(p, x, at, width, function, causal=True):
    """Mega in the paper's order, y without the residual."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
    x = np.nan_to_num(x.astype(np.float64))
    W = {k: p[k]["kernel"] for k in ("z", "v", "reset", "update", "candidate", "o")}
    m = average(p["ema"], x, at, causal)
    z, v = silu(m @ W["z"] + p["z_bias"]), silu(x @ W["v"] + p["v_bias"])
    reset = silu(m @ W["reset"] + p["reset_bias"])
    update = 1 / (1 + np.exp(-(m @ W["update"] + p["update_bias"])))
    q, k = z * p["q_scale"] + p["q_bias"], z * p["k_scale"] + p.get("k_bias", 0)
    q, k = (
        np.concatenate([x, turned(p[place], at[0])], axis=-1)
        for x, place in ((q, "q_place"), (k, "k_place"))
    )
    o = weigh(q, k, v, at, width, causal, function, Z)
    h = silu(m @ W["candidate"] + p["candidate_bias"] + (reset * o) @ W["o"])
    return update * (h - x)


@both
@kinds
def test_it_is_the_layer_in_numpy(kind, function):
    own, live = mixer(kind, function), PACKED[0] >= 0
    want = layer(own.params, X(PACKED), PACKED, WIDTH[kind], function)
    close(own.whole(PACKED)[live], want[live])


def test_an_encoder_reads_both_sides():
    own, live = mixer("mega_chunk", "laplace", causal=False), PACKED[0] >= 0
    want, causal = (
        layer(own.params, X(PACKED), PACKED, CHUNK, "laplace", causal=one)[live]
        for one in (False, True)
    )
    close(own.whole(PACKED)[live], want)
    with pytest.raises(AssertionError):
        close(own.whole(PACKED)[live], causal)


def test_soft_max_does_not_see_a_bias_of_keys():
    """Why only Laplace attention has one."""
    own = mixer("mega", "laplace")
    shifted = {**own.params, "k_bias": own.params["k_bias"] + 1}
    softmax, x = partial(layer, x=X(WHOLE), at=WHOLE, width=None, function="softmax"), WHOLE
    close(softmax(shifted), softmax(own.params), 1e-12)
    assert "k_bias" not in mixer("mega", "softmax").params
    with pytest.raises(AssertionError):
        close(own.whole(x, shifted), own.whole(x))


@both
@kinds
def test_pieces_are_the_whole_wherever_tokens_stand(kind, function):
    """Decoding divides Laplace scores by the keys that it reads, as prefill does."""
    own = mixer(kind, function)
    for at in (WHOLE, PACKED):
        live, whole = at[0] >= 0, own.whole(at)
        for cuts in ([*range(T + 1)], [0, 6, 7, 13]):
            close(own.pieces(at, cuts)[live], whole[live])


def test_laplace_attention_is_causal_to_the_last_bit():
    for kind in KINDS:
        own = mixer(kind, "laplace")
        x = X(WHOLE)
        before = np.asarray(own.run(own.params, x, *WHOLE))
        for t in (0, 4, 5, 11):
            later = np.where(np.arange(T)[None, :, None] > t, 10 * values(D, seed=5), x)
            moved = np.abs(np.asarray(own.run(own.params, later, *WHOLE)) - before)
            assert moved[:, : t + 1].max() == 0
            assert moved[:, t + 1 :].max() > 1e-3


@both
def test_an_update_gate_of_zero_is_the_identity_of_the_block(function):
    """METHODS ATTN-33: what the layer adds to the residual is nothing at all; at one, h - x."""
    own = mixer("mega", function)
    closed = {**own.params, "update_bias": jnp.full(D, -1e4)}
    assert not own.whole(WHOLE, closed).any()
    opened = {**own.params, "update_bias": jnp.full(D, 1e4)}
    close(own.whole(WHOLE, opened), layer(opened, X(WHOLE), WHOLE, None, function))


def test_a_reset_gate_of_zero_leaves_the_moving_average():
    own = mixer("mega", "softmax")
    silent = {**own.params, "reset_bias": jnp.full(E, -1e4)}
    other = {**silent, "v": jax.tree.map(lambda w: 3 * w, own.params["v"])}
    assert np.array_equal(own.whole(WHOLE, silent), own.whole(WHOLE, other))
    assert not np.array_equal(own.whole(WHOLE), own.whole(WHOLE, silent))


@both
def test_a_chunk_as_long_as_the_text_is_mega(function):
    """METHODS ATTN-34, with the same weights; a shorter one is not."""
    whole = mixer("mega", function)
    for chunk, same in ((T, True), (CHUNK, False)):
        got = mixer("mega_chunk", function, chunk).whole(WHOLE, whole.params)
        assert (np.abs(got - whole.whole(WHOLE)).max() < 2e-6) == same
        assert np.abs(got - whole.whole(WHOLE))[:, :CHUNK].max() < 2e-6


def weights(own: Mixer) -> int:
    """Multiply-adds of a token with the matrices."""
    axes = jax.tree.leaves(own.axes_of(own.params))
    leaves = jax.tree.leaves(own.params)
    return sum(w.size for w, ax in zip(leaves, axes, strict=True) if ax.inputs)


def counted(own: Mixer, length: int, aligned: bool, backward: bool = True) -> tuple[int, int]:
    """FLOPs, forward and backward, of what mixes tokens."""
    x, at = jnp.zeros((B, length, D)), jnp.zeros((B, length), jnp.int32)

    def run(params, x):
        return own.apply(params, x, Context(at, at, aligned=aligned))[0]

    dense = 2 * B * length * weights(own)
    forward = count(run, own.params, x)
    if not backward:
        return forward.total - dense, 0
    total = count(jax.grad(lambda p, x: jnp.sum(run(p, x) ** 2), (0, 1)), own.params, x)
    assert total.unknown == ()
    return forward.total - dense, total.total - forward.total - 2 * dense


@pytest.mark.parametrize(
    ("kind", "function", "causal", "length", "aligned"),
    [
        ("mega", "softmax", True, 40, False),
        ("mega", "laplace", True, 3, True),
        ("mega_chunk", "softmax", True, 40, True),
        ("mega_chunk", "laplace", True, 40, False),
        ("mega_chunk", "laplace", False, 40, False),
    ],
)
def test_it_costs_its_closed_form(kind, function, causal, length, aligned):
    own = mixer(kind, function, causal=causal)
    closed = own.cls.program_flops(own.config, B, length, aligned)
    assert counted(own, length, aligned) == closed
    assert B * own.cls.exact_flops(own.config, length).forward <= closed.forward


@both
@kinds
def test_a_generated_token_costs_its_closed_form(kind, function):
    own = mixer(kind, function)
    for context in (3, 40) if kind == "mega_chunk" else (40,):
        state = own.apply(own.params, 1, context, 1, jnp.float32, method="init_state")
        at = jnp.zeros((1, 1), jnp.int32)
        got = count(
            lambda s, at=at: own.apply(own.params, jnp.zeros((1, 1, D)), Context(at, at), s), state
        )
        assert got.total - 2 * weights(own) == own.cls.step_flops(own.config, context)


@both
def test_chunks_cost_linearly_and_whole_texts_do_not(function):
    """METHODS ATTN-34: a further token costs the same at every length."""
    for kind, linear in (("mega_chunk", True), ("mega", False)):
        own = mixer(kind, function, chunk=64)
        costs = [counted(own, n, True, backward=False)[0] for n in (256, 512, 1024)]
        assert (costs[2] - costs[1] == 2 * (costs[1] - costs[0])) == linear


def test_laplace_attention_is_counted_pair_by_pair():
    pattern = Cells(CHUNK, 0) & Causal()
    pairs = 15 + 15 + 6
    assert exact_laplace_flops(pattern, B, T, 1, 6, 3).forward == 2 * B * pairs * 9
    assert laplace_flops(pattern, B, T, 1, 6, 3, aligned=True).forward == 2 * B * 3 * 25 * 9
    assert laplace_flops(pattern, B, T, 1, 6, 3).forward == 2 * B * 3 * 50 * 9
