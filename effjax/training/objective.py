"""The training loss of a language model as shares of a batch that add up over any split of it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from effjax.data.batch import Batch
from effjax.errors import ConfigError
from effjax.models.configs import DecoderConfig, EncoderConfig, StackConfig
from effjax.models.decoder import decoder
from effjax.models.encoder import encoder
from effjax.models.stack import Remat
from effjax.objectives.causal_lm import causal_lm
from effjax.weights import Tree


class Totals(NamedTuple):
    """What the whole batch is divided by: the tokens to predict and the live tokens."""

    targets: jax.Array
    live: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> "Totals":
        """Counts of a batch, at least 1, so that a batch without targets has loss 0."""
        count = lambda present: jnp.maximum(present.sum(), 1).astype(jnp.float32)  # noqa: E731
        return cls(count(batch.targets >= 0), count(batch.positions >= 0))


Metrics: TypeAlias = dict[str, jax.Array]
Objective: TypeAlias = Callable[[Tree, Batch, Totals, jax.Array | None], tuple[jax.Array, Metrics]]
"""(params, part of a batch, the batch's totals, key) -> (share of the loss, shares of metrics)."""


def language_model_objective(
    config: DecoderConfig | EncoderConfig, *, remat: Remat | None = None
) -> Objective:
    """Mean nats per predicted token, plus the losses of mixers and networks that have their own.

    A decoder predicts next tokens, an encoder masked ones: the batch's targets are of either kind.

    Each is a sum over rows divided by a total of the whole batch, so shares of micro-batches and of
    devices add up to exactly the loss of one big batch, however unequal their token counts are.
    Raises ConfigError for a model that reads a memory: a batch has none.
    """
    if config.cross:
        raise ConfigError(
            f"{type(config).__name__}.cross must be false for language modelling, whose batches "
            "have no memory to read, got true"
        )
    apply: Callable[..., Any] = (
        partial(encoder(config).apply, method="masked_lm")
        if isinstance(config, EncoderConfig)
        else decoder(config).apply
    )

    def objective(
        params: Tree, batch: Batch, totals: Totals, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        logits, _, aux = apply(
            params,
            batch.tokens,
            positions=batch.positions,
            segments=batch.segments,
            key=key,
            remat=remat,
        )
        nats, _ = causal_lm(logits, batch.targets)
        metrics = {"nats": nats / totals.targets}
        loss = metrics["nats"]
        for owner, name, weight in own_losses(config):
            if found := collect(aux, owner):
                layers = jnp.concatenate([sums[name] for sums in found])
                metrics[f"{owner}_{name}"] = layers.mean() / totals.live
                loss = loss + weight * metrics[f"{owner}_{name}"]
        return loss, metrics

    return objective


def own_losses(config: StackConfig) -> tuple[tuple[str, str, float], ...]:
    """Losses that layers leave in `aux` as sums over live tokens: their owner, name and weight."""
    return (
        ("router", "balance", config.switch.balance_weight),
        ("router", "z", config.switch.z_weight),
        ("compression", "reconstruction", config.compressive.reconstruction_weight),
        ("long_memory", "kl", config.infinity.kl_weight),
        ("hash", "loss", config.learned_hash.loss_weight),
        ("routing", "commitment", config.routing.commitment_weight),
    )


def collect(aux: Tree, name: str) -> list[Any]:
    """Every entry of that name in `aux`, one for each kind of block, stacked by layer."""
    if not isinstance(aux, dict):
        return []
    found = [aux[name]] if name in aux else []
    return found + [hit for key in aux if key != name for hit in collect(aux[key], name)]
