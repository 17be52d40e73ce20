"""alpha-entmax of a vector, by bisection and by sorting; the engine's thresholds; heads in a model.

Attention by entmax stands under the engine's laws, tests/laws/test_attention_engine.py.
"""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.functional import Keys
from effjax.models.normalizers import AdaptiveEntmax
from effjax.models.sections import AttentionConfig
from effjax.ops.attention import entmax as module
from effjax.ops.attention.engine import attention
from effjax.ops.attention.entmax import Entmax, bent_slope, entmax, entmax15, sparsemax
from effjax.ops.attention.patterns import Full, Window

RANDOM = np.random.default_rng(0)
ROWS = {
    "random": RANDOM.normal(size=(4, 13)),
    "ties": RANDOM.integers(0, 3, size=(4, 13)).astype(float),
    "equal": np.full((4, 13), 0.7),
    "far apart": 1e4 * RANDOM.normal(size=(4, 13)),
    "close together": 1e-30 * RANDOM.normal(size=(4, 13)),
    "with some that are not read": np.where(
        np.arange(13) % 3, RANDOM.normal(size=(4, 13)), -np.inf
    ),
    "two, one in effect": np.array([[0.0, -0.0], [5.0, -1e4], [-np.inf, 3.0], [1.0, 1.0]]),
}
rows = pytest.mark.parametrize("name", ROWS)
by_bisection = jax.jit(entmax)
ALPHAS = (1.0, 1.0001, 1.2, 1.5, 1.9, 2.0, 2.5)


def in_float64(f, *args):
    with jax.enable_x64():
        return np.asarray(f(*(jnp.asarray(x, jnp.float64) for x in args)))


def check_optimal(p, z, alpha):
    """p is the maximum of `p . z + H(p)`, by the conditions on its gradient (no code of ours).

    With H of Tsallis, `z_i - p_i^(alpha - 1) / (alpha - 1)` is the same wherever p_i > 0, and no
    z_i lies above that elsewhere.
    """
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-13)
    for weights, scores in zip(p, z, strict=True):
        slope = scores - weights ** (alpha - 1) / (alpha - 1)
        level = slope[weights > 0]
        scale = max(1, np.abs(level).max())
        assert np.ptp(level) < 1e-9 * scale / (alpha - 1)
        assert (scores[weights == 0] <= level.max() + 1e-12 * scale).all()


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9, 2.0, 2.5])
@rows
def test_bisection_finds_the_optimum(name, alpha):
    check_optimal(in_float64(by_bisection, ROWS[name], alpha), ROWS[name], alpha)


def test_the_conditions_catch_another_alpha():
    p = in_float64(by_bisection, ROWS["random"], 1.6)
    with pytest.raises(AssertionError):
        check_optimal(p, ROWS["random"], 1.5)


@rows
def test_alpha_1_is_soft_max_and_sorting_is_exact(name):
    z = ROWS[name]
    for other, alpha in ((jax.nn.softmax, 1.0), (entmax15, 1.5), (sparsemax, 2.0)):
        found, wanted = in_float64(by_bisection, z, alpha), in_float64(jax.jit(other), z)
        np.testing.assert_allclose(found, wanted, atol=1e-14 if alpha == 1 else 1e-13)
    z = np.where(z == 0.0, 0.1, z)
    check_optimal(in_float64(jax.jit(sparsemax), z), z, 2.0)


def test_weak_scores_get_exactly_nothing_and_more_of_them_with_a_higher_alpha():
    p = [in_float64(by_bisection, 2 * ROWS["random"], alpha) for alpha in (1.0, 1.2, 1.5, 2.0)]
    zeros = [(x == 0).mean() for x in p]
    assert zeros[0] == 0
    assert zeros[1] < zeros[2] < zeros[3]
    np.testing.assert_allclose(sparsemax(jnp.array([1.0, 0.3, -0.2])), [0.85, 0.15, 0], atol=1e-7)
    np.testing.assert_allclose(sparsemax(jnp.array([2.0, 0.9, 1.0])), [1, 0, 0], atol=1e-7)


def test_a_row_that_reads_nothing_is_zero_and_so_are_its_gradients():
    z = jnp.full((2, 5), -jnp.inf).at[1, 3].set(2.0)
    for f in (partial(entmax, alpha=1.0), partial(entmax, alpha=1.5), sparsemax, entmax15):
        y, slope = jax.jit(lambda z, f=f: (f(z), jax.grad(lambda z: f(z)[:, 3].sum())(z)))(z)
        np.testing.assert_allclose(y, [[0] * 5, [0, 0, 0, 1, 0]])
        np.testing.assert_array_equal(slope, 0)


