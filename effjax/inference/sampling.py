"""From logits to the next token: greedy, temperature, top-k and nucleus sampling."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from effjax.config import require_finite, require_positive, require_types


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw a token.

    temperature: divides the logits; 0 is greedy, and the larger it is the closer to uniform.
    top_k: keep the k most probable tokens (None or more than there are: all).
    top_p: keep the fewest most probable tokens whose probability reaches top_p; 0 keeps one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "top_k")
        require_finite(self, "temperature", low=0.0)
        require_finite(self, "top_p", low=0.0, high=1.0)


def sample(logits: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draws one token id per row of `logits` [B V]; ties of the greedy choice go to the lowest id.

    Source: top-k, Fan et al. 2018, https://arxiv.org/abs/1805.04833; nucleus, Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, restrict(logits, config), axis=-1)


def restrict(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Tempered logits with -inf at every token that top-k and top-p exclude, in float32.

    Top-k comes first and top-p acts on what it left. Among equal logits the lower id is kept, so
    exactly k tokens stay. The most probable token always stays.
    """
    scores = logits.astype(jnp.float32)
    # Shifted before the division: a tiny temperature sends the rest to -inf, never the best to inf.
    scores = (scores - scores.max(axis=-1, keepdims=True)) / max(config.temperature, 1e-30)
    if config.top_k is None and config.top_p == 1:
        return scores
    order = jnp.argsort(-scores, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scores, order, axis=-1)
    rank = jnp.arange(scores.shape[-1])[None]
    kept = rank < (config.top_k or rank.size)
    # Not at top_p = 1: a rounded cumulative sum may get there before the last token.
    if config.top_p < 1:
        probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept &= (before < config.top_p) | (rank == 0)
    ranked = jnp.where(kept, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
