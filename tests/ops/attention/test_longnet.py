"""Dilated attention: both forms equal its definition with their gradients; cost; refusals."""

from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.sections import PositionConfig
from effjax.ops.attention import longnet
from effjax.ops.attention.longnet import (
    LongNet,
    longnet_attention,
    longnet_exact_flops,
    longnet_flops,
    longnet_row,
)
from effjax.ops.attention.naive import naive_attention
from effjax.ops.attention.patterns import Causal, Full

B, T, N, K, H = 2, 29, 4, 2, 6
RAGGED = LongNet((5, 64), (1, 3))
EVEN = LongNet((4, 8), (1, 2))


def arrays(length=T, dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, length, heads, H)).astype(dtype) for heads in (N, K, K, N)]


def definition(q, k, v, pattern, causal, bias=None):
    """The paper's: segments, every r-th token of them from the head's offset on, and the mix."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length = q.shape[1]
    total, mixed = np.zeros(q.shape[:3]), np.zeros(q.shape)
    for w, r in zip(pattern.segments, pattern.dilations, strict=True):
        for begin in range(0, length, w):
            for h in range(N):
                at = np.arange(begin, min(begin + w, length))[h % r :: r]
                own = h * K // N
                s = np.einsum("bth,bsh->bts", q[:, at, h], k[:, at, own]) / np.sqrt(H)
                if bias is not None:
                    s = s + np.asarray(bias(at[:, None], at[None, :], h))
                e = np.exp(s) * (np.tri(len(at)) if causal else 1)
                total[:, at, h] += e.sum(-1)
                mixed[:, at, h] += np.einsum("bts,bsh->bth", e, v[:, at, own])
    return mixed / np.where(total > 0, total, 1)[..., None]


@jax.tree_util.register_pytree_node_class
class Far:
    """A bias of absolute positions and heads, with something to learn."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, q_pos, k_pos, head):
        return self.slope * (0.1 * q_pos - 0.2 * k_pos + 0.3 * head * k_pos / 9)

    def tree_flatten(self):
        return (self.slope,), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


def by_row(pattern, within, q, k, v, bias):
    return longnet_row(q, k, v, pattern=pattern, within=within, bias=bias)


def by_engine(pattern, within, q, k, v, bias):
    at = jnp.tile(jnp.arange(q.shape[1]), (B, 1))
    places = {"q_positions": at, "k_positions": at, "ordered": True}
    return longnet_attention(q, k, v, pattern=pattern, within=within, bias=bias, **places)


@partial(jax.jit, static_argnums=(0, 1, 2))
def values(form, pattern, within, q, k, v):
    return form(pattern, within, q, k, v, None)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(form, pattern, within, q, k, v, dy, bias):
    y, pull = jax.vjp(partial(form, pattern, within), q, k, v, bias)
    return y, *jax.tree.leaves(pull(dy))


@cache
def found(form, pattern, within, biased):
    with jax.enable_x64(True):
        bias = Far(jnp.asarray(0.7)) if biased else None
        return [np.asarray(x) for x in run(form, pattern, within, *arrays(), bias)]


CASES = [(RAGGED, Causal(), True), (EVEN, Full(), False)]


@pytest.mark.parametrize(("pattern", "within", "biased"), CASES)
@pytest.mark.parametrize("form", [by_row, by_engine])
def test_equals_the_definition(form, pattern, within, biased):
    bias = Far(0.7) if biased else None
    wanted = definition(*arrays()[:3], pattern, within == Causal(), bias)
    assert wanted.std() > 1e-2
    np.testing.assert_allclose(found(form, pattern, within, biased)[0], wanted, atol=1e-12)


@pytest.mark.parametrize(("pattern", "within", "biased"), CASES)
def test_both_forms_have_the_same_gradients(pattern, within, biased):
    """By paths that share the engine only: one gathers rows, the other masks and counts."""
    one, other = (found(form, pattern, within, biased) for form in (by_row, by_engine))
    assert len(one) == (5 if biased else 4)
    for a, b in zip(one, other, strict=True):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())


