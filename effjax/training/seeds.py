"""The same training at several seeds in one program: what a verdict needs, for one compilation."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.batch import Batch
from effjax.data.examples import RowSource
from effjax.data.loader import ArrayLoader
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.training.objective import language_model_objective
from effjax.training.optimizer import OptimizerConfig, optimizer
from effjax.training.step import train_state, train_step
from effjax.weights import Tree


def train_seeds(
    model: DecoderConfig,
    setting: OptimizerConfig,
    batches: Iterable[Batch],
    *,
    seeds: Sequence[int],
    steps: int,
    params: Tree = None,
) -> tuple[Tree, np.ndarray]:
    """Trains one decoder per seed: parameters and losses, with a leading axis of seeds.

    batches: arrays [seeds B T], each seed its own rows. params: start from these [seeds ...], not
    from fresh ones. The losses, [steps seeds], are those of the batches as they came. Each seed
    goes its own way, as if it were alone; on one device only.
    Raises ValueError where there are fewer than `steps` batches.
    """
    init, _, axes_of = decoder(model)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    if params is None:
        params = jax.jit(jax.vmap(lambda key: init(jax.random.fold_in(key, 0))))(keys)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    axes = axes_of(one)
    rule = optimizer(setting, steps, one, axes)
    begin = partial(train_state, axes=axes, optimizer=rule)
    state = jax.jit(jax.vmap(lambda p, key: begin(p, key=jax.random.fold_in(key, 1))))(params, keys)
    step = jax.jit(jax.vmap(train_step(language_model_objective(model), rule)), donate_argnums=0)
    losses, source = [], iter(batches)
    for number in range(steps):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"train_seeds: wanted {steps} batches, got {number}")
        state, metrics = step(state, batch)
        losses.append(metrics["nats"])
    return jax.vmap(lambda s: s.params)(state), np.array(losses)


def seeded_batches(packed: RowSource, batch: int, seeds: Sequence[int]) -> Iterator[Batch]:
    """Batches [seeds B T] of a text or of examples, endless, each seed in an order of its own."""
    loaders = [ArrayLoader(packed, batch, seed) for seed in seeds]
    while True:
        parts = [next(loader) for loader in loaders]
        yield jax.tree.map(lambda *rows: np.stack(rows), *parts)