@cache
def pulled(form):
    return jax.jit(lambda z, alpha, g: jax.vjp(form, z, alpha)[1](g))


def check_jacobian(alpha, form=entmax):
    """dp/dz and dp/dalpha against central differences, in float64; one-sided at alpha = 1."""
    z, g, step = ROWS["random"], RANDOM.normal(size=(4, 13)), 1e-6
    alphas = np.full(4, alpha)
    with jax.enable_x64():
        dz, dalpha = (np.asarray(x) for x in pulled(form)(z, alphas, g))
    towards = RANDOM.normal(size=z.shape)

    def ends(z_step, alpha_step):
        return in_float64(by_bisection, z + z_step * towards, alphas + alpha_step) * g

    slope = (ends(step, 0) - ends(-step, 0)).sum(-1) / (2 * step)
    np.testing.assert_allclose((dz * towards).sum(-1), slope, rtol=1e-6, atol=1e-8)
    if alpha > 1:
        slope = (ends(0, step) - ends(0, -step)).sum(-1) / (2 * step)
    else:
        slope = (4 * ends(0, step) - ends(0, 2 * step) - 3 * ends(0, 0)).sum(-1) / (2 * step)
    np.testing.assert_allclose(dalpha, slope, rtol=1e-6, atol=1e-8)
    assert np.abs(dalpha).min() > 1e-4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_jacobian_agrees_with_finite_differences(alpha):
    check_jacobian(alpha)


def test_finite_differences_catch_a_slope_by_alpha_that_is_half(monkeypatch):
    monkeypatch.setattr(module, "bent_slope", lambda x, e: bent_slope(x, e) / 2)
    with pytest.raises(AssertionError):
        check_jacobian(1.5, lambda z, alpha: entmax(z, alpha))


@pytest.mark.parametrize("form", [sparsemax, entmax15])
def test_sorting_has_the_gradient_of_bisection(form):
    alpha, g = {sparsemax: 2.0, entmax15: 1.5}[form], RANDOM.normal(size=(4, 13))
    with jax.enable_x64():
        wanted = pulled(entmax)(ROWS["random"], np.full(4, alpha), g)[0]
        found = jax.jit(lambda z, g: jax.vjp(form, z)[1](g)[0])(ROWS["random"], g)
        np.testing.assert_allclose(found, wanted, atol=1e-12)


# The engine's thresholds


def check_passes(dtype, S, tolerance):
    """Weights over S keys against bisection: rows of any spread by heads of any alpha.

    q is a spread and k the scores; v's columns are the keys' own signs, so that y shows what the
    weights miss, and a column of ones, which must come back.
    """
    spreads = np.geomspace(0.01, 10, 17)
    alphas = np.array([1.0, 1.01, 1.25, 1.5, 1.75, 2.0])
    z, signs = RANDOM.normal(size=S), np.sign(RANDOM.normal(size=(S, 32)))
    signs[:, 0] = 1
    with jax.enable_x64(dtype == np.float64):
        q = np.zeros((1, 17, 6, 32), dtype)
        q[0, :, :, 0] = spreads[:, None]
        k, v = np.zeros((2, 1, S, 1, 32), dtype)
        k[0, :, 0, 0], v[0, :, 0] = z, signs

        def run(q, k, v, alpha):
            at = {name: jnp.zeros(x.shape[:2], int) for name, x in (("q", q), ("k", k))}
            places = {f"{name}_positions": x for name, x in at.items()}
            return attention(q, k, v, pattern=Full(), scale=1.0, normalizer=Entmax(alpha), **places)

        y = np.asarray(jax.jit(run)(q, k, v, alphas.astype(dtype)))[0]
    scores = np.broadcast_to(spreads[:, None, None] * z, (17, 6, S))
    exact = in_float64(by_bisection, scores, np.broadcast_to(alphas, (17, 6))) @ signs
    error = np.abs(y - exact).max()
    assert error < tolerance, error
    np.testing.assert_allclose(y[..., 0], 1, atol=1e-12 if dtype == np.float64 else 1e-6)


def test_few_passes_find_the_thresholds():
    check_passes(np.float64, 2048, 1e-12)
    check_passes(np.float32, 2048, 2e-5)  # scores of 40, rounded to 2e-6


@pytest.mark.deep
def test_few_passes_find_the_thresholds_of_long_rows():
    check_passes(np.float64, 8192, 1e-12)
    check_passes(np.float32, 8192, 2e-5)


def test_one_alpha_a_head_or_one_for_all():
    x, at = jnp.ones((1, 3, 4, 2)), jnp.zeros((1, 3), jnp.int32)
    options = {"pattern": Full(), "q_positions": at, "k_positions": at}
    with pytest.raises(ConfigError, match=r"one for each of 4 heads, got an array of shape \(3,\)"):
        attention(x, x, x, normalizer=Entmax(jnp.ones(3)), **options)


