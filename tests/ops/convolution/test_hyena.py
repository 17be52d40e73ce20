"""Hyena: its filters against plain numpy, its operator against the papers' formulas, its costs."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers.hyena import Hyena
from effjax.models.sections import HyenaConfig
from effjax.ops.convolution.implicit_filter import (
    FilterNetwork,
    decay_rates,
    implicit_filter,
    implicit_filter_flops,
)
from effjax.ops.convolution.long import long_convolution
from effjax.ops.convolution.short import short_convolution
from effjax.ops.recurrence.h3 import h3
from effjax.ops.recurrence.state_space import discretise
from effjax.ops.recurrence.state_space_naive import vandermonde_kernel

D, T, L = 6, 11, 16
OWN = HyenaConfig(order=3, length=L, bands=3, hidden=5, inner=2)
CONFIG = DecoderConfig(width=D, pattern=("hyena",), layers=1, hyena=OWN)


@cache
def mixer(config: DecoderConfig = CONFIG):
    """(params, apply) of a mixer alone."""
    init, apply, _ = functional(lambda rngs: Hyena(config, rngs))
    return jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0))), apply


@cache
def run(config: DecoderConfig = CONFIG):
    apply = mixer(config)[1]

    def whole(params, x):
        at = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        return apply(params, x, Context(at, jnp.zeros_like(at)))[0]

    return jax.jit(whole)


def plain_filter(p: dict, length: int, bands: int, taps: int) -> np.ndarray:
    """The filters of a mixer, tap by tap, from the formula of the paper and its code: [G S D]."""
    out = np.zeros((*p["rate"].shape, taps))
    for s in range(taps):
        t, angle = s / (length - 1), 2 * np.pi * s / length * np.linspace(1e-4, bands - 1, bands)
        x = np.concatenate([[t], np.exp(-1j * angle).real, np.exp(-1j * angle).imag])
        x = np.sin(p["frequency"] * (x @ p["w_in"] + p["b_in"]))
        for w, b in zip(p["inner"], p["b_inner"], strict=True):
            x = np.sin(p["frequency"] * (x @ w + b))
        out[..., s] = np.einsum("f,fgd->gd", x, p["w_out"]) * np.exp(-t * p["rate"])
    return out.swapaxes(1, 2)


def convolved(u: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """sum_s kernel_{t-s} u_s over rows [B T D] and a kernel [S D]."""
    y = np.zeros(u.shape)
    for s in range(min(len(kernel), u.shape[1])):
        y[:, s:] += kernel[s] * u[:, : u.shape[1] - s]
    return y


def plain_hyena(p: dict, x: np.ndarray, own: HyenaConfig) -> np.ndarray:
    """The operator of the paper's code, in numpy."""
    z = np.einsum("btd,dge->gbte", x, p["inputs"]["kernel"])
    z = [
        b + convolved(part, w.T[::-1])
        for part, w, b in zip(z, p["short"], p["short_bias"], strict=True)
    ]
    *gates, v = z
    filters = plain_filter(p, own.length, own.bands, min(own.length, x.shape[1]))
    for h, skip, gate in zip(filters, p["skip"], gates[:0:-1], strict=True):
        v = v * gate
        v = convolved(v, h) + skip * v
    return v * gates[0] @ p["outputs"]["kernel"]


def texts(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, length, D)).astype(np.float32)


def close(got, wanted, tolerance=2e-5):
    assert np.std(wanted) > 1e-3
    assert np.abs(np.asarray(got) - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("order", "length"), [(2, T), (3, 2 * L + 3)])
def test_the_operator_is_the_papers(order, length):
    """In rows longer than the filters too: what is farther than their length is not read."""
    config = replace(CONFIG, hyena=replace(OWN, order=order))
    params, x = mixer(config)[0], texts(length)
    close(run(config)(params, x), plain_hyena(params, np.float64(x), config.hyena))


@pytest.mark.parametrize("part", ["b_in", "b_inner", "frequency", "rate", "skip", "short_bias"])
def test_the_law_of_the_operator_catches_a_part_that_is_not_read(part):
    config = replace(CONFIG, hyena=replace(OWN, order=2))
    params, x = mixer(config)[0], texts(T)
    without = params | {part: np.zeros_like(params[part])}
    with pytest.raises(AssertionError):
        close(run(config)(params, x), plain_hyena(without, np.float64(x), config.hyena))


def test_order_two_is_the_form_of_h3():
    """q * long(k * shift(v)): with plain gates the short convolution is H3's shift of one of them.

    Source: Fu et al. 2023, "Hungry Hungry Hippos", section 3.1, https://arxiv.org/abs/2212.14052,
    where k is shifted and v is not: the product does not tell them apart.
    """
    config = replace(CONFIG, hyena=replace(OWN, order=2))
    params, x = mixer(config)[0], texts(T)
    short = params["short"].copy()
    short[:2] = np.array([0, 0, 1])
    params = params | {"short": short, "short_bias": np.zeros_like(params["short_bias"])}
    q, k, v = np.einsum("btd,dge->gbte", np.float64(x), params["inputs"]["kernel"])
    shifted = sum(short[2].T[2 - j] * np.pad(v, ((0, 0), (j, 0), (0, 0)))[:, :T] for j in range(3))
    (h,) = plain_filter(params, L, OWN.bands, T)
    kv = k * shifted
    y = q * (convolved(kv, h) + params["skip"][0] * kv)
    close(run(config)(params, x), y @ params["outputs"]["kernel"])


