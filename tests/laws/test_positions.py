"""The laws of every position scheme: one table, one small decoder for each.

The decoder has grouped keys, a window narrower than its rows and a cache that rolls over, so that a
scheme is seen with all of them. Each scheme compiles once for whole rows and once for pieces.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models import positions as schemes
from effjax.models.configs import DecoderConfig, EncoderConfig
from effjax.models.context import Context
from effjax.models.decoder import Decoder, decoder
from effjax.models.functional import Keys, functional
from effjax.models.kinds import Scheme
from effjax.models.mixers import Attention
from effjax.models.positions import SCHEMES, NoPositions
from effjax.models.positions.absolute import LearnedEmbedding
from effjax.models.sections import AttentionConfig, PositionConfig
from effjax.ops.attention.patterns import Window
from effjax.ops.position.interpolation import (
    interpolated_frequencies,
    ntk_frequencies,
    yarn_frequencies,
)
from effjax.ops.position.rope import angles, frequencies, rope, rotate

T, PIECE, WIDTH = 21, 7, 12
BASE = DecoderConfig(
    vocab=31,
    width=16,
    hidden=24,
    layers=2,
    pattern=("window",),
    attention=AttentionConfig(heads=4, kv_heads=2),
    window=Window(WIDTH),
    position=PositionConfig(
        rope_base=100.0,
        train_length=32,
        factor=2.0,
        yarn_fast=4.0,
        buckets=8,
        max_distance=10,
        clip=3,
        kernels=2,
        fire_hidden=4,
        sandwich_width=8,
    ),
)


@dataclass(frozen=True)
class Claim:
    """What a scheme says of itself.

    relative: moving a text changes nothing. gaps: a gap in its positions changes what follows.
    learned: its parts that have gradients. rotary: it turns queries and keys.
    """

    relative: bool = True
    gaps: bool = True
    learned: tuple[str, ...] = ()
    rotary: bool = False


CLAIMS = {
    "none": Claim(gaps=False),
    "sinusoidal": Claim(relative=False),
    "learned": Claim(relative=False),
    "shaw": Claim(learned=("keys", "values")),
    "t5": Claim(learned=("table",)),
    "tisa": Claim(learned=("amplitudes", "offsets", "sharpness")),
    "fire": Claim(relative=False, learned=("b1", "c", "multiple", "w1", "w2")),
    "alibi": Claim(),
    "kerple_log": Claim(learned=("r1", "r2")),
    "kerple_power": Claim(learned=("r1", "r2")),
    "sandwich": Claim(),
    "rope": Claim(rotary=True),
    "pi": Claim(rotary=True),
    "ntk": Claim(rotary=True),
    "yarn": Claim(rotary=True),
    "dynamic_ntk": Claim(relative=False),  # past the length of training, up to there it is RoPE
    "randomized": Claim(relative=False),  # its base is sinusoidal
}


def config(scheme: str) -> DecoderConfig:
    return replace(BASE, position=replace(BASE.position, scheme=scheme))


@cache
def common():
    """Parameters of the decoder without positions: all schemes share them."""
    return jax.jit(decoder(config("none")).init)(jax.random.key(7))


def parameters(scheme: str):
    """The common ones with those of a scheme, each layer's own, as its constructor draws them."""

    def drawn(build, seed):
        return functional(build).init(jax.random.key(seed))

    own = config(scheme)
    params, kind = common(), SCHEMES[scheme]
    layers = [drawn(lambda rngs: kind(own, rngs), seed) for seed in range(BASE.layers)]
    if layers[0]:
        unit = params["stack"]["runs"]["000"]["window_00"]
        position = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
        unit = {**unit, "mixer": {**unit["mixer"], "position": position}}
        params = {**params, "stack": {"runs": {"000": {"window_00": unit}}}}
    if kind.embedding(own, Keys(jax.random.key(0))) is not None:
        table = drawn(lambda rngs: kind.embedding(own, rngs), BASE.layers)
        params = {**params, **({"position": table} if table else {})}
    return params


class Member:
    """A decoder with random parameters, and its programs."""

    def __init__(self, apply, params):
        self.apply, self.params = apply, params
        self.run = jax.jit(lambda p, *row: self.call(p, *row)[0])
        self.step = jax.jit(lambda p, state, *row: self.call(p, *row, state=state)[:2])

    def call(self, params, tokens, positions, segments, **options):
        return self.apply(params, tokens, positions=positions, segments=segments, **options)

    def row(self, tokens, positions=None, segments=None):
        positions = plain()[0] if positions is None else positions
        segments = np.zeros_like(positions) if segments is None else segments
        return np.asarray(self.run(self.params, tokens, positions, segments))

    def pieces(self, *row):
        state = self.apply(self.params, 2, T, PIECE, method="init_state")
        made = []
        for begin, end in pairwise(range(0, T + 1, PIECE)):
            part = (x[:, begin:end] for x in row)
            logits, state = self.step(self.params, state, *part)
            made.append(np.asarray(logits))
        return np.concatenate(made, axis=1)


