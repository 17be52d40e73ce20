"""The losses that layers have of their own are in the loss that trains, weighed, and reach them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.batch import Batch
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.sections import AttentionConfig
from effjax.ops.attention.learned_hash import LearnedHash
from effjax.ops.attention.routing import Routing
from effjax.training.objective import Totals, language_model_objective

T = 7
BASE = DecoderConfig(
    vocab=11,
    width=8,
    hidden=8,
    layers=1,
    attention=AttentionConfig(heads=2),
    learned_hash=LearnedHash(buckets=3, hidden=4, loss_weight=0.5),
    routing=Routing(clusters=3, commitment_weight=0.5),
)
# A kind, the metric of its loss, and weights that the loss reaches.
CASES = {
    "learned_hash_stable": ("hash_loss", ("q_up", "q_down", "k_up", "k_down")),
    "routing_stable": ("routing_commitment", ("q", "k")),
}


def batch():
    tokens = np.random.default_rng(0).integers(0, 11, (2, T + 1), dtype=np.int32)
    at = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], at, np.zeros_like(at))


def differentiated(config, params):
    objective, rows = language_model_objective(config), jax.tree.map(jnp.asarray, batch())
    run = jax.value_and_grad(
        lambda p: objective(p, rows, Totals.of(rows), jax.random.key(0)), has_aux=True
    )
    (loss, metrics), gradients = jax.jit(run)(params)
    return loss, metrics, gradients["stack"]["runs"]["000"][f"{config.pattern[0]}_00"]["mixer"]


@pytest.mark.parametrize("kind", CASES)
def test_a_layers_own_loss_trains_with_the_rest(kind):
    metric, reached = CASES[kind]
    config = replace(BASE, pattern=(kind,))
    params = jax.jit(decoder(config).init)(jax.random.key(1))
    loss, metrics, gradients = differentiated(config, params)
    assert metrics[metric] > 1e-4
    np.testing.assert_allclose(loss, metrics["nats"] + 0.5 * metrics[metric], rtol=1e-6)
    none = replace(
        config,
        learned_hash=replace(BASE.learned_hash, loss_weight=0.0),
        routing=replace(BASE.routing, commitment_weight=0.0),
    )
    without, _, others = differentiated(none, params)
    np.testing.assert_allclose(without, metrics["nats"], rtol=1e-6)
    for name in reached:
        moved = np.abs(gradients[name]["kernel"] - others[name]["kernel"]).max()
        assert moved > 1e-6, name
