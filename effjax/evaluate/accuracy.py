"""Accuracy: the share of targets that a model ranks first."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.batch import Batch
from effjax.errors import DataError
from effjax.evaluate.bootstrap import ratio_interval
from effjax.weights import Tree


@dataclass(frozen=True)
class Accuracy:
    """A share of targets in [0, 1], its 95% interval over rows, and what it was counted from.

    whole: the share of rows all of whose targets are right.
    """

    value: float
    low: float
    high: float
    whole: float
    targets: int
    rows: int


def accuracy(apply: Callable, params: Tree, batches: Iterable[Batch], *, seed: int = 0) -> Accuracy:
    """Scores the targets of batches: right where no other id has a larger logit.

        value = right targets / targets

    Rows without a target count nowhere. The interval is the bootstrap of
    `effjax.evaluate.bootstrap`: a row is one draw of the task, the training seed is not drawn.

    Raises DataError where nothing is predicted.
    """
    pairs = jax.device_get([right_and_asked(apply, params, part) for part in batches])
    right, asked = (np.concatenate([np.zeros(0), *parts]) for parts in zip(*pairs, strict=True))
    live = asked > 0
    if not live.any():
        raise DataError(f"accuracy: no target to predict in {len(pairs)} batches")
    right, asked = right[live], asked[live]
    low, high = ratio_interval(right, asked, seed=seed)
    value, whole = right.sum() / asked.sum(), (right == asked).mean()
    return Accuracy(float(value), low, high, float(whole), int(asked.sum()), len(asked))


@partial(jax.jit, static_argnames="apply")
def right_and_asked(apply: Callable, params: Tree, batch: Batch) -> Any:
    """(right targets, targets) of each row [B]; no key is used."""
    logits = apply(params, batch.tokens, positions=batch.positions, segments=batch.segments)[0]
    asked = batch.targets >= 0
    right = asked & (logits.argmax(axis=-1) == batch.targets)
    return jnp.sum(right, axis=1), jnp.sum(asked, axis=1)
