"""Model FLOPs of decoders against counts made by hand, and against the parts of the program."""

from dataclasses import replace

import jax
import pytest

from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.mixers import MIXERS
from effjax.models.sections import AttentionConfig, RetentionConfig, StateSpaceConfig, SwitchConfig
from effjax.ops.attention.patterns import Window
from effjax.ops.mixture import accounting as mixture
from effjax.select.decoder_flops import (
    adapter_training_flops,
    forward_flops,
    training_flops,
    weight_flops,
)
from effjax.select.hardware_flops import hardware_forward_flops
from effjax.transforms.recipe import apply_recipe

V, D, F, L, T = 50, 16, 40, 2, 24
N, K, H, W, C, P, HV, E = 4, 2, 4, 5, 10, 3, 6, 4
CONFIG = DecoderConfig(
    vocab=V,
    width=D,
    hidden=F,
    layers=L,
    attention=AttentionConfig(heads=N, kv_heads=K),
    window=Window(W),
    retention=RetentionConfig(heads=N, value_dim=HV, chunk=C),
    state_space=StateSpaceConfig(states=P, chunk=C),
    switch=SwitchConfig(experts=E),
)
KINDS = {
    kind: replace(CONFIG, pattern=(kind,))
    for kind in ("attention", "window", "retention", "state_space")
}
# Multiply-adds of one token with the projections of one block.
PROJECTIONS = {
    "attention": 2 * D * N * H + 2 * D * K * H,
    "window": 2 * D * N * H + 2 * D * K * H,
    "retention": 2 * D * N * H + 3 * D * N * HV,
    "state_space": 2 * D * D,
}
CHUNKED = sum(1 for t in range(T) for s in range(t + 1) if t // C == s // C)
# Multiply-adds of one row in one block, one (query, key) after the other.
MIXING = {
    "attention": sum(1 for t in range(T) for _ in range(t + 1)) * 2 * N * H,
    "window": sum(1 for t in range(T) for s in range(t + 1) if t - s < W) * 2 * N * H,
    "retention": N * (CHUNKED * (H + HV) + T * 2 * H * HV),
    "state_space": D * (CHUNKED + T * 4 * P),
}


def abstract(config, recipe=()):
    init, _, axes_of = decoder(config)
    return jax.eval_shape(lambda key: apply_recipe(recipe, axes_of)(init(key)), jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_two_operations_a_weight_and_its_share_of_the_mixing(kind):
    config = KINDS[kind]
    weights = L * (PROJECTIONS[kind] + 2 * D * F) + D * V
    assert weight_flops(config) == 2 * weights
    assert MIXERS[kind].exact_flops(config, T) == (2 * MIXING[kind], 4 * MIXING[kind])
    forward = 2 * weights + 2 * L * MIXING[kind] / T
    assert forward_flops(config, T) == pytest.approx(forward, rel=1e-12)
    assert training_flops(config, T) == pytest.approx(3 * forward, rel=1e-12)


def test_the_count_by_hand_catches_the_full_square():
    config = KINDS["attention"]
    assert MIXERS["attention"].exact_flops(config, T).forward != 4 * N * H * T * T


def test_a_pattern_costs_the_mean_of_its_kinds():
    kinds = ("attention", "retention")
    mixed = forward_flops(replace(CONFIG, pattern=kinds), T)
    assert 2 * mixed == pytest.approx(sum(forward_flops(KINDS[k], T) for k in kinds))


def test_a_lookup_is_free_and_an_output_projection_is_not():
    assert forward_flops(replace(CONFIG, tied=False), T) == forward_flops(CONFIG, T)


def test_switch_costs_one_expert_and_the_router():
    sparse = replace(CONFIG, feedforward="switch")
    added = training_flops(sparse, T) - training_flops(CONFIG, T)
    assert added == pytest.approx(3 * L * 2 * D * E)
    mixer = weight_flops(sparse) - 2 * D * V - L * 2 * PROJECTIONS["attention"]
    assert 3 * mixer == L * mixture.train_model_flops(1, D, F, E)


@pytest.mark.parametrize("kind", ["attention", "window"])
def test_a_row_of_one_token_has_nothing_masked(kind):
    """Where the program computes no more than it must, both closed forms agree."""
    assert forward_flops(KINDS[kind], 1) == hardware_forward_flops(KINDS[kind], 1, 1)


def adapted(kind, feedforward="dense"):
    config = replace(KINDS[kind], feedforward=feedforward)
    lora = {"verb": "lora", "rank": 2, "alpha": 1.0, "where": "stack/**/kernel"}
    return config, abstract(config, [lora])


def test_a_frozen_weight_has_no_gradient_of_its_own():
    config, params = adapted("attention")
    sides = (D + N * H) * 2 + (D + K * H) * 2 + (D + F) * 2  # q and o, k and v, up and down
    updates, frozen = L * 2 * sides, weight_flops(config) / 2
    assert weight_flops(config, params) == 2 * (frozen + updates)
    mixing = 3 * 2 * L * MIXING["attention"] / T
    wanted = 2 * 2 * frozen + 3 * 2 * updates + mixing
    assert adapter_training_flops(config, T, params) == pytest.approx(wanted, rel=1e-12)
    assert adapter_training_flops(config, T, params) < training_flops(config, T)


def test_an_update_beside_experts_is_met_by_the_tokens_of_one():
    config, params = adapted("attention", "switch")
    dense, dense_params = adapted("attention")
    added = weight_flops(config, params) - weight_flops(config)
    router = L * 2 * 2 * (D + E)
    assert added == weight_flops(dense, dense_params) - weight_flops(dense) + router


def test_frozen_modes_pass_one_cotangent_on():
    config, params = adapted("state_space")
    frozen = training_flops(config, T, params, "stack/**/mix/kernel")
    trained = training_flops(config, T, params, "stack/**/mix/kernel|stack/**/a_imag")
    assert trained - frozen == pytest.approx(2 * L * MIXING["state_space"] / T)
