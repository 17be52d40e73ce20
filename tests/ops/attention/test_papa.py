"""Constant attention: a text's own weights give the text's own result, and the input no longer
matters to the weights.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.mixers.papa import make_constant
from effjax.models.sections import AttentionConfig, PapaConfig, PositionConfig
from effjax.ops.attention.papa import mean_weights
from effjax.ops.attention.patterns import Causal

T, LAYERS, HEADS = 9, 2, 4
CONFIG = DecoderConfig(
    vocab=31,
    width=16,
    hidden=24,
    layers=LAYERS,
    pattern=("papa",),
    attention=AttentionConfig(heads=HEADS, kv_heads=2),
    position=PositionConfig(scheme="alibi"),
    papa=PapaConfig(length=12),
)


@cache
def model():
    init, apply, _ = decoder(CONFIG)

    @jax.jit
    def run(params, tokens):
        logits, _, aux = apply(params, tokens)
        return logits, aux["stack"]["000"]["papa_00"]["weights"]

    return jax.jit(init)(jax.random.key(3)), run


def texts(rows, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab, (rows, T), dtype=np.int32)


def constant(params, weights, heads):
    unit = params["stack"]["runs"]["000"]["papa_00"]
    unit = {**unit, "mixer": make_constant(unit["mixer"], weights, jnp.asarray(heads, float))}
    return {**params, "stack": {"runs": {"000": {"papa_00": unit}}}}


def change(heads, shift=0):
    """How much a text's logits move when heads get the weights of that very text."""
    params, run = model()
    logits, weights = run(params, texts(1))
    assert logits.std() > 1e-3
    made, _ = run(constant(params, jnp.roll(weights, shift, axis=1), heads), texts(1))
    return np.abs(made - logits).max() / np.abs(logits).max()


@pytest.mark.parametrize("share", [0, 1, HEADS])
def test_a_texts_own_weights_give_its_own_logits(share):
    assert change(np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS) % HEADS < share) < 1e-5


def test_the_law_catches_weights_of_another_head():
    assert change(np.ones((LAYERS, HEADS)), shift=1) > 1e-3


def test_constant_heads_do_not_read_the_input():
    params, run = model()
    _, weights = run(params, texts(5))
    made = constant(params, weights, np.ones((LAYERS, HEADS)))
    for seed in (1, 2):
        np.testing.assert_allclose(run(made, texts(1, seed))[1], weights, atol=1e-6)
    other = constant(params, weights, np.arange(HEADS)[None] > np.zeros((LAYERS, 1)))
    moved = np.abs(run(other, texts(1, 1))[1] - weights).max(axis=(2, 3))
    assert (moved[:, 0] > 1e-3).all()
    assert (moved[:, 1:] < 1e-6).all()


def test_mean_weights_are_the_mean_of_soft_maxes():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(3, T, 4, 6)), rng.normal(size=(3, T, 2, 6))
    at = np.tile(np.arange(T), (3, 1))
    found = mean_weights(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(k, jnp.float32),
        pattern=Causal(),
        positions=jnp.asarray(at),
    )
    scores = np.exp(np.einsum("btnh,bsnh->bnts", q, k.repeat(2, axis=2)) / 6**0.5)
    scores *= np.tri(T)
    wanted = (scores / scores.sum(-1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_positions_with_tables_are_refused():
    with pytest.raises(ConfigError, match="'shaw' does not go with 'papa'"):
        replace(CONFIG, position=PositionConfig(scheme="shaw"))
