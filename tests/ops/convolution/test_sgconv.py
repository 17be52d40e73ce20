"""SGConv: its kernel against plain numpy, its two principles, its mixer and its costs."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers.sgconv import SGConv
from effjax.models.sections import SGConvConfig
from effjax.ops.convolution.sgconv import sgconv_kernel, sgconv_norm, sgconv_scales, upsampled
from effjax.weights import count_parameters

D, G, W, T = 4, 4, 3, 17
CONFIG = DecoderConfig(
    width=D, pattern=("sgconv",), layers=1, sgconv=SGConvConfig(length=24, taps=W)
)


def weights(seed: int = 0, scales: int = G) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(D, scales, W)).astype(np.float32)


def plain_kernel(w: np.ndarray, decay: float) -> np.ndarray:
    """Scale by scale; numpy's interpolation is constant beyond the ends, as the paper's is."""
    pieces = []
    for i in range(w.shape[1]):
        factor = 2 ** max(i - 1, 0)
        at = (np.arange(W * factor) + 0.5) / factor - 0.5
        pieces.append(decay**i * np.stack([np.interp(at, np.arange(W), row) for row in w[:, i]]))
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_upsampling_is_linear_interpolation(factor):
    at = (np.arange(W * factor) + 0.5) / factor - 0.5
    want = np.stack([np.interp(at, np.arange(W), row) for row in weights()[:, 0]])
    np.testing.assert_allclose(upsampled(jnp.asarray(weights()[:, 0]), factor), want, atol=1e-6)


@pytest.mark.parametrize("scales", [1, 2, G])
def test_the_kernel_is_the_papers(scales):
    w = weights(scales=scales)
    kernel = sgconv_kernel(jnp.asarray(w), decay=0.3)
    assert kernel.shape == (D, W << (scales - 1))
    np.testing.assert_allclose(kernel, plain_kernel(w, 0.3), atol=1e-6)
    norm = sgconv_norm(kernel)
    np.testing.assert_allclose(
        sgconv_norm(sgconv_kernel(jnp.asarray(w), norm, decay=0.3)), 1, rtol=1e-5
    )


@pytest.mark.parametrize("length", [1, W, W + 1, 2 * W, 2 * W + 1, 1000])
def test_scales_reach_the_length_and_are_no_more_than_that_takes(length):
    scales = sgconv_scales(length, W)
    assert W << (scales - 1) >= length
    assert scales == 1 or W << (scales - 2) < length


def build(config: DecoderConfig):
    init, apply, _ = functional(lambda rngs: SGConv(config, rngs))
    return jax.jit(init)(jax.random.key(0)), apply


@pytest.fixture(scope="module")
def mixer():
    return build(CONFIG)


def test_parameters_grow_as_the_logarithm_of_the_length():
    """One scale more, W weights a channel, for each doubling."""

    def size(length: int) -> int:
        config = replace(CONFIG, sgconv=SGConvConfig(length=length, taps=W))
        init = functional(lambda rngs: SGConv(config, rngs)).init
        return count_parameters(jax.eval_shape(init, jax.random.key(0)))

    sizes = [size(W << n) for n in range(12)]
    assert np.diff(sizes).tolist() == [D * W] * 11


def test_nearer_tokens_weigh_more():
    """Scale by scale the weights fall by the decay: the mean square of many channels does."""
    w = np.random.default_rng(0).normal(size=(1000, 6, W)).astype(np.float32)
    kernel = np.asarray(jax.jit(sgconv_kernel)(w))
    edges = [0, *(W << i for i in range(6))]
    size = [np.sqrt((kernel[:, a:b] ** 2).mean()) for a, b in pairwise(edges)]
    assert (np.diff(size) < 0).all()
    assert 0.4 < size[1] / size[0] < 0.6


def test_the_mixer_is_the_papers_and_starts_at_norm_one(mixer):
    params, apply = mixer
    p = jax.tree.map(np.asarray, params)
    kernel = plain_kernel(p["weights"], 0.5) / p["norm"][:, None]
    np.testing.assert_allclose((kernel**2).sum(axis=1), 1, rtol=1e-5)
    x = np.random.default_rng(1).normal(size=(2, T, D)).astype(np.float32)
    y = p["skip"] * np.float64(x)
    for s in range(T):
        y[:, s:] += kernel[:, s] * x[:, : T - s]
    y = y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) / 2  # gelu
    a, b = np.einsum("btd,dge->gbte", y, p["mix"]["kernel"])
    at = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    got = jax.jit(lambda p, x: apply(p, x, Context(at, jnp.zeros_like(at)))[0])(params, x)
    np.testing.assert_allclose(got, a / (1 + np.exp(-b)), atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_mixer_costs_its_closed_form(mixer, aligned):
    params, apply = mixer
    at = jnp.zeros((2, T), jnp.int32)

    def loss(both):
        y = apply(both["params"], both["x"], Context(at, at, aligned=aligned))[0]
        return jnp.sum(jnp.sin(y))

    both = {"params": params, "x": jnp.zeros((2, T, D))}
    forward = flops.count(loss, both).total
    backward = flops.count(jax.grad(loss), both).total - forward
    projection = 2 * 2 * T * 2 * D * D
    claimed = SGConv.program_flops(CONFIG, 2, T, aligned)
    assert (forward - projection, backward - 2 * projection) == claimed


@pytest.mark.parametrize("context", [5, 40])
def test_a_generated_token_costs_its_closed_form(mixer, context):
    params, apply = mixer
    state = apply(params, 1, context, 1, jnp.float32, method="init_state")
    at = jnp.zeros((1, 1), jnp.int32)
    step = lambda p, s, x: apply(p, x, Context(at, at), s)[0]  # noqa: E731
    total = flops.count(step, params, state, jnp.zeros((1, 1, D))).total
    assert total - 4 * D * D == SGConv.step_flops(CONFIG, context)
