"""Soft-max attention over all earlier tokens, or over a sliding window of them."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import AttentionConfig, DecoderConfig
from effjax.models.context import Context
from effjax.models.layers import Dense
from effjax.ops.attention.cache import Cache, empty_cache, read_cache, write_cache
from effjax.ops.attention.engine import attention
from effjax.ops.attention.patterns import Causal, Pattern, Window
from effjax.ops.position.rope import rope


class Attention(nnx.Module):
    """Causal attention with rotary positions and grouped keys; its state is a key-value cache."""

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.build(config, config.attention, Causal(), rngs)

    def build(
        self, config: DecoderConfig, own: AttentionConfig, pattern: Pattern, rngs: nnx.Rngs
    ) -> None:
        """Declares the four projections; shared by all patterns."""
        self.pattern = pattern
        self.base = own.rope_base
        head_dim = own.head_dim or config.width // own.heads
        width = (("embed", config.width),)
        queries = (("heads", own.heads), ("head", head_dim))
        keys = (("kv_heads", own.kv_heads or own.heads), ("head", head_dim))
        self.q = Dense("btd,dnh->btnh", width, queries, rngs)
        self.k = Dense("btd,dkh->btkh", width, keys, rngs)
        self.v = Dense("btd,dkh->btkh", width, keys, rngs)
        self.o = Dense("btnh,nhd->btd", queries, width, rngs, gain=config.residual_gain)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Cache:
        """An empty cache of `max_length` slots, or of what the window needs if that is less."""
        heads, head_dim = self.k.weight.shape[-2:]
        capacity = max_length
        if isinstance(self.pattern, Window):
            capacity = min(self.pattern.width + piece - 1, max_length)
        return empty_cache(batch, heads, capacity, head_dim, piece, dtype)

    def __call__(
        self, x: jax.Array, context: Context, state: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        x = context.clear(x)
        positions, segments = context.positions, context.segments
        q = rope(self.q(x), positions, base=self.base)
        k, v = rope(self.k(x), positions, base=self.base), self.v(x)
        if state is None:
            y = attention(
                q,
                k,
                v,
                pattern=self.pattern,
                q_positions=positions,
                k_positions=positions,
                q_segments=segments,
                k_segments=segments,
                aligned=context.aligned,
                ordered=True,
            )
        else:
            state = write_cache(state, k, v, positions, segments)
            y = read_cache(state, q, pattern=self.pattern, positions=positions, segments=segments)
        return self.o(y), state, {}


class WindowAttention(Attention):
    """Attention to the last `width` tokens only: cost and cache stop growing with the text."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.build(config, config.window, Window(config.window.width), rngs)
