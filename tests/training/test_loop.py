"""The loop: where a run's state lies, what it refuses, and how it is driven."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import to_json
from effjax.data.batch import Batch
from effjax.data.loader import ArrayLoader
from effjax.data.packing import pack
from effjax.errors import ConfigError
from effjax.models import AttentionConfig, DecoderConfig, RetentionConfig, decoder
from effjax.parallel import MeshConfig, make_mesh, shardings, state_shardings
from effjax.training.loop import CompiledStep, Run, TrainConfig, compile_step, start, train
from effjax.transforms.adapt.lora import adapters, lora

MODEL = DecoderConfig(
    width=16,
    hidden=32,
    layers=2,
    pattern=("attention", "retention"),
    attention=AttentionConfig(heads=4),
    retention=RetentionConfig(heads=4),
)
SETTING = TrainConfig(batch=8, length=16)
GRID = MeshConfig(1, 2, 4)


@pytest.fixture(scope="module")
def fresh():
    """A run with fresh parameters, and every array that any program made for it."""
    made, jit = [], jax.jit

    def spied(f, **options):
        program = jit(f, **options)

        def call(*args):
            out = program(*args)
            made.extend(v for v in jax.tree.leaves(out) if not isinstance(v, jax.core.Tracer))
            return out

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", spied)
        run = start(MODEL, SETTING, 10, mesh=GRID)
    return run, made


def test_parameters_and_moments_lie_as_the_rules_say(fresh):
    run, _ = fresh
    params, axes = run.state.params, decoder(MODEL).axes_of(run.state.params)
    placed = shardings(params, axes, make_mesh(GRID))
    assert jax.tree.map(lambda v: v.sharding, params) == placed
    wanted = state_shardings(run.state.optimizer, params, placed, run.mesh)
    assert jax.tree.map(lambda v: v.sharding, run.state.optimizer) == wanted
    up = params["stack"]["runs"]["000"]["attention_00"]["feedforward"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (1, 8, 8)
    assert run.state.key.sharding.is_fully_replicated


def test_no_device_ever_holds_the_whole(fresh):
    run, made = fresh
    whole = max(v.size for v in jax.tree.leaves(run.state.params))
    assert whole == 16 * 256
    assert sum(v.size == whole for v in made) == 3  # the table and its two moments
    for array in made:
        largest = max(shard.data.size for shard in array.addressable_shards)
        assert largest <= whole / 8, (array.shape, array.sharding)


@pytest.mark.deep
def test_fresh_parameters_follow_from_the_seed_whatever_the_mesh(fresh):
    run, _ = fresh
    root = jax.random.fold_in(jax.random.key(SETTING.seed), 0)
    wanted = jax.jit(decoder(MODEL).init)(root)
    for a, b in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def constants(shapes):
    """Parameters of a tree of shapes, without a compiled initialiser."""
    return jax.tree.map(lambda v: jnp.full(v.shape, 0.1, v.dtype), shapes)


@pytest.mark.parametrize("devices", [1, 8])
def test_parameters_that_are_given_are_copied_and_stay_the_callers(devices):
    init, _, axes_of = decoder(MODEL)
    given = constants(jax.eval_shape(init, jax.random.key(0)))
    given = lora(given, axes_of(given), rank=1, alpha=1.0, where="**/q/kernel")
    here = jax.devices()[:devices]
    run = start(MODEL, SETTING, 10, devices=here, params=given, where=adapters)
    assert run.mesh.devices.size == devices
    # A step donates the state; on one device, and for whole arrays on many, sharing would show.
    for array in jax.tree.leaves((run.state.trainable, run.state.frozen)):
        array.delete()
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(given))
    moments = jax.tree.leaves(run.state.optimizer)
    assert sum(v.size for v in moments) < 0.1 * sum(v.size for v in jax.tree.leaves(given))


@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"batch": 12}, MeshConfig(8), "batch of size 12 must divide over mesh data=8"),
        ({"microbatches": 4}, MeshConfig(4, 2), "microbatches=4 must divide the 1 rows .* of 8"),
        ({"microbatches": 2}, MeshConfig(1, 8), "microbatches=2 must divide the 1 rows"),
        ({}, MeshConfig(3), "mesh data=3 x .* = 3, which is not the 8 devices"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_is_compiled(
    monkeypatch, changes, mesh, message
):
    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(ConfigError, match=message):
        start(MODEL, replace(SETTING, **changes), 10, mesh=mesh)


def test_a_width_that_does_not_divide_is_refused_with_the_numbers():
    model = DecoderConfig(width=12, layers=1, attention=AttentionConfig(heads=2))
    with pytest.raises(ConfigError, match="axis 'embed' of size 12 must divide over mesh fsdp=8"):
        start(model, SETTING, 10, mesh=MeshConfig(1, 8))


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"microbatches must divide batch=16, got 3"):
        TrainConfig(microbatches=3)
    with pytest.raises(ConfigError, match=r"TrainConfig.seed must be at least 0, got -1"):
        TrainConfig(seed=-1)


def test_a_step_counts_all_tokens():
    assert TrainConfig(batch=6, length=7, microbatches=2).tokens_per_step == 42
    assert to_json(TrainConfig())["remat"] == "none"


# Driving a step


class State(NamedTuple):
    """A state that remembers what it was fed."""

    step: jax.Array
    seen: jax.Array


@jax.jit
def counted(state, batch):
    seen = state.seen.at[state.step].set(batch.tokens.sum())
    metrics = {"loss": batch.tokens.sum() / 2, "live": (batch.positions >= 0).sum()}
    return State(state.step + 1, seen), metrics


@pytest.fixture
def drive():
    mesh = make_mesh(MeshConfig(8))
    zero = State(jnp.zeros((), jnp.int32), jnp.zeros(6, jnp.int32))
    loader = ArrayLoader(pack([np.arange(900) % 256], 16), 8, seed=3)

    def run(state=zero, until=6, observe=None):
        return train(state, counted, loader, mesh, until=until, observe=observe)

    return run, loader


def test_each_step_gets_the_next_batch_and_is_observed(drive):
    run, loader = drive
    rows = []

    def observe(number, state, metrics, seconds):
        assert seconds > 0
        rows.append((number, int(state.step), metrics, loader.step))

    state = run(until=6, observe=observe)
    sums = [int(loader.batch_at(t).tokens.sum()) for t in range(6)]
    assert state.seen.tolist() == sums
    assert [(number, step, fed) for number, step, _, fed in rows] == [
        (t, t, t) for t in range(1, 7)
    ]
    assert [m["loss"] for *_, m, _ in rows] == [total / 2 for total in sums]
    assert all(type(v) is float for *_, m, _ in rows for v in m.values())


def test_a_run_goes_on_from_its_state_and_stops_where_it_was_told(drive):
    run, loader = drive
    state = run(run(until=2), until=5)
    assert int(state.step) == loader.step == 5
    assert run(state, until=5) is state
    assert run(state, until=3) is state
    assert loader.step == 5  # nothing was drawn for nothing


def test_an_observer_stops_the_run_between_two_steps(drive):
    run, loader = drive
    kept = []

    def observe(number, state, metrics, seconds):
        kept[:] = [state]
        if number == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(observe=observe)
    assert int(kept[0].step) == loader.step == 3
    wanted = [int(loader.batch_at(t).tokens.sum()) for t in range(6)]
    assert run(kept[0]).seen.tolist() == wanted


def test_a_step_is_compiled_once_apart_from_its_use():
    mesh = make_mesh(MeshConfig(8))
    batch = Batch(*np.ones((4, 8, 16), np.int32))
    state = State(jnp.zeros((), jnp.int32), jnp.zeros(6, jnp.int32))
    compiled = compile_step(Run(state, counted, mesh), batch)
    assert isinstance(compiled, CompiledStep)
    assert compiled.seconds > 0
    assert compiled.memory.source == "memory_analysis"
    after = train(state, compiled.step, [batch], mesh, until=1)
    assert after.seen.tolist() == [128, 0, 0, 0, 0, 0]
