"""The optimiser against AdamW in float64, its schedule at every edge, its decay mask."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.errors import ConfigError
from effjax.training.optimizer import OptimizerConfig, decay_mask, optimizer, schedule
from effjax.weights import Axes, LowRank, Masked, partition

STEPS = 20
MATRIX, VECTOR = Axes(("embed",), ("mlp",)), Axes((), ("embed",))
DECAY = Axes((), ("heads",), constant=True)
SHAPES = {"norm": (4,), "w": (4, 3)}
AXES = {"norm": VECTOR, "w": MATRIX}


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}


def single(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


def rate(config, step):
    """The learning rate of a step, counted from 0, by its description."""
    warm = min(round(config.warmup * STEPS), STEPS - 1)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    share = min((step - warm) / (STEPS - warm), 1.0)
    fall = {
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "linear": 1 - share,
        "constant": 1.0,
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final
    return config.learning_rate * (floor + (1 - floor) * fall)


def adamw(config, params, gradients, decayed):
    """AdamW by its paper, after a clip of the global norm, in float64."""
    m = {name: np.zeros_like(v) for name, v in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, raw in enumerate(gradients):
        norm = math.sqrt(sum((g**2).sum() for g in raw.values()))
        for name, g in raw.items():
            g = g * min(1.0, config.clip / norm) if norm else g
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            m_hat = m[name] / (1 - config.b1 ** (t + 1))
            v_hat = v[name] / (1 - config.b2 ** (t + 1))
            update = m_hat / (np.sqrt(v_hat) + 1e-8)
            decay = config.weight_decay * params[name] if name in decayed else 0.0
            params = {**params, name: params[name] - rate(config, t) * (update + decay)}
    return params


def run(config, gradients):
    """The same by `optimizer`, as a step applies it."""
    params = single(drawn(0))
    rule = optimizer(config, STEPS, params, AXES)

    @jax.jit
    def step(carry, g):
        params, state = carry
        updates, state = rule.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *map(single, gradients))
    return jax.lax.scan(step, (params, rule.init(params)), stacked)[0][0]


def error(got, wanted):
    return max(
        float(np.abs(np.asarray(got[n], np.float64) - w).max() / np.abs(w).max())
        for n, w in wanted.items()
    )


CONFIGS = [
    OptimizerConfig(learning_rate=0.03, warmup=0.25, clip=0.5),
    OptimizerConfig(learning_rate=0.1, schedule="linear", warmup=0.0, final=0.0, weight_decay=0.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["cosine", "linear"])
def test_twenty_steps_are_adamw_in_float64(config):
    # Gradients from far below to far above the clip, and one that is all zero.
    gradients = [drawn(1 + t, 10.0 ** (t % 5 - 3)) for t in range(STEPS - 1)] + [drawn(9, 0.0)]
    got = run(config, gradients)
    assert error(got, adamw(config, drawn(0), gradients, {"w"})) < 1e-5
    if config.weight_decay:
        assert error(got, adamw(config, drawn(0), gradients, {"w", "norm"})) > 1e-3
    unclipped = OptimizerConfig(**{**vars(config), "clip": 1e9})
    assert error(got, adamw(unclipped, drawn(0), gradients, {"w"})) > 1e-3


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 1.0])
def test_the_schedule_at_every_step_and_past_the_end(kind, warmup):
    config = OptimizerConfig(learning_rate=0.2, schedule=kind, warmup=warmup, final=0.25)
    steps = np.arange(2 * STEPS)
    got = np.broadcast_to(schedule(config, STEPS)(steps), steps.shape)
    np.testing.assert_allclose(got, [rate(config, t) for t in steps], rtol=1e-5)
    warm = min(round(warmup * STEPS), STEPS - 1)
    assert got[0] == pytest.approx(0.2 / max(warm, 1))  # the first step moves already
    assert max(got) == pytest.approx(0.2)
    assert got[warm] == pytest.approx(0.2)  # the end of the warm-up
    end = 0.2 if kind == "constant" else 0.05
    np.testing.assert_allclose(got[STEPS:], end, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_schedule_of_one_step_is_the_peak(kind):
    config = OptimizerConfig(learning_rate=0.2, schedule=kind, warmup=0.5)
    assert float(schedule(config, 1)(0)) == pytest.approx(0.2)


def test_a_schedule_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="at least 1 step, got 0"):
        schedule(OptimizerConfig(), 0)


def test_decay_is_for_weights_with_inputs_and_outputs_whatever_their_leaf():
    w = jnp.ones((4, 3))
    lora = LowRank(w, jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.float32(1))
    params = {"log_decay": jnp.ones(2), "lora": lora, "m": Masked(w, w > 0), "norm": jnp.ones(4)}
    axes = {"log_decay": DECAY, "lora": MATRIX, "m": MATRIX, "norm": VECTOR}
    mask = decay_mask(params, axes)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert not mask["norm"]
    assert not mask["log_decay"]
    assert jax.tree.leaves([mask["lora"], mask["m"]]) == [True] * 6


def test_state_is_held_and_decay_applied_for_the_trainable_part_alone():
    params = {"log_decay": jnp.ones(2), "norm": jnp.ones(4), "w": jnp.ones((4, 3))}
    axes = {"log_decay": DECAY, "norm": VECTOR, "w": MATRIX}
    trainable, _ = partition(params, axes, "w|log_decay")
    rule = optimizer(OptimizerConfig(warmup=0.0, learning_rate=0.5), 4, params, axes)
    state = rule.init(trainable)
    moments = [v.shape for v in jax.tree.leaves(state) if v.shape]
    assert moments == [(4, 3), (4, 3)]
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = rule.update(zeros, state, trainable)
    assert updates["norm"] is updates["log_decay"] is None
    np.testing.assert_allclose(updates["w"], -0.5 * 0.1 * np.ones((4, 3)), rtol=1e-6)
