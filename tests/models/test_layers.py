"""Layers against numpy: initial values, norms, ties, experts, and the rules of dtypes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.functional import functional
from effjax.models.kinds import ATTENTIONS, DECODER_KINDS
from effjax.models.layers import Dense, Embed, Experts, Norm
from effjax.models.sections import AttentionConfig, H3Config, RGLRUConfig
from effjax.weights import Axes, Quantized


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch", "gain"),
    [
        ({"embed": 64}, {"mlp": 700}, {}, 1.0),
        ({"heads": 8, "head": 16}, {"embed": 300}, {}, 0.25),
        ({"embed": 50}, {"mlp": 60}, {"experts": 13}, 2.0),
    ],
)
def test_dense_weights_have_variance_of_gain_squared_over_inputs(inputs, outputs, batch, gain):
    sizes = (tuple(part.items()) for part in (inputs, outputs, batch))
    inputs, outputs, batch = sizes
    init, _, axes_of = functional(
        lambda rngs: Dense("bd,df->bf", inputs, outputs, rngs, batch=batch, gain=gain)
    )
    params = init(jax.random.key(0))
    w = np.asarray(params["kernel"])
    names, shape = zip(*(*batch, *inputs, *outputs), strict=True)
    assert w.shape == shape
    assert axes_of(params)["kernel"].names == names
    fan_in = np.prod([size for _, size in inputs])
    spread = gain / np.sqrt(fan_in)
    error = 5 / np.sqrt(w.size)  # five standard errors
    assert abs(w.std() / spread - 1) < error
    assert abs(w.mean() / spread) < error
    assert 0.99 * 2 < np.abs(w).max() / (spread / 0.87962566) <= 2


def test_the_constant_of_the_cut_normal_is_its_spread():
    """sd of a standard normal cut at +-2: sqrt(1 - 2 * 2 phi(2) / (Phi(2) - Phi(-2)))."""
    x = np.linspace(-2, 2, 200_001)
    density = np.exp(-(x**2) / 2)
    assert abs(np.sqrt(np.average(x**2, weights=density)) - 0.87962566) < 1e-5


def test_what_writes_to_the_residual_stream_starts_smaller_in_a_deeper_model():
    for layers in (2, 8):
        config = DecoderConfig(vocab=8, width=64, hidden=256, layers=layers)
        params = params_of(config)
        block = params["stack"]["runs"]["000"]["attention_00"]
        for kernel, fan_in in (
            (block["mixer"]["o"]["kernel"], 64),
            (block["feedforward"]["down"]["kernel"], 256),
        ):
            spread = (fan_in * 2 * layers) ** -0.5
            assert abs(np.std(kernel) / spread - 1) < 0.03
        assert abs(np.std(block["mixer"]["q"]["kernel"]) * 8 - 1) < 0.03
        assert abs(np.std(params["embed"]["weight"]) / 0.02 - 1) < 0.15


@cache
def params_of(config):
    return jax.jit(decoder(config).init)(jax.random.key(0))


def test_norm_is_the_root_mean_square_times_a_scale():
    init, apply, axes_of = functional(lambda rngs: Norm(6))
    params = init(jax.random.key(0))
    assert np.array_equal(params["scale"], np.ones(6))
    assert axes_of(params) == {"scale": Axes((), ("embed",))}
    x, scale = 1e3 * numbers(0, 2, 5, 6), numbers(1, 6)
    wanted = (
        np.float64(x)
        / np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True) + 1e-6)
        * np.float64(scale)
    )
    np.testing.assert_allclose(apply({"scale": scale}, x), wanted, rtol=1e-5)
    assert not np.any(apply(params, jnp.zeros((1, 2, 6))))


def test_embed_reads_and_writes_one_table():
    init, apply, _ = functional(lambda rngs: Embed(9, 4, rngs))
    params = init(jax.random.key(0))
    assert list(params) == ["weight"]
    table, ids = np.asarray(params["weight"]), np.asarray([[0, 8, 3]])
    x = apply(params, ids, jnp.float32)
    assert np.array_equal(x, table[ids])
    np.testing.assert_allclose(apply(params, x, method="attend"), table[ids] @ table.T, rtol=1e-5)
    past = apply(params, np.asarray([[2, 9]]), jnp.float32)
    assert np.array_equal(np.isnan(past).any(-1), [[False, True]])


def test_experts_are_each_a_network_of_its_own():
    init, apply, _ = functional(lambda rngs: Experts(3, 4, 6, rngs, gain=1.0))
    params = init(jax.random.key(0))
    up, down = (np.asarray(params[name]["kernel"]) for name in ("up", "down"))
    x = numbers(0, 2, 3, 5, 4)  # [B E C D]
    wanted = np.stack(
        [np.asarray(jax.nn.gelu(x[:, e] @ up[e])) @ down[e] for e in range(3)], axis=1
    )
    np.testing.assert_allclose(apply(params, x), wanted, rtol=1e-5, atol=1e-6)
    for e in range(3):
        one = apply(params, jnp.int32(e), x[0, e], method="one")
        np.testing.assert_allclose(one, wanted[0, e], rtol=1e-5, atol=1e-6)


def test_one_expert_is_cut_out_of_any_leaf():
    init, apply, _ = functional(lambda rngs: Experts(3, 4, 6, rngs, gain=1.0))
    params = init(jax.random.key(0))
    codes = np.random.default_rng(0).integers(-9, 9, (3, 4, 6)).astype(np.int8)
    coded = Quantized(jnp.asarray(codes), jnp.abs(numbers(1, 3, 1, 6)))
    x = numbers(0, 7, 4)
    got = apply({**params, "up": {"kernel": coded}}, jnp.int32(2), x, method="one")
    dense = {**params, "up": {"kernel": coded.materialize()}}
    np.testing.assert_allclose(got, apply(dense, jnp.int32(2), x, method="one"), rtol=1e-5)


HALF = DecoderConfig(
    vocab=11,
    width=8,
    hidden=12,
    layers=2,
    attention=AttentionConfig(heads=2),
    h3=H3Config(heads=2),
    rg_lru=RGLRUConfig(blocks=2),
    dtype="bfloat16",
)
HALVES = {kind: replace(HALF, pattern=(kind,)) for kind in DECODER_KINDS}
HALVES["switch"] = replace(HALF, feedforward="switch")
WIDE = {"exp", "exp2", "log", "rsqrt", "expm1", "cumsum", "cos", "sin", "reduce_sum", "div"}
"""What loses digits in sixteen bits; a logistic or a tanh does not."""


def operations(jaxpr):
    """(primitive, dtypes of its inputs, dtypes of its outputs) at every depth of a jaxpr."""
    for equation in jaxpr.eqns:
        ins, outs = (
            {str(v.aval.dtype) for v in side} for side in (equation.invars, equation.outvars)
        )
        yield equation.primitive.name, ins, outs
        for inner in jaxprs_in_params(equation.params):
            yield from operations(inner)


MEMORIES_AND_CACHES = ("infinity", "mega", "mega_chunk", "aft_local", "aft_conv")
"""Kinds whose states are sums, in float32, and tokens as layers pass them on."""
MEMORIES = tuple(
    kind
    for kind in DECODER_KINDS
    if kind not in (*ATTENTIONS, *MEMORIES_AND_CACHES, "aft_full")  # whose states are tokens alone
)
"""Kinds whose states are sums; or inputs that a convolution reads, in its float32."""


@pytest.mark.parametrize("name", HALVES)
def test_sixteen_bits_are_for_activations_only(name):
    """Parameters, norms, soft-max, states and sums are float32; what layers pass on is bfloat16."""
    init, apply, _ = decoder(HALVES[name])
    params = jax.eval_shape(init, jax.random.key(0))
    assert {str(w.dtype) for w in jax.tree.leaves(params)} == {"float32"}
    tokens = jax.ShapeDtypeStruct((2, 20), jnp.int32)
    state = jax.eval_shape(lambda p: apply(p, 2, 32, 20, method="init_state"), params)

    def run(params, tokens, positions, state):
        return apply(params, tokens, positions=positions, state=state)

    traced = jax.make_jaxpr(run, return_shape=True)(params, tokens, tokens, state)
    jaxpr, (logits, new, aux) = traced
    assert logits.dtype == jnp.bfloat16
    (block,) = aux["stack"]["000"].values()
    assert block["hidden"].dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: s.dtype, new) == jax.tree.map(lambda s: s.dtype, state)
    kinds = {str(s.dtype) for s in jax.tree.leaves(state)}
    recurrent = name in (*MEMORIES, *MEMORIES_AND_CACHES)
    cached = name not in MEMORIES
    assert kinds == {"int32", *["float32"] * recurrent, *["bfloat16"] * cached}
    assert narrow(jaxpr.jaxpr) == []


def narrow(jaxpr) -> list[str]:
    """The operations that should be wide and are not; products must accumulate in float32."""
    found = list(operations(jaxpr))
    assert {"dot_general", "rsqrt"} <= {kind for kind, _, _ in found}
    bad = [kind for kind, ins, _ in found if kind in WIDE and "bfloat16" in ins]
    return bad + [kind for kind, _, outs in found if kind == "dot_general" and "bfloat16" in outs]


def test_the_dtype_law_catches_a_narrow_soft_max():
    def attend(q, k):
        scores = jnp.einsum("th,sh->ts", q, k)
        return jax.nn.softmax(scores) * jax.lax.rsqrt(jnp.float32(2)).astype(q.dtype)

    x = jnp.ones((3, 4), jnp.bfloat16)
    assert {"exp", "dot_general"} <= set(narrow(jax.make_jaxpr(attend)(x, x).jaxpr))
