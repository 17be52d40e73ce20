"""No positions: what a causal model can tell of order, its mask tells."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.functional import Keys
from effjax.ops.attention.bias import Bias
from effjax.ops.position.shaw import ShawTables


class NoPositions(nnx.Module):
    """Leaves queries, keys and scores as they are, and is what other schemes begin from.

    Source: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization in
    Transformers", section 2 (NoPE), https://arxiv.org/abs/2305.19466
    """

    rotates_cache: ClassVar[bool] = False
    """Whether keys are cached as they are and rotated whenever they are read."""

    def __init__(self, config: StackConfig, rngs: Keys):
        pass

    @classmethod
    def embedding(cls, config: StackConfig, rngs: Keys) -> Any:
        """What a model adds to its embedding, `(x, positions, key) -> x`; None: nothing."""
        return None

    def drawn(self, key: jax.Array | None, length: int) -> Any:
        """The scheme as one call uses it, on rows of `length` tokens; a key is training."""
        return self

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys [B T N H] as they meet and are cached, unless `rotates_cache`."""
        return x

    def rotate_late(
        self, q: jax.Array, k: jax.Array, q_at: tuple[Any, Any], k_at: tuple[Any, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as they meet, from (positions, segments), where `rotates_cache`."""
        return q, k

    def bias(self) -> Bias | None:
        """What is added to the scores."""
        return None

    def tables(self) -> ShawTables | None:
        """The vectors by distance that are added to keys and values."""
        return None
