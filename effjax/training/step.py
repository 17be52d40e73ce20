"""One training step: gradients of the trainable part, accumulated over micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from effjax.data.batch import Batch
from effjax.errors import ConfigError
from effjax.training.objective import Metrics, Objective, Totals
from effjax.weights import Tree, combine, partition, project
from effjax.weights.trees import Where


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes, and all that a checkpoint must hold beside the data.

    trainable, frozen: the two halves of `weights.partition`. key: the run's root key, never split;
    step t uses `fold_in(key, t)`.
    """

    step: jax.Array
    trainable: Tree
    frozen: Tree
    optimizer: optax.OptState
    key: jax.Array

    @property
    def params(self) -> Tree:
        """The whole parameter tree."""
        return combine(self.trainable, self.frozen)


Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train_state(
    params: Tree,
    axes: Tree,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    where: Where = "**",
) -> TrainState:
    """The state before the first step; the optimiser holds state for what `where` trains only."""
    trainable, frozen = partition(params, axes, where)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), key)


def train_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> Step:
    """A pure function `(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    microbatches: the batch is cut into so many parts that run one after the other and add their
        gradients, which bounds memory. The result is that of one part: sums are divided by totals
        of the whole batch. It must divide the batch.
    metrics: the objective's, plus `loss` and `gradient_norm` (before clipping).
    """
    if microbatches < 1:
        raise ConfigError(f"microbatches must be at least 1, got {microbatches}")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        totals = Totals.of(batch)

        def share(trainable: Tree, part: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
            return objective(combine(trainable, state.frozen), part, totals, key)

        key = jax.random.fold_in(state.key, state.step)
        (loss, metrics), gradients = _accumulate(
            jax.value_and_grad(share, has_aux=True), state.trainable, batch, key, microbatches
        )
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = _projected(optax.apply_updates(state.trainable, updates), state.frozen)
        metrics = {**metrics, "loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        new = TrainState(state.step + 1, trainable, state.frozen, opt_state, state.key)
        return new, metrics

    return step


def _accumulate(
    value_and_grad: Callable, trainable: Tree, batch: Batch, key: jax.Array, count: int
) -> tuple:
    if count == 1:
        return value_and_grad(trainable, batch, jax.random.fold_in(key, 0))
    parts = jax.tree.map(lambda v: _split(v, count), batch)

    def add(total: Tree, scanned: tuple) -> tuple[Tree, None]:
        part, i = scanned
        share = value_and_grad(trainable, part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, share), None

    first = jax.tree.map(lambda v: v[0], parts)
    shapes = jax.eval_shape(value_and_grad, trainable, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, jnp.arange(count)))[0]


def _split(v: jax.Array, count: int) -> jax.Array:
    """[B ...] -> [count B/count ...], every part taking rows from each device's share of B."""
    if v.shape[0] % count:
        raise ConfigError(f"microbatches={count} must divide the batch, got {v.shape[0]} rows")
    return v.reshape(v.shape[0] // count, count, *v.shape[1:]).swapaxes(0, 1)


def _projected(trainable: Tree, frozen: Tree) -> Tree:
    """The trainable half after every leaf has restored its invariant (masked entries are zero)."""
    params = project(combine(trainable, frozen))
    return jax.tree.map(
        lambda v, p: None if v is None else p, trainable, params, is_leaf=lambda v: v is None
    )
