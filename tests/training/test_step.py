"""A step: any cut of the batch gives one update, and what is frozen or masked stays bit for bit."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.data.batch import Batch
from effjax.errors import ConfigError
from effjax.models import AttentionConfig, DecoderConfig, SwitchConfig, decoder
from effjax.parallel import MeshConfig
from effjax.training import step as step_module
from effjax.training.loop import TrainConfig, start
from effjax.training.objective import Totals, language_model_objective
from effjax.training.optimizer import OptimizerConfig, optimizer
from effjax.training.step import train_state, train_step
from effjax.transforms.adapt.lora import adapters, lora
from effjax.transforms.prune.magnitude import magnitude
from effjax.weights import Axes, LowRank, Masked, einsum, is_weight, partition, paths

B, T = 4, 16
DENSE = DecoderConfig(width=16, hidden=32, layers=2, attention=AttentionConfig(heads=2))
MODELS = {
    "dense": DENSE,
    # Router losses heavy enough that a wrong share of them would show.
    "switch": replace(
        DENSE, feedforward="switch", switch=SwitchConfig(balance_weight=0.5, z_weight=0.1)
    ),
}
# The trace of momentum after one step is the gradient as it was clipped.
RULE = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
# What runs once or twice need not be optimised: compiling is most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def texts(seed=0, rows=B):
    """A batch of whole rows."""
    tokens = np.random.default_rng(seed).integers(0, 256, (rows, T + 1), dtype=np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, np.zeros_like(positions))


def uneven():
    """A whole row, one with 3 targets, one with none, and one of padding."""
    batch = texts()
    targets, positions = batch.targets.copy(), batch.positions.copy()
    targets[1, 3:] = targets[2:] = -1
    positions[3] = -1
    return Batch(batch.tokens, targets, positions, np.where(positions < 0, -1, 0).astype(np.int32))


def only(batch, rows):
    """The same batch with targets in some rows alone."""
    here = np.isin(np.arange(B), rows)[:, None]
    return replace(batch, targets=np.where(here, batch.targets, -1))


@cache
def program(name, microbatches=1):
    objective = language_model_objective(MODELS[name])
    step = train_step(objective, RULE, microbatches=microbatches)
    return jax.jit(step, compiler_options=QUICK)


@cache
def before(name):
    init, _, axes_of = decoder(MODELS[name])
    params = jax.jit(init, compiler_options=QUICK)(jax.random.key(7))
    return train_state(params, axes_of(params), RULE, jax.random.key(1))


def gradient(state):
    return jax.tree.leaves(state.optimizer)


def assert_close(got, wanted, tolerance):
    """Every array of a tree, relative to the largest entry of it."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        wrong = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert wrong <= tolerance, f"{jax.tree_util.keystr(path)}: {wrong:.1e}"


def assert_bitwise(got, wanted):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(("name", "count"), [("dense", 2), ("switch", 4)])
def test_any_number_of_microbatches_gives_one_update(name, count):
    whole, wanted = program(name)(before(name), uneven())
    parts, metrics = program(name, count)(before(name), uneven())
    assert metrics.keys() == wanted.keys()
    assert_close(metrics, wanted, 1e-6)
    assert_close(gradient(parts), gradient(whole), 1e-5)
    assert_close(parts.params, whole.params, 1e-5)
    assert_bitwise((parts.key, parts.frozen), (whole.key, whole.frozen))
    assert int(parts.step) == int(whole.step) == 1


def test_every_target_weighs_the_same_whatever_its_row():
    batch, step = uneven(), program("dense")
    loss = lambda rows: float(step(before("dense"), only(batch, rows))[1]["loss"])  # noqa: E731
    assert loss([0, 1, 2, 3]) == pytest.approx((loss([0]) * T + loss([1]) * 3) / (T + 3), rel=1e-6)


def test_metrics_say_what_the_loss_is_made_of():
    own = MODELS["switch"].switch
    new, metrics = program("switch")(before("switch"), uneven())
    assert set(metrics) == {"nats", "router_balance", "router_z", "loss", "gradient_norm"}
    router = own.balance_weight * metrics["router_balance"] + own.z_weight * metrics["router_z"]
    assert float(metrics["loss"]) == pytest.approx(float(metrics["nats"] + router), rel=1e-6)
    # Means over the live tokens, of which there are more than targets: 1 is an even load.
    assert 1 <= float(metrics["router_balance"]) < 2.2
    assert 0.5 < float(metrics["nats"]) / np.log(256) < 2
    # The norm is that before the clip, and the clip works.
    assert float(metrics["gradient_norm"]) > 1
    assert float(optax.tree.norm(gradient(new))) == pytest.approx(0.5, rel=1e-5)
    assert set(program("dense")(before("dense"), texts())[1]) == {"nats", "loss", "gradient_norm"}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("live", [True, False], ids=["text", "padding"])
