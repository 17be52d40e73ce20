"""Transformer-XL's attention: a segment and a memory of those before it."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.attention import Attention
from effjax.ops.accounting import Flops
from effjax.ops.attention.accounting import engine_flops
from effjax.ops.attention.cache import Cache, empty_cache
from effjax.ops.attention.merge import merge_parts
from effjax.ops.attention.paged import read, write
from effjax.ops.attention.patterns import Causal
from effjax.ops.attention.transformer_xl import (
    KeysValues,
    TransformerXL,
    relative_keys,
    relative_queries,
    segment_recurrence_parts,
)
from effjax.weights import Axes, einsum


class TransformerXLAttention(Attention):
    """Attention to a token's own segment, and through `stop_gradient` to a memory before it.

    A whole row is what the paper gets by feeding segments in turn, in values and in gradients: the
    hidden states of earlier segments are read but not trained through. With a state the numbers are
    the same; then it is the caller who takes no gradient of the state.

    Positions are the config's scheme, or the paper's own with `sinusoids`: then queries, keys and
    the cache's slots are wider by so many numbers.

    Source: Dai et al. 2019, Transformer-XL, sections 3.2 and 3.3, https://arxiv.org/abs/1901.02860;
    u and v are a layer's own, as in the released code's untied form.
    """

    kind: ClassVar[Kind] = "transformer_xl"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.section: TransformerXL = getattr(config, self.kind)
        if self.section.sinusoids:
            heads = (("heads", config.attention.heads), ("head", config.head_dim("attention")))
            features = (("basis", self.section.sinusoids),)
            self.r = Dense("btf,fnh->btnh", features, heads, rngs)
            shape, axes = tuple(size for _, size in heads), Axes((), ("heads", "head"))
            draw = lambda: 0.02 * jax.random.normal(rngs(), shape)  # noqa: E731
            self.content_bias = nnx.Param(draw(), axes=axes)
            self.position_bias = nnx.Param(draw(), axes=axes)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Any:
        """An empty cache of what the pattern spans, or of `max_length` slots if that is less."""
        heads, head_dim = self.k.weight.shape[-2:]
        capacity = min(self.section.length + self.section.memory + piece - 1, max_length)
        return empty_cache(batch, heads, capacity, head_dim + self.section.sinusoids, piece, dtype)

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        x = context.clear(x)
        q = self.queries(x, context.positions)
        if state is None:
            return self.output(merge_parts(self.parts(x, q, context))), None, {}
        state, y = self.recall(x, q, context, state)
        return self.output(y), state, {}

    def recall(
        self, x: jax.Array, q: jax.Array, context: Context, state: Cache
    ) -> tuple[Cache, jax.Array]:
        """Writes a piece to the cache, and what its queries read there."""
        at = {"positions": context.positions, "segments": context.segments}
        state = write(state, *self.keys_values(x, context.positions), **at)
        return state, read(state, q, pattern=self.pattern, bias=self.bias(), **at)

    def parts(self, x: jax.Array, q: jax.Array, context: Context) -> list[Any]:
        """What queries read of their own segments and of the memory."""
        return segment_recurrence_parts(
            q,
            self.keys_values(x, context.positions),
            self.keys_values(jax.lax.stop_gradient(x), context.positions),
            pattern=self.section,
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            bias=self.bias(),
        )

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries as they meet keys."""
        q = self.q(x)
        if not self.section.sinusoids:
            return self.position.rotate(q, positions)
        u, v = (
            w.get_value().astype(q.dtype)[None, None]
            for w in (self.content_bias, self.position_bias)
        )
        return relative_queries(q + u, einsum("btnh,fnh->btnf", q + v, self.r.weight), positions)

    def keys_values(self, x: jax.Array, positions: jax.Array) -> KeysValues:
        """Keys as they meet queries, and values."""
        k, v = self.k(x), self.v(x)
        if self.section.sinusoids:
            return relative_keys(k, v, positions, self.section.sinusoids)
        return self.position.rotate(k, positions), v

    def output(self, y: jax.Array) -> jax.Array:
        """The projection of what was read, without the places of its values."""
        return self.o(y[..., : y.shape[-1] - self.section.sinusoids])

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the two parts as written, and of the memory's own projections."""
        own, N, H = getattr(config, cls.kind), config.attention.heads, cls.head_size(config)
        reads = [own.own & Causal(), own.past][: 1 + (own.memory > 0)]
        parts = [engine_flops(p, B, T, T, N, H, aligned=aligned, ordered=True) for p in reads]
        K = config.attention.kv_heads or N
        again = 2 * 2 * B * T * config.width * K * config.head_dim("attention") * (own.memory > 0)
        return Flops(
            sum(part.forward for part in parts) + again,
            sum(part.backward for part in parts) + again,
        )

    @classmethod
    def head_size(cls, config: StackConfig) -> int:
        """How many numbers a query has when it meets keys."""
        return config.head_dim("attention") + getattr(config, cls.kind).sinusoids

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token after a context of so many."""
        own = getattr(config, cls.kind)
        slots = min(own.length + own.memory, context)
        N, H = config.attention.heads, cls.head_size(config)
        return engine_flops(own & Causal(), 1, 1, slots, N, H).forward