def test_the_gradient_is_that_of_one_soft_max():
    """It goes through the denominators: torchscale's, which stops there, is another."""
    *inputs, dy = arrays()
    step, turn = 1e-6, arrays()[3]
    ends = [
        (definition(inputs[0] + sign * step * turn, *inputs[1:], EVEN, False) * dy).sum()
        for sign in (1, -1)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    dq = found(by_row, EVEN, Full(), False)[1]
    np.testing.assert_allclose((dq * turn).sum(), slope, rtol=1e-6)


def test_equality_catches_a_mean_of_the_parts(monkeypatch):
    monkeypatch.setattr(longnet, "merge_parts", lambda parts: sum(y for y, _ in parts) / len(parts))
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays())
    wanted = definition(q, k, v, EVEN, False)
    assert np.abs(values(by_row, EVEN, Full(), q, k, v) - wanted).max() > 1e-2


def test_one_part_without_dilation_is_dense():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays())
    at = jnp.tile(jnp.arange(T), (B, 1))
    wanted = naive_attention(q, k, v, pattern=Causal(), q_positions=at, k_positions=at)
    for length in (T, 10 * T):
        y = values(by_row, LongNet((length,), (1,)), Causal(), q, k, v)
        np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_a_token_that_no_part_selects_gives_zero():
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays())
    y = np.asarray(values(by_row, LongNet((8,), (3,)), Causal(), q, k, v))
    selected = (np.arange(T)[:, None] % 8 - np.arange(N)) % 3 == 0
    assert ((np.abs(y).max(axis=(0, 3)) > 0) == selected).all()


def test_the_closed_form_is_what_the_program_computes():
    for pattern, within, length in ((RAGGED, Causal(), T), (EVEN, Full(), 32)):
        q, k = (jax.ShapeDtypeStruct((B, length, heads, H), jnp.float32) for heads in (N, K))

        def loss(q, k, v, pattern=pattern, within=within):
            return by_row(pattern, within, q, k, v, None).sum()

        forward = flops.count(loss, q, k, k)
        both = flops.count(jax.grad(loss, (0, 1, 2)), q, k, k)
        assert not forward.unknown + both.unknown
        closed = longnet_flops(pattern, within, B, length, N, H)
        assert (forward.total, both.total) == (closed.forward, sum(closed))


def test_work_grows_linearly():
    pattern = LongNet((64, 256, 1024), (1, 4, 16))
    made = [longnet_flops(pattern, Causal(), 1, n, N, H).forward for n in (1024, 2048, 4096)]
    short, long = (y - x for x, y in pairwise(made))
    assert long == 2 * short
    exact = longnet_exact_flops(EVEN, Full(), 1, 16, N, H)
    assert exact.forward == 4 * H * N * (4 * 4 * 4 + 2 * 4 * 4)


@pytest.mark.parametrize("scheme", ["rope", pytest.param("alibi", marks=pytest.mark.deep)])
def test_a_model_reads_whole_rows_as_it_reads_placed_ones(scheme):
    """The linear form is taken without positions, the engine's with them."""
    config = DecoderConfig(
        vocab=11,
        width=16,
        hidden=16,
        layers=1,
        pattern=("longnet",),
        longnet=RAGGED,
        position=PositionConfig(scheme=scheme),
    )
    init, apply, _ = decoder(config)
    params = jax.jit(init)(jax.random.key(0))
    tokens = jnp.arange(T)[None] % 11
    whole = jax.jit(apply)(params, tokens)[0]
    placed = jax.jit(apply)(params, tokens, positions=jnp.arange(T)[None])[0]
    assert np.std(whole) > 1e-2
    np.testing.assert_allclose(whole, placed, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LongNet((0,), (1,)), r"LongNet\.segments"),
        (lambda: LongNet((-4,), (1,)), r"LongNet\.segments"),
        (lambda: LongNet((4,), (0,)), r"LongNet\.dilations"),
        (lambda: LongNet((4,), (-1,)), r"LongNet\.dilations"),
        (lambda: LongNet((), ()), "at least one segment, got 0 for 0 segments"),
        (lambda: LongNet((4, 8), (1,)), "got 1 for 2 segments"),
        (
            lambda: DecoderConfig(pattern=("longnet",), position=PositionConfig(scheme="shaw")),
            "'shaw' does not go with 'longnet'",
        ),
    ],
)
def test_bad_sizes_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(1))
    with pytest.raises(ValueError, match="within must be"):
        longnet_row(q, k, v, pattern=EVEN, within=EVEN)