@cache
def member(scheme: str) -> Member:
    return Member(decoder(config(scheme)).apply, parameters(scheme))


def texts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab, (2, T), dtype=np.int32)


def plain() -> tuple[np.ndarray, np.ndarray]:
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    return positions, np.zeros_like(positions)


def mixed() -> tuple[np.ndarray, np.ndarray]:
    """A row of two documents, and one of a document with padding before and inside it."""
    positions, segments = plain()
    positions[0, 9:] -= 9
    segments[0, 9:] = 1
    positions[1, 2:8], positions[1, 11:] = np.arange(6), np.arange(6, 16)
    positions[1, :2] = positions[1, 8:11] = -1
    return positions, segments


def close(got, wanted, tolerance=2e-5):
    wanted = np.asarray(wanted)
    assert wanted.std() > 1e-3  # not vacuous
    error = np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, f"relative error {error:.1e}"


every = pytest.mark.parametrize("scheme", CLAIMS)


def test_every_scheme_is_in_the_table_and_in_the_config():
    assert set(CLAIMS) == set(SCHEMES) == set(get_args(Scheme))


def test_what_a_scheme_does_not_go_with_is_refused():
    """Never ignored: kinds without late rotation, tables or draws, and models without embedding."""
    for scheme, call in (("shaw", "bias"), ("dynamic_ntk", "rotate"), ("randomized", "bias")):
        own = SCHEMES[scheme](config(scheme), Keys(jax.random.key(0)))
        with pytest.raises(ConfigError, match=f"position scheme '{scheme}'"):
            getattr(own, call)(*[None, None] if call == "rotate" else [])
    for scheme in ("sinusoidal", "learned", "randomized"):
        if not EncoderConfig.embeds_positions:
            with pytest.raises(ConfigError, match="adds no positions to its embedding"):
                EncoderConfig(position=PositionConfig(scheme=scheme))
    with pytest.raises(ConfigError, match="'shaw'"):
        replace(config("shaw"), attention=AttentionConfig(normalizer="entmax"))


# Laws


def check_causality(model, positions):
    tokens, segments = texts(0), plain()[1]
    before = model.row(tokens, positions, segments)
    for t in (0, 9, T - 2):
        after = model.row(np.where(np.arange(T) > t, texts(1), tokens), positions, segments)
        assert np.abs(after - before)[:, : t + 1].max() == 0.0
        assert np.abs(after - before)[:, t + 1 :].max() > 1e-4


def check_decoding(model):
    close(model.pieces(texts(4), *plain()), model.row(texts(4)))
    positions, segments = mixed()
    live = positions >= 0
    whole = model.row(texts(5), positions, segments)
    close(model.pieces(texts(5), positions, segments)[live], whole[live])


def check_padding(model):
    """Wherever it stands and whatever stands there, tokens outside the vocabulary included."""
    positions, live = mixed()[0][[1, 1]], 16
    wanted = model.row(texts(8))[:, :live]
    for pad in (texts(9), np.full((2, T), 10**6, np.int32)):
        tokens = pad.copy()
        tokens[positions >= 0] = texts(8)[:, :live].ravel()
        got = model.row(tokens, positions)
        close(got[positions >= 0].reshape(wanted.shape), wanted, 1e-5)


def check_packing(model, segments):
    positions, tokens = mixed()[0][[0, 0]], texts(10)
    together = model.row(tokens, positions, segments)
    alone = np.concatenate([tokens[:, 9:], tokens[:, :9]], axis=1)
    close(together[:, 9:], model.row(alone)[:, : T - 9], 1e-5)
    close(together[:, :9], model.row(tokens)[:, :9], 1e-5)


def check_shift(model, relative):
    """Moved to where float32 angles would be off by 6e-3 radians, if relative; changed if not."""
    positions, _ = plain()
    found, wanted = model.row(texts(2), positions + 100_000), model.row(texts(2))
    moved = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert wanted.std() > 1e-3
    assert moved < 1e-4 if relative else moved > 1e-3


