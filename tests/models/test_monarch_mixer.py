"""Monarch Mixer: what it equals, what it costs, and what it is made of."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import flops
from effjax.data.batch import Batch
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.decoder import decoder
from effjax.models.functional import functional
from effjax.models.mixers.hyena import Hyena
from effjax.models.mixers.monarch_mixer import MonarchMixer
from effjax.models.sections import HyenaConfig, MonarchConfig
from effjax.select.hardware_flops import hardware_forward_flops, hardware_training_flops
from effjax.training.objective import language_model_objective
from effjax.training.optimizer import OptimizerConfig, optimizer
from effjax.training.step import train_state, train_step
from effjax.weights import Monarch, dense, is_weight

SMALL = DecoderConfig(
    vocab=32,
    width=16,
    hidden=64,
    layers=2,
    pattern=("monarch_mixer",),
    feedforward="monarch",
    hyena=HyenaConfig(length=64, bands=2, hidden=4, inner=1),
    monarch=MonarchConfig(blocks=2, rank=2),
)


def abstract(config):
    init, _, axes_of = decoder(config)
    params = jax.eval_shape(init, jax.random.key(0))
    return params, axes_of(params)


def check_is_hyena(config):
    """With dense kernels of the same values, and a convolution of another form, it is Hyena."""
    T, key = 37, jax.random.key(0)
    ours = functional(lambda rngs: MonarchMixer(config, rngs))
    theirs = functional(lambda rngs: Hyena(config, rngs))
    params = jax.jit(ours.init)(key)
    plain = jax.tree.map(dense, params, is_leaf=is_weight)
    x = jax.random.normal(key, (2, T, config.width))
    at = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    context = Context(at, jnp.zeros_like(at))
    got, wanted = (
        np.asarray(jax.jit(lambda p, x, f=f: f.apply(p, x, context)[0])(p, x))
        for f, p in ((ours, params), (theirs, plain))
    )
    assert wanted.std() > 1e-3
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_it_is_hyena_through_monarch_matrices():
    check_is_hyena(SMALL)


def test_a_block_holds_no_dense_matrix_and_no_attention():
    params, _ = abstract(SMALL)
    unit = params["stack"]["runs"]["000"]["monarch_mixer_00"]
    kernels = [
        unit[part][name]["kernel"]
        for part, names in (("mixer", ("inputs", "outputs")), ("feedforward", ("up", "down")))
        for name in names
    ]
    assert all(isinstance(w, Monarch) for w in kernels)
    assert [w.shape for w in kernels] == [(2, 16, 3, 16), (2, 16, 16), (2, 16, 64), (2, 64, 16)]


def test_programs_cost_their_closed_form():
    length = 40
    params, axes = abstract(SMALL)
    apply, tokens = decoder(SMALL).apply, jax.ShapeDtypeStruct((3, length), jnp.int32)
    counted = flops.count(lambda p, ids: apply(p, ids)[0], params, tokens)
    assert counted.total == hardware_forward_flops(SMALL, 3, length, aligned=True)
    rule = optimizer(OptimizerConfig(), 10, params, axes)
    state = jax.eval_shape(lambda p: train_state(p, axes, rule, jax.random.key(0)), params)
    step = train_step(language_model_objective(SMALL), rule)
    counted = flops.count(step, state, Batch(*[tokens] * 4))
    assert counted.total == hardware_training_flops(SMALL, 3, length)


def check_subquadratic(mixer, config):
    """Four times the length costs at most about eight times as much, where all pairs cost 16."""
    lengths = (1024, 4096, 16384)
    exact = [mixer.exact_flops(config, T).forward for T in lengths]
    programs = [mixer.program_flops(config, 1, T, True).forward for T in lengths]
    assert all(b < 9 * a for a, b in (*pairwise(exact), *pairwise(programs)))


def test_it_is_subquadratic_along_the_sequence_and_the_width():
    config = replace(SMALL, hyena=replace(SMALL.hyena, length=16384), monarch=MonarchConfig())
    check_subquadratic(MonarchMixer, config)
    with pytest.raises(AssertionError):
        check_subquadratic(type("Direct", (MonarchMixer,), {"form": "direct"}), config)
    sizes = []
    for width in (64, 256, 1024):
        wide = replace(config, width=width, hidden=4 * width, layers=1)
        kernels = jax.tree.leaves(abstract(wide)[0]["stack"], is_leaf=is_weight)
        sizes.append(sum(w.multiply_adds for w in kernels if isinstance(w, Monarch)))
    assert all(b < 9 * a for a, b in pairwise(sizes))  # 16 times, were they dense


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (MonarchConfig(blocks=3), "from embed to gate/embed: blocks must divide the 16 inputs"),
        (MonarchConfig(rank=5), "rank must be at most 4, the smaller side of a block of 4 by 6"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        abstract(replace(SMALL, monarch=own))