def test_a_batch_without_targets_counts_and_moves_nothing(count, live):
    batch = only(texts(), [])
    if not live:
        gone = np.full((B, T), -1, np.int32)
        batch = Batch(np.zeros_like(gone), gone, gone, gone)
    new, metrics = program("dense", count)(before("dense"), batch)
    assert {name: float(v) for name, v in metrics.items()} == dict.fromkeys(metrics, 0.0)
    assert all((np.asarray(g) == 0).all() for g in gradient(new))
    assert_bitwise(new.params, before("dense").params)
    assert int(new.step) == 1


def test_a_batch_of_padding_routes_nothing():
    gone = np.full((B, T), -1, np.int32)
    new, metrics = program("switch")(before("switch"), Batch(gone + 1, gone, gone, gone))
    assert {float(v) for v in metrics.values()} == {0.0}
    assert_bitwise(new.params, before("switch").params)


def test_donating_the_state_changes_no_bit():
    wanted, batch = before("dense"), uneven()
    step = train_step(language_model_objective(DENSE), RULE)
    donated = jax.jit(step, donate_argnums=0, compiler_options=QUICK)
    given = jax.tree.map(jnp.copy, wanted)
    got, metrics = donated(*donated(given, batch)[:1], texts(1))
    assert all(v.is_deleted() for v in jax.tree.leaves((given.trainable, given.optimizer)))
    wanted, values = program("dense")(program("dense")(wanted, batch)[0], texts(1))
    assert_bitwise((got, metrics), (wanted, values))


# Recomputation


@cache
def dropped(remat):
    objective = language_model_objective(replace(DENSE, dropout=0.3), remat=remat)

    def loss(params, batch, key):
        return objective(params, batch, Totals.of(batch), key)[0]

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_draws_the_same_masks(remat):
    params, batch, key = before("dense").params, uneven(), jax.random.key(3)
    loss, gradients = dropped(None)(params, batch, key)
    got, again = dropped(remat)(params, batch, key)
    assert float(got) == pytest.approx(float(loss), rel=1e-6)
    assert_close(again, gradients, 1e-5)
    other, elsewhere = dropped(remat)(params, batch, jax.random.key(4))
    assert abs(float(other - loss)) > 1e-3
    with pytest.raises(AssertionError, match="embed"):  # what other masks would do
        assert_close(elsewhere, gradients, 1e-5)


# What is frozen, and what is masked


def trained(path, w, axes):
    return adapters(path, w, axes) or isinstance(w, Masked)


@cache
def adapted():
    """A model with low-rank updates on queries and values and half of its network pruned away."""
    params, axes_of = before("dense").params, decoder(DENSE).axes_of
    params = lora(params, axes_of(params), rank=2, alpha=4.0, where="**/mixer/[qv]/kernel")
    params = magnitude(params, axes_of(params), sparsity=0.5, where="**/feedforward/**")
    setting = TrainConfig(
        batch=B,
        length=T,
        optimizer=OptimizerConfig(learning_rate=0.02, weight_decay=0.3, schedule="constant"),
    )
    run = start(
        DENSE,
        setting,
        100,
        mesh=MeshConfig(1),
        devices=jax.devices()[:1],
        params=params,
        where=trained,
    )
    return params, run


def test_a_hundred_steps_leave_the_frozen_part_and_the_zeros_as_they_were():
    params, run = adapted()
    kept = jax.tree.map(np.asarray, run.state.frozen)
    assert len(jax.tree.leaves(kept)) == len(jax.tree.leaves(params)) - 6
    state, losses = run.state, []
    for t in range(100):
        state, metrics = run.step(state, texts(t % 3))
        losses.append(float(metrics["loss"]))
        assert_bitwise(state.frozen, kept)
        for w in masked(state.params):
            assert not np.asarray(w.base)[~np.asarray(w.mask)].any(), t
    assert losses[-1] < losses[0] - 0.1
    assert int(state.step) == 100
    assert_moved(params, state.params)


def masked(params):
    found = [w for w in leaves(params) if isinstance(w, Masked)]
    assert len(found) == 2
    return found


def assert_moved(before, after):
    """Every learned array is more than a multiple of itself, which is all that decay could do."""
    for path, old, new in zip(paths(before), leaves(before), leaves(after), strict=True):
        for part in {LowRank: ("a", "b"), Masked: ("base",)}.get(type(old), ()):
            was, now = (np.asarray(getattr(w, part)).ravel() for w in (old, new))
            live = now != 0
            assert live.mean() >= 0.5, (path, part)
            assert (was[live] / now[live]).std() > 1e-3 or not was.any(), (path, part)


def leaves(params):
    return jax.tree.leaves(params, is_leaf=is_weight)


def test_a_batch_without_targets_only_decays():
    params, run = adapted()
    state = jax.tree.map(jnp.copy, start_again(run, params))
    new, metrics = run.step(state, only(texts(), []))
    assert float(metrics["loss"]) == float(metrics["gradient_norm"]) == 0
    assert int(new.step) == 1
    rate = 0.02 / 5  # the first of 5 steps of warm-up
    trainable = partition(params, decoder(DENSE).axes_of(params), trained)[0]
    assert_close(new.trainable, jax.tree.map(lambda v: v * (1 - rate * 0.3), trainable), 1e-6)
    assert_bitwise(new.params["embed"], params["embed"])