def check_gaps(model, gaps):
    positions, _ = plain()
    moved = model.row(texts(3), positions + 2 * (positions >= 9)) - model.row(texts(3))
    assert np.abs(moved[:, :9]).max() < 1e-6
    # Token 9 still sees all before it; what comes after has fewer tokens in its window.
    assert (np.abs(moved[:, 9]).max() > 1e-5) == gaps


@every
def test_a_later_token_changes_no_earlier_logit(scheme):
    check_causality(member(scheme), plain()[0])


@every
def test_decoding_in_pieces_is_prefill(scheme):
    """Dynamic NTK only up to its length of training, which these rows do not reach."""
    check_decoding(member(scheme))


@every
def test_padding_changes_nothing(scheme):
    check_padding(member(scheme))


@every
def test_a_packed_document_is_as_if_alone(scheme):
    check_packing(member(scheme), mixed()[1][[0, 0]])


@every
def test_moving_a_text_changes_what_the_scheme_says(scheme):
    check_shift(member(scheme), CLAIMS[scheme].relative)


@every
def test_a_gap_is_distance(scheme):
    check_gaps(member(scheme), CLAIMS[scheme].gaps)


# Planted faults


class ByIndex(NoPositions):
    """A rotation by the index in the call, not by position."""

    def rotate(self, x, positions):
        index = jnp.broadcast_to(jnp.arange(x.shape[1])[None], positions.shape)
        return rope(x, index, BASE.position.rope_base)


def test_decoding_and_padding_catch_an_index_for_a_position(monkeypatch):
    monkeypatch.setitem(schemes.SCHEMES, "none", ByIndex)
    model = Member(functional(lambda rngs: Decoder(config("none"), rngs)).apply, common())
    with pytest.raises(AssertionError):
        check_decoding(model)
    with pytest.raises(AssertionError):
        check_padding(model)


def test_the_other_laws_catch_their_faults():
    with pytest.raises(AssertionError):
        check_causality(member("alibi"), np.zeros_like(plain()[0]))  # all see all
    with pytest.raises(AssertionError):
        check_packing(member("alibi"), np.zeros_like(plain()[0]))
    with pytest.raises(AssertionError):
        check_shift(member("sinusoidal"), relative=True)
    with pytest.raises(AssertionError):
        check_shift(member("alibi"), relative=False)
    with pytest.raises(AssertionError):
        check_gaps(member("none"), gaps=True)
    with pytest.raises(AssertionError):
        check_gaps(member("rope"), gaps=False)


# Gradients of what is learned, in float64


def attention(scheme: str) -> DecoderConfig:
    return replace(config(scheme), pattern=("attention",))


@cache
def mixer(scheme: str):
    init, apply, _ = functional(lambda rngs: Attention(attention(scheme), rngs))
    params = jax.jit(init)(jax.random.key(3))

    @jax.jit
    def loss(position, rest, x, weight, positions, segments):
        context = Context(positions, segments)
        return (apply({**rest, "position": position}, x, context)[0] * weight).sum()

    return params, jax.jit(jax.value_and_grad(loss))


def differentiated(scheme, move=None, step=0.0):
    """The loss and its gradient by the scheme's parts, after a step along one of them."""
    params, run = mixer(scheme)
    x, weight = np.random.default_rng(0).normal(size=(2, 2, T, BASE.width))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
        position, rest = params["position"], {k: v for k, v in params.items() if k != "position"}
        if move is not None:
            position = {**position, move: position[move] + step * direction(position[move])}
        value, gradient = run(position, rest, x, weight, *mixed())
        return float(value), jax.tree.map(np.asarray, gradient)


def direction(x):
    return np.random.default_rng(1).normal(size=np.shape(x))


