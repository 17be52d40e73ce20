"""Absolute positions: vectors that are added to the embedding of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context, fold
from effjax.models.functional import Keys
from effjax.models.positions.none import NoPositions
from effjax.ops.position.sinusoidal import sinusoidal
from effjax.weights import Axes, Tree

SPREAD = 0.02  # that of `Embed`'s table
DRAW = 1 << 20  # folded into the call's key for the places of "randomized"; runs have lower numbers


def add_positions(embedding: Any, x: jax.Array, context: Context, state: Tree = None) -> jax.Array:
    """x [B T D] with what a scheme's `embedding` adds; None adds nothing."""
    if embedding is None:
        return x
    key = None if state is not None else fold(context.key, DRAW)
    return embedding(x, context.positions, key)


class SinusoidalEmbedding(nnx.Module):
    """x + 0.02 sinusoidal(p): the sinusoids in the size of the embedding they are added to.

    Source: Vaswani et al. 2017, sections 3.4 and 3.5, https://arxiv.org/abs/1706.03762, who
    multiply the embedding instead; the norm before each layer makes the two the same.
    """

    def __init__(self, base: float):
        self.base = base

    def __call__(
        self, x: jax.Array, positions: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        vectors = sinusoidal(positions, x.shape[-1], self.base)
        return x + (SPREAD * vectors).astype(x.dtype)


class LearnedEmbedding(nnx.Module):
    """x + table[p]: a learned vector for each position; beyond the table, that of its last row.

    Source: Radford et al. 2019, GPT-2, and Devlin et al. 2018, BERT, section 3.2,
    https://arxiv.org/abs/1810.04805
    """

    def __init__(self, rows: int, width: int, rngs: Keys):
        self.table = nnx.Param(
            SPREAD * jax.random.normal(rngs(), (rows, width)),
            axes=Axes((), ("positions", "embed")),
        )

    def __call__(
        self, x: jax.Array, positions: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        table = self.table.get_value()
        return x + table[jnp.clip(positions, 0, table.shape[0] - 1)].astype(x.dtype)


class SinusoidalPositions(NoPositions):
    """Sinusoids at the embedding, nothing in attention."""

    @classmethod
    def embedding(cls, config: StackConfig, rngs: Keys) -> Any:
        return SinusoidalEmbedding(config.position.rope_base)


class LearnedPositions(NoPositions):
    """Learned vectors at the embedding, nothing in attention."""

    @classmethod
    def embedding(cls, config: StackConfig, rngs: Keys) -> Any:
        return LearnedEmbedding(config.position.reach, config.width, rngs)