def start_again(run, params):
    axes = decoder(DENSE).axes_of(params)
    rule = optimizer(OptimizerConfig(), 100, params, axes)
    state = train_state(params, axes, rule, jax.random.key(0), where=trained)
    return jax.device_put(state, jax.tree.map(lambda v: v.sharding, run.state))


# The step's own laws, on a model of two weights


AXES = {"m": Axes(("embed",), ("vocab",)), "w": Axes(("embed",), ("vocab",))}
ADAMW = optax.adamw(0.1, weight_decay=0.1)


def toy():
    rng = np.random.default_rng(0)
    w, m, a = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((T, 5), (T, 5), (T, 2)))
    mask = jnp.asarray(rng.random((T, 5)) < 0.5)
    lowrank = LowRank(w, a, jnp.ones((2, 5)), jnp.float32(1))
    return {"m": Masked(jnp.where(mask, m, 0), mask), "w": lowrank}


def toy_objective(params, part, totals, key):
    x = part.tokens / 256.0
    y = einsum("bd,dv->bv", x, params["w"]) + einsum("bd,dv->bv", x, params["m"])
    wanted = part.targets[:, :5]
    loss = jnp.where(wanted >= 0, (y - wanted / 256.0) ** 2, 0).sum() / totals.targets
    return loss, {"draw": jax.random.uniform(key)}


def toy_batch():
    batch = texts(rows=8)
    targets = np.full_like(batch.targets, -1)
    for row, count in enumerate((5, 0, 1, 3, 5, 2, 0, 4)):
        targets[row, :count] = batch.targets[row, :count]
    return replace(batch, targets=targets)


@cache
def toy_program(objective, microbatches):
    step = train_step(objective, ADAMW, microbatches=microbatches)
    return jax.jit(step, compiler_options=QUICK)


def toy_step(objective=toy_objective, *, microbatches=1, where="**", steps=1, step=None):
    state = train_state(toy(), AXES, ADAMW, jax.random.key(5), where=where)
    step = step or toy_program(objective, microbatches)
    for _ in range(steps):
        state, metrics = step(state, toy_batch())
    return state, metrics


def accumulated(count, objective=toy_objective):
    (whole, one), (parts, many) = toy_step(), toy_step(objective, microbatches=count)
    assert_close(many["loss"], one["loss"], 1e-6)
    assert_close(parts.optimizer[0].mu, whole.optimizer[0].mu, 1e-5)
    return one, many


@pytest.mark.parametrize("count", [2, 8])
def test_any_objective_of_shares_accumulates(count):
    accumulated(count)


def test_the_accumulation_law_catches_a_mean_of_means():
    def mean_of_means(params, part, totals, key):
        loss, metrics = toy_objective(params, part, Totals.of(part), key)
        return loss / 8, metrics

    with pytest.raises(AssertionError):
        accumulated(8, mean_of_means)


def test_each_step_and_each_microbatch_has_its_own_key():
    draws = [float(toy_step(microbatches=k, steps=s)[1]["draw"]) for k in (1, 2) for s in (1, 2)]
    root = jax.random.key(5)
    wanted = [
        sum(
            float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(root, t), i)))
            for i in range(k)
        )
        for k in (1, 2)
        for t in (0, 1)
    ]
    assert draws == pytest.approx(wanted, rel=1e-6)
    assert len(set(draws)) == 4


def test_the_optimiser_holds_state_for_the_trainable_part_alone():
    state, _ = toy_step(where=adapters)
    assert [v.shape for v in jax.tree.leaves(state.optimizer[0].mu)] == [(T, 2), (2, 5)]
    assert_bitwise(state.params["m"], toy()["m"])
    assert_bitwise(state.params["w"].base, toy()["w"].base)


def test_the_freeze_law_catches_a_decayed_base(monkeypatch):
    monkeypatch.setattr(LowRank, "learned", ("base", "a", "b"))
    state, _ = toy_step(where=adapters)
    with pytest.raises(AssertionError):
        assert_bitwise(state.params["w"].base, toy()["w"].base)


def leaking(params, part, totals, key):
    """An objective whose gradient reaches what is masked."""
    return toy_objective({**params, "m": params["m"].base}, part, totals, key)


def test_the_projection_law_catches_a_step_without_it(monkeypatch):
    dead = ~np.asarray(toy()["m"].mask)
    assert not np.asarray(toy_step(leaking, steps=3)[0].params["m"].base)[dead].any()
    monkeypatch.setattr(step_module, "project", lambda params: params)
    faulty = jax.jit(train_step(leaking, ADAMW))
    assert np.asarray(toy_step(step=faulty, steps=3)[0].params["m"].base)[dead].any()


@pytest.mark.parametrize("count", [0, -1])
def test_no_microbatch_is_refused(count):
    with pytest.raises(ConfigError, match=f"at least 1, got {count}"):
        train_step(toy_objective, ADAMW, microbatches=count)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ConfigError, match="microbatches=3 must divide the batch, got 8 rows"):
        toy_step(microbatches=3)
