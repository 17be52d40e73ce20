"""Closed-form FLOPs against the counter, on the program as it is written."""

import jax
import jax.numpy as jnp

from effjax.cost.flops import count
from effjax.ops.feedforward.gelu import gelu_experts, gelu_feedforward
from effjax.ops.mixture import accounting
from effjax.ops.mixture.switch import combine, dispatch, dropless, route, router_logits

B, T, D, F, E, SLOTS, BLOCK = 2, 12, 5, 7, 3, 5, 4
X = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
ROUTER, UP, DOWN = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((D, E), (E, D, F), (E, F, D)))
LIVE = jax.ShapeDtypeStruct((B, T), bool)


def train(x, router, up, down, live):
    routing = route(router_logits(x, router, live), live, SLOTS)
    return combine(gelu_experts(dispatch(x, routing, E, SLOTS), up, down), routing)


def evaluate(x, router, up, down, live):
    routing = route(router_logits(x, router, live), live, T)

    def one(e, rows):
        return gelu_feedforward(rows, up[e], down[e])

    return dropless(x, routing.expert, routing.gate, one, E, BLOCK, live=live)


def test_training_runs_the_flops_of_every_slot():
    def step(*arguments):
        return jax.grad(lambda *a: train(*a).sum(), (0, 1, 2, 3))(*arguments)

    counted = count(step, X, ROUTER, UP, DOWN, LIVE)
    assert not counted.unknown
    assert counted.total == accounting.train_hardware_flops(B, T, D, F, E, SLOTS)


def test_the_dropless_form_runs_the_flops_of_its_blocks():
    counted = count(evaluate, X, ROUTER, UP, DOWN, LIVE)
    assert not counted.unknown
    assert counted.total == accounting.dropless_flops(B * T, D, F, E, BLOCK)


def test_the_model_asks_for_one_expert_a_token():
    """A capacity that fits exactly is what the model asks for; the dropless form adds padding."""
    model = accounting.train_model_flops(B * T, D, F, E)
    assert model == accounting.train_hardware_flops(B, T, D, F, E, T // E)
    assert model == 3 * accounting.dropless_flops(B * T, D, F, E, block=1)
    wide = accounting.train_model_flops(B * T, D, F, 10 * E) - model
    assert wide == 3 * B * T * 2 * D * 9 * E, "experts add to the router alone"
    assert accounting.expert_flops(D, F, matrices=3) == 6 * D * F