def check_gradient(scheme, name, gradient):
    ends = [differentiated(scheme, name, sign * 1e-4)[0] for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-4
    assert abs(slope) > 1e-5, f"{name} has no effect"
    np.testing.assert_allclose((gradient * direction(gradient)).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("scheme", [name for name, claim in CLAIMS.items() if claim.learned])
def test_what_is_learned_has_the_gradient_of_finite_differences(scheme):
    _, gradients = differentiated(scheme)
    assert set(CLAIMS[scheme].learned) <= set(gradients)
    for name in CLAIMS[scheme].learned:
        check_gradient(scheme, name, gradients[name])


def test_finite_differences_catch_a_wrong_gradient():
    _, gradients = differentiated("shaw")
    with pytest.raises(AssertionError):
        check_gradient("shaw", "keys", 1.001 * gradients["keys"])


def test_a_learned_vector_has_the_gradient_of_where_it_stands():
    init, apply, _ = functional(lambda rngs: LearnedEmbedding(6, 4, rngs))
    params = init(jax.random.key(0))
    positions = jnp.asarray([[0, 1, 2, 9], [0, 5, -1, 1]])
    weight = jnp.arange(32.0).reshape(2, 4, 4)

    def loss(params):
        y = apply(params, jnp.zeros((2, 4, 4)), positions)
        return (y * weight * (positions >= 0)[..., None]).sum()

    gradient = np.asarray(jax.grad(loss)(params)["table"])
    wanted = np.zeros((6, 4))
    for (b, t), p in np.ndenumerate(positions):
        if p >= 0:
            wanted[min(p, 5)] += weight[b, t]
    np.testing.assert_allclose(gradient, wanted)


# Angles and biases far out, whatever the type of activations


def check_rotation(rotate, tolerance):
    """bfloat16 unit vectors at position 131071 meet as they do at 0, up to their own rounding."""
    x = np.random.default_rng(0).normal(size=(2, 1, 9, 1, 8))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    q, k = jnp.asarray(x, jnp.bfloat16)
    near = jnp.arange(9)[None]

    def meet(q, k, at):
        q, k = (np.asarray(rotate(x, at), np.float64) for x in (q, k))
        return np.einsum("bthd,bshd->bts", q, k)

    assert rotate(q, near).dtype == jnp.bfloat16
    wanted = meet(q.astype(jnp.float32), k.astype(jnp.float32), near)
    assert wanted.std() > 1e-2
    assert np.abs(meet(q, k, near + 131_063) - wanted).max() < tolerance
    exact = meet(q.astype(jnp.float32), k.astype(jnp.float32), near + 131_063)
    assert np.abs(exact - wanted).max() < 1e-5


@pytest.mark.parametrize("scheme", [name for name, claim in CLAIMS.items() if claim.rotary])
def test_bfloat16_is_rotated_by_exact_angles(scheme):
    rotate = SCHEMES[scheme](config(scheme), None).rotate
    check_rotation(rotate, 2**-6)


def test_the_law_of_angles_catches_those_of_bfloat16():
    def plain(x, positions):
        angle = positions[..., None].astype(x.dtype) * jnp.ones((1, 1, 4), x.dtype)
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    with pytest.raises(AssertionError):
        check_rotation(plain, 2**-6)


# Dynamic NTK past its length of training


@cache
def dynamic():
    """One layer, whose inputs do not depend on what came later."""
    own = config("dynamic_ntk")
    position = replace(own.position, train_length=8)
    apply = decoder(replace(own, window=Window(T), position=position)).apply
    params = jax.tree.map(lambda x: x, common())
    params["stack"] = jax.tree.map(lambda x: x[:1], params["stack"])
    row = jax.jit(partial(apply, params))
    return apply, params, row


def test_dynamic_ntk_decodes_what_a_fresh_pass_of_each_length_gives():
    apply, params, row = dynamic()
    tokens, (positions, segments) = texts(6), plain()
    state = apply(params, 2, T, 1, method="init_state")
    step = jax.jit(lambda state, *row: apply_step(apply, params, state, *row))
    whole = np.asarray(row(tokens, positions=positions, segments=segments)[0])
    differs = 0.0
    for n in range(1, T + 1):
        part = slice(n - 1, n)
        logits, state = step(state, tokens[:, part], positions[:, part], segments[:, part])
        if n not in (1, 7, 8, 9, 14, T):
            continue
        at = np.where(positions < n, positions, -1)
        fresh = np.asarray(row(tokens, positions=at, segments=segments)[0])[:, n - 1]
        close(logits[:, 0], fresh)
        differs = max(differs, np.abs(fresh - whole[:, n - 1]).max())
    assert differs > 1e-3  # past 8 tokens a row read at once is another function: the exemption


def apply_step(apply, params, state, tokens, positions, segments):
    return apply(params, tokens, positions=positions, segments=segments, state=state)[:2]


def test_dynamic_ntk_scales_each_document_by_its_own_length():
    _, _, row = dynamic()
    positions, segments = mixed()
    tokens = texts(6)
    both = np.asarray(row(tokens, positions=positions, segments=segments)[0])[0]
    hidden = np.where(segments == 1, -1, positions)
    alone = np.asarray(row(tokens, positions=hidden, segments=segments)[0])[0]
    close(both[:9], alone[:9])


# No positions


def test_without_positions_order_still_counts_and_a_probe_reads_where_a_token_stands():
    """The mask tells: a token sees all before it and no other."""
    model, tokens = member("none"), texts(2)
    swapped = tokens.copy()
    swapped[:, [2, 5]] = tokens[:, [5, 2]]
    assert np.abs(model.row(swapped) - model.row(tokens))[:, 6:9].max() > 1e-3

    # Equal weights over what is seen, and a first token that stands out: 1 / (1 + p) of it is read.
    params, _ = mixer("none")
    apply = functional(lambda rngs: Attention(attention("none"), rngs)).apply
    flat = {**params, "q": {"kernel": 0 * params["q"]["kernel"]}}
    x = jnp.zeros((1, T, BASE.width)).at[:, 0, 0].set(1.0)
    y = jax.jit(apply)(flat, x, Context(jnp.arange(T)[None], jnp.zeros((1, T), jnp.int32)))[0]
    probe = np.asarray(y @ y[0, 0] / (y[0, 0] @ y[0, 0]))[0]
    np.testing.assert_allclose(1 / probe - 1, np.arange(T), atol=1e-3)


# Randomised places


def test_randomized_positions_are_positions_in_evaluation_and_drawn_in_training():
    model, base = member("randomized"), member("sinusoidal")
    wanted = base.row(texts(2))
    close(model.row(texts(2)), wanted, 1e-6)
    run = jax.jit(lambda key, *row: model.call(model.params, *row, key=key)[0])
    keys = (jax.random.key(seed) for seed in (1, 1, 2))
    one, again, two = (np.asarray(run(key, texts(2), *plain())) for key in keys)
    assert np.array_equal(one, again)
    assert np.abs(one - wanted).max() > 1e-3
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("base", ["rope", "alibi"])
def test_an_attention_sees_drawn_places_in_training_alone(base):
    own = replace(BASE.position, randomized_base=base, train_length=T, factor=8.0)
    configs = [replace(BASE, position=replace(own, scheme=s)) for s in (base, "randomized")]
    fixed, drawn = (functional(lambda rngs, c=c: Attention(c, rngs)) for c in configs)
    params = jax.jit(fixed.init)(jax.random.key(0))
    nested = dict(params)
    if "position" in params:
        nested["position"] = {"base": params["position"]}
    x = jax.random.normal(jax.random.key(1), (1, T, BASE.width))
    at = jnp.arange(T)[None]
    contexts = [
        Context(at, jnp.zeros_like(at), key=k) for k in (None, *jax.random.split(jax.random.key(2)))
    ]
    run = jax.jit(lambda p, context: drawn.apply(p, x, context)[0])
    evaluated, one, two = (np.asarray(run(nested, context)) for context in contexts)
    wanted = jax.jit(lambda p: fixed.apply(p, x, contexts[0])[0])(params)
    np.testing.assert_array_equal(evaluated, wanted)
    assert min(np.abs(one - wanted).max(), np.abs(one - two).max()) > 1e-3


# Rotary schemes

TURNS = {
    "rope": (frequencies(8, 100.0), 1.0),
    "pi": (interpolated_frequencies(8, 100.0, 2.0), 1.0),
    "ntk": (ntk_frequencies(8, 100.0, 2.0), 1.0),
    "yarn": (yarn_frequencies(8, 100.0, 2.0, 32, slow=1.0, fast=4.0), 0.1 * np.log(2.0) + 1),
}


@pytest.mark.parametrize("scheme", TURNS)
def test_a_rotary_scheme_has_its_own_frequencies_and_gain_from_the_config(scheme):
    theta, gain = TURNS[scheme]
    assert sum(np.array_equal(theta, other) for other, _ in TURNS.values()) == 1
    x = jax.random.normal(jax.random.key(0), (2, T, 1, 8))
    at = jnp.tile(jnp.arange(T)[None], (2, 1))
    found = SCHEMES[scheme](config(scheme), Keys(jax.random.key(0))).rotate(x, at)
    np.testing.assert_allclose(found, rotate(x, angles(at, theta), gain), atol=1e-6)


@pytest.mark.parametrize(("kind", "rows"), [(DecoderConfig, 8), (EncoderConfig, 4)])
def test_t5_keeps_buckets_for_later_keys_only_where_they_are_read(kind, rows):
    scheme = SCHEMES["t5"](kind(position=config("t5").position), Keys(jax.random.key(0)))
    told = scheme.bias()(jnp.asarray([T]), jnp.arange(T + 1), jnp.asarray([0]))
    assert len(np.unique(told)) == rows
