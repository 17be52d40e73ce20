"""Twenty steps of the optimiser equal torch's AdamW with its own clip and the same schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.training.optimizer import OptimizerConfig, optimizer, schedule
from effjax.weights import Axes

pytestmark = pytest.mark.oracle

STEPS = 20
CONFIG = OptimizerConfig(learning_rate=0.05, warmup=0.2, weight_decay=0.3, clip=1.0)
AXES = {"matrix": Axes(("embed",), ("mlp",)), "scale": Axes((), ("embed",))}
START = {
    name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    for seed, (name, shape) in enumerate((("matrix", (5, 3)), ("scale", (5,))))
}


def gradients(step):
    """Drawn per step, so that both sides see the same; some above and some below the clip."""
    random, size = np.random.default_rng(100 + step), 0.05 if step % 3 else 2.0
    return {
        name: (size * random.standard_normal(v.shape)).astype(np.float32)
        for name, v in START.items()
    }


def ours(config):
    params = jax.tree.map(jnp.asarray, START)
    rule = optimizer(config, STEPS, params, AXES)

    @jax.jit
    def step(params, state, gradient):
        updates, state = rule.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = rule.init(params)
    for t in range(STEPS):
        params, state = step(params, state, gradients(t))
    return params


def theirs(torch, config):
    """torch.optim.AdamW: decay on the matrix only, clipped by torch, the rate set every step."""
    params = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in START.items()}
    rule = torch.optim.AdamW(
        [
            {"params": [params["matrix"]], "weight_decay": config.weight_decay},
            {"params": [params["scale"]], "weight_decay": 0.0},
        ],
        betas=(config.b1, config.b2),
        eps=1e-8,
    )
    rates = schedule(config, STEPS)
    for t in range(STEPS):
        for name, gradient in gradients(t).items():
            params[name].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(params.values(), config.clip)
        for group in rule.param_groups:
            group["lr"] = float(rates(t))
        rule.step()
    return {name: v.detach().numpy() for name, v in params.items()}


def test_twenty_steps_are_torchs(torch):
    got, wanted = ours(CONFIG), theirs(torch, CONFIG)
    for name, value in wanted.items():
        assert np.abs(value - START[name]).max() > 0.1
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)


def test_the_comparison_catches_a_decayed_scale_and_a_forgotten_clip(torch):
    wanted = theirs(torch, CONFIG)
    decayed = ours(OptimizerConfig(learning_rate=0.05, warmup=0.2, weight_decay=0.0, clip=1.0))
    assert np.abs(np.asarray(decayed["matrix"]) - wanted["matrix"]).max() > 1e-2
    free = ours(OptimizerConfig(learning_rate=0.05, warmup=0.2, weight_decay=0.3, clip=1e9))
    assert np.abs(np.asarray(free["scale"]) - wanted["scale"]).max() > 1e-2