# Heads of a model

T, PIECE = 22, 7
SMALL = DecoderConfig(
    vocab=31,
    width=16,
    hidden=24,
    layers=2,
    pattern=("attention", "window"),
    window=Window(5),
    attention=AttentionConfig(heads=4, kv_heads=2, normalizer="adaptive"),
)


@cache
def model():
    """An adaptive decoder, its parameters with larger keys (so that scores differ), its logits."""
    init, apply, axes_of = decoder(SMALL)
    params = jax.jit(init)(jax.random.key(0))
    for unit in params["stack"]["runs"]["000"].values():
        unit["mixer"]["k"]["kernel"] *= 8
    return params, apply, axes_of, jax.jit(lambda params, tokens: apply(params, tokens)[0])


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 31, (2, T), dtype=np.int32)


def bends(params):
    return {
        kind: unit["mixer"]["normalizer"]["bend"]
        for kind, unit in params["stack"]["runs"]["000"].items()
    }


def with_bends(params, value):
    def put(path, x):
        return jnp.full_like(x, value) if "bend" in jax.tree_util.keystr(path) else x

    return jax.tree_util.tree_map_with_path(put, params)


def test_heads_differ_in_alpha_and_the_logits_hear_of_it():
    params, _, axes_of, logits = model()
    assert all(len(np.unique(bend)) == 4 for bend in bends(params).values())
    axes = axes_of(params)["stack"]["runs"]["000"]["window_01"]["mixer"]["normalizer"]["bend"]
    assert axes.outputs == ("heads",)
    base = logits(params, tokens())
    for value in (-30.0, 30.0):  # soft-max's end and sparsemax's
        assert np.abs(logits(with_bends(params, value), tokens()) - base).max() > 1e-3


def test_the_ends_of_alpha_are_soft_max_and_sparsemax():
    params, _, _, logits = model()
    for bend, attention_config in (
        (-100.0, AttentionConfig(heads=4, kv_heads=2)),
        (100.0, AttentionConfig(heads=4, kv_heads=2, normalizer="entmax", alpha=2.0)),
    ):
        fixed = jax.jit(decoder(replace(SMALL, attention=attention_config)).apply)
        bare = jax.tree.map(lambda x: x, params)
        for unit in bare["stack"]["runs"]["000"].values():
            del unit["mixer"]["normalizer"]
        wanted = fixed(bare, tokens())[0]
        found = logits(with_bends(params, bend), tokens())
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("cuts", [[*range(T + 1)], [0, 7, 14, 21, 22]])
def test_decoding_in_pieces_is_prefill(cuts):
    params, apply, _, logits = model()
    whole = np.asarray(logits(params, tokens(4)))
    state = apply(params, 2, T, PIECE, method="init_state")
    step = stepping()
    made = []
    for begin, end in pairwise(cuts):
        at = np.tile(np.arange(begin, end, dtype=np.int32), (2, 1))
        y, state = step(params, state, tokens(4)[:, begin:end], at)
        made.append(np.asarray(y))
    made = np.concatenate(made, axis=1)
    assert whole.std() > 1e-3
    assert np.abs(made - whole).max() < 2e-5 * np.abs(whole).max()
    assert (made.argmax(-1) == whole.argmax(-1)).all()


@cache
def stepping():
    apply = model()[1]

    def step(params, state, tokens, at):
        return apply(params, tokens, positions=at, segments=jnp.zeros_like(at), state=state)[:2]

    return jax.jit(step)


def test_alphas_are_learned():
    """Some steps down the gradient move every head's alpha, and the loss falls."""
    params, _, _, logits = model()

    def loss(params):
        y = jax.nn.log_softmax(logits(params, tokens(1))[:, :-1])
        return -jnp.take_along_axis(y, jnp.asarray(tokens(1))[:, 1:, None], axis=-1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    first, moved = None, params
    for _ in range(5):
        value, gradient = step(moved)
        first = value if first is None else first
        moved = jax.tree.map(lambda x, g: x - 0.3 * g, moved, gradient)
    assert value < first
    for kind, bend in bends(moved).items():
        assert (np.abs(bend - bends(params)[kind]) > 1e-7).all()


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8])
def test_heads_that_learn_alpha_begin_around_the_configs(alpha):
    section = AttentionConfig(heads=4000, normalizer="adaptive", alpha=alpha)
    drawn = AdaptiveEntmax(section, Keys(jax.random.key(0)))().alpha
    assert drawn.std() > 0.05
    np.testing.assert_allclose(np.median(drawn), alpha, atol=0.02)