def test_order_two_with_a_kernel_of_modes_is_h3():
    """The same numbers as our H3 of heads of size 1, over packed and padded rows."""
    rng, P = np.random.default_rng(0), 3
    q, k, v = rng.normal(size=(3, 1, T, D)).astype(np.float32)
    taps, skip = rng.normal(size=(D, 3)), rng.normal(size=D)
    system = {"log_dt": rng.normal(size=D) - 2}
    for name in ("log_a_real", "a_imag", "c_real", "c_imag"):
        system[name] = rng.normal(size=(D, P))
    at = {
        "positions": jnp.array([[0, 1, 2, 3, -1, 4, 0, 1, 2, 3, -1]]),
        "segments": jnp.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]),
    }

    @jax.jit
    def both(q, k, v, taps, skip, system):
        of_h3, _ = h3(
            *(x[..., None] for x in (q, k, v)), taps[:, None], discretise(**system, skip=skip), **at
        )
        shifted, _ = short_convolution(k, taps, **at)
        y, _ = long_convolution(shifted * v, vandermonde_kernel(T, **system), skip=skip, **at)
        return of_h3[..., 0], q * y

    want, got = both(q, k, v, *jax.tree.map(np.float32, (taps, skip, system)))
    close(got, want)


def network(seed: int = 0, D: int = 4) -> FilterNetwork:
    rng = np.random.default_rng(seed)
    shapes = ((7, 5), (5,), (2, 5, 5), (2, 5), (5,), (5, D))
    return FilterNetwork(*(rng.normal(size=s) for s in shapes), rate=decay_rates(D))


def test_the_window_falls_to_its_target_after_its_shares():
    """The slowest channel after 1.5 lengths, the fastest after 0.3."""
    rates = np.asarray(decay_rates(9))
    np.testing.assert_allclose(np.exp(-rates[[0, -1]] * [1.5, 0.3]), 1e-2, rtol=1e-5)
    flat = network()._replace(rate=np.zeros(4))
    make = jax.jit(implicit_filter, static_argnames=("taps", "length", "shift"))
    ratio = make(network(), taps=9, length=9) / make(flat, taps=9, length=9)
    want = np.exp(-np.asarray(decay_rates(4))[:, None] * np.linspace(0, 1, 9))
    np.testing.assert_allclose(ratio, want, rtol=1e-4)
    shifted = make(network(), taps=9, length=9, shift=0.5) / make(flat, taps=9, length=9)
    np.testing.assert_allclose(shifted, want + 0.5, rtol=1e-4)


def test_filters_are_first_taps_of_longer_ones_and_end_at_their_length():
    make = jax.jit(implicit_filter, static_argnames=("taps", "length"))
    np.testing.assert_allclose(
        make(network(), taps=5, length=9), make(network(), taps=9, length=9)[:, :5], rtol=1e-5
    )
    with pytest.raises(ConfigError, match="taps must be at most length=9, got 10"):
        implicit_filter(network(), 10, length=9)


def test_parameters_do_not_depend_on_the_length():
    long = replace(CONFIG, hyena=replace(OWN, length=1 << 20))
    init = functional(lambda rngs: Hyena(long, rngs)).init
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(init, jax.random.key(0)))
    assert shapes == jax.tree.map(lambda x: x.shape, mixer()[0])


# Costs: the network that makes the filters, long convolutions, a generated token.


def counted(function, *arguments) -> tuple[int, int]:
    forward = flops.count(lambda *a: jnp.sum(jnp.sin(function(*a))), *arguments)
    backward = flops.count(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a)))), *arguments)
    assert forward.unknown == backward.unknown == ()
    return forward.total, backward.total - forward.total


def test_a_filter_costs_its_closed_form():
    got = counted(lambda n: implicit_filter(n, 9, length=9), network())
    assert got == implicit_filter_flops(9, 3, 5, 2, 4)


@pytest.mark.parametrize(("length", "aligned"), [(1, False), (T, False), (T, True), (300, False)])
def test_a_mixer_costs_its_closed_form(length, aligned):
    """Beside its projections, which are counted from their weights."""
    params, apply = mixer()
    projections = 2 * 3 * length * D * D * (OWN.order + 2)

    def whole(both):
        x = both["x"]
        at = jnp.zeros(x.shape[:2], jnp.int32)
        return apply(both["params"], x, Context(at, at, aligned=aligned))[0]

    x = jax.ShapeDtypeStruct((3, length, D), jnp.float32)
    forward, backward = counted(whole, {"params": params, "x": x})
    claimed = Hyena.program_flops(CONFIG, 3, length, aligned)
    assert (forward - projections, backward - 2 * projections) == claimed


@pytest.mark.parametrize("context", [5, 40])
def test_a_generated_token_costs_its_closed_form(context):
    params, apply = mixer()
    state = apply(params, 1, context, 1, jnp.float32, method="init_state")
    at = jnp.zeros((1, 1), jnp.int32)
    step = lambda p, s, x: apply(p, x, Context(at, at), s)[0]  # noqa: E731
    total = flops.count(step, params, state, jnp.zeros((1, 1, D))).total
    assert total - 2 * D * D * (OWN.order + 2) == Hyena.step_flops(CONFIG, context)


def test_cost_grows_as_n_log_n():
    config = replace(CONFIG, hyena=replace(OWN, length=1 << 20))
    short, long = (Hyena.exact_flops(config, 1 << n).forward for n in (12, 16))
    assert 16 <= long / short < 20
