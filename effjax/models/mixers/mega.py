"""Mega: gated attention of one head, over values that a moving average asks for."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.ema import MovingAverage
from effjax.ops.accounting import Flops
from effjax.ops.attention.accounting import engine_flops
from effjax.ops.attention.cache import Cache, empty_cache, keys_values, write_cache
from effjax.ops.attention.engine import attention
from effjax.ops.attention.laplace import (
    exact_laplace_flops,
    laplace_attention,
    laplace_flops,
    laplace_row,
)
from effjax.ops.attention.paged import read, write
from effjax.ops.attention.patterns import Cells, Pattern
from effjax.ops.position.rope import rope
from effjax.weights import Axes, Tree


class Mega(nnx.Module):
    """Gated attention of a single head, whose queries, keys and gates come from a moving average.

        m = silu(ema(x))      z = silu(W_z m)    q = a_q * z + b_q    k = a_k * z + b_k
        v = silu(W_v x)       r = silu(W_r m)    u = sigmoid(W_u m)
        h = silu(W_h m + W_o (r * attention(q, k, v)))               y = u * (h - x)

    with a bias in each of W_z, W_v, W_r, W_u and W_h. The reset gate r of 0 leaves the moving
    average alone; the update gate u of 0 leaves the block's residual as it is. Scores have a bias
    by distance, rope(c, t) . rope(d, s) of learned c and d, which is formed as further features of
    queries and keys. `attention` is soft-max, scaled by the root of z's size, or Laplace's; b_k is
    left out with soft-max, which does not see what moves all scores of a query alike.

    Source: Ma et al. 2022, Mega, section 3, https://arxiv.org/abs/2209.10655, and its code,
    https://github.com/facebookresearch/mega (`MovingAverageGatedAttention`). Departures: there the
    gate is between h and the residual itself, x + u * (h - x), with x not normalised; here the
    block adds the residual, and what is taken off is the normalised x. a_q and a_k start as
    standard normals, where theirs are 50 times smaller and z learns next to nothing at first. Their
    dropout within the layer is left out, and of their biases by distance the rotary one is here.
    """

    kind: ClassVar[Kind] = "mega"
    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        (key_dim, value_dim), keys = _sizes(config), Axes((), ("key",))
        self.pattern = _pattern(self.kind, config)
        self.function = FUNCTIONS[config.mega.function]
        width, key = (("embed", config.width),), (("key", key_dim),)
        value = (("value", value_dim),)
        draw = lambda: jax.random.normal(rngs(), (key_dim,))  # noqa: E731
        self.ema = MovingAverage(config, rngs)
        self.z = Dense("btd,dk->btk", width, key, rngs)
        self.v = Dense("btd,de->bte", width, value, rngs)
        self.reset = Dense("btd,de->bte", width, value, rngs)
        self.update = Dense("btd,dc->btc", width, width, rngs)
        self.candidate = Dense("btd,dc->btc", width, width, rngs)
        self.o = Dense("bte,ed->btd", value, width, rngs)
        self.z_bias = nnx.Param(jnp.zeros(key_dim), axes=keys)
        self.v_bias = nnx.Param(jnp.zeros(value_dim), axes=Axes((), ("value",)))
        self.reset_bias = nnx.Param(jnp.zeros(value_dim), axes=Axes((), ("value",)))
        self.update_bias = nnx.Param(jnp.zeros(config.width), axes=Axes((), ("embed",)))
        self.candidate_bias = nnx.Param(jnp.zeros(config.width), axes=Axes((), ("embed",)))
        self.q_scale, self.k_scale = (nnx.Param(draw(), axes=keys) for _ in range(2))
        self.q_bias = nnx.Param(jnp.zeros(key_dim), axes=keys)
        seen = config.mega.function != "softmax"
        self.k_bias = nnx.Param(jnp.zeros(key_dim), axes=keys) if seen else None
        places = Axes((), ("basis",))
        self.q_place, self.k_place = (nnx.Param(0.02 * draw(), axes=places) for _ in range(2))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The moving average's, and a cache of `max_length` slots, or of a chunk and a piece."""
        span = self.pattern.span()
        capacity = max_length if span is None else min(span + piece - 1, max_length)
        keys = self.z.weight.shape[-1] + self.k_place.get_value().shape[-1]
        width = max(keys, self.v.weight.shape[-1])
        return {
            "ema": self.ema.init_state(batch, max_length, piece, dtype),
            "cache": empty_cache(batch, 1, capacity, width, piece, dtype),
        }

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        m, average, _ = self.ema(x, context, None if state is None else state["ema"])
        z = jax.nn.silu(self.z(m) + _row(self.z_bias, x))
        v = jax.nn.silu(self.v(x) + _row(self.v_bias, x))
        reset = jax.nn.silu(self.reset(m) + _row(self.reset_bias, x))
        update = jax.nn.sigmoid(self.update(m) + _row(self.update_bias, x))
        q = z * _row(self.q_scale, x) + _row(self.q_bias, x)
        k = z * _row(self.k_scale, x)
        k = k if self.k_bias is None else k + _row(self.k_bias, x)
        q, k = self._placed(q, self.q_place, context), self._placed(k, self.k_place, context)
        cache = None if state is None else state["cache"]
        y, cache = self.function(
            q, k, v[:, :, None], z.shape[-1], pattern=self.pattern, context=context, cache=cache
        )
        y = y[:, :, 0, : v.shape[-1]]
        h = jax.nn.silu(self.candidate(m) + _row(self.candidate_bias, x) + self.o(reset * y))
        return update * (h - x), None if state is None else {"ema": average, "cache": cache}, {}

    @staticmethod
    def _placed(x: jax.Array, place: nnx.Param, context: Context) -> jax.Array:
        """Queries or keys [B T .], behind them the features of their bias: [B T 1 .]."""
        row = place.get_value().astype(x.dtype)[None, None, None]
        row = jnp.broadcast_to(row, (*x.shape[:2], *row.shape[2:]))
        return jnp.concatenate([x[:, :, None], rope(row, context.positions)], axis=-1)

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        (z, h), pattern = _sizes(config), _pattern(cls.kind, config)
        own = exact_laplace_flops(pattern, 1, T, 1, 2 * z, h)
        return _sum(own, MovingAverage.exact_flops(config, T))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        (z, h), pattern = _sizes(config), _pattern(cls.kind, config)
        if config.mega.function == "laplace":
            own = laplace_flops(pattern, B, T, 1, 2 * z, h, aligned=aligned)
        else:
            H = max(2 * z, h)
            own = engine_flops(pattern, B, T, T, 1, H, aligned=aligned, ordered=True)
        return _sum(own, MovingAverage.program_flops(config, B, T, aligned))

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token after a context of so many."""
        z, h = _sizes(config)
        slots = min(_pattern(cls.kind, config).span() or context, context)
        return 4 * slots * max(2 * z, h)


class MegaChunk(Mega):
    """Mega whose attention stays within chunks of fixed length: linear in a text's length.

    Position p belongs to chunk p div `chunk`; the moving average runs on from chunk to chunk.

    Source: Ma et al. 2022, Mega, section 3 (Mega-chunk), https://arxiv.org/abs/2209.10655
    """

    kind: ClassVar[Kind] = "mega_chunk"


Attended = tuple[jax.Array, Cache | None]


def softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    content: int,
    *,
    pattern: Pattern,
    context: Context,
    cache: Cache | None,
) -> Attended:
    """Soft-max attention whose first `content` features are scaled by the root of their number.

    The engine's queries, keys and values are of one size, and so are those of a cache.
    """
    wide = max(k.shape[-1], v.shape[-1])
    scale = jnp.where(jnp.arange(k.shape[-1]) < content, content**-0.5, 1.0) * wide**0.5
    q, k, v = (_padded(x, wide) for x in (q * scale.astype(q.dtype)[None, None, None], k, v))
    positions, segments = context.positions, context.segments
    if cache is not None:
        cache = write(cache, k, v, positions, segments)
        return read(cache, q, pattern=pattern, positions=positions, segments=segments), cache
    y = attention(
        q,
        k,
        v,
        pattern=pattern,
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        aligned=context.aligned,
        ordered=True,
    )
    return y, None


def laplace(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    content: int,
    *,
    pattern: Pattern,
    context: Context,
    cache: Cache | None,
) -> Attended:
    """Laplace attention whose first `content` features are divided by the number of keys."""
    positions, segments = context.positions, context.segments
    options: dict[str, Any] = {"pattern": pattern, "content": content}
    if cache is None:
        options |= {"positions": positions, "segments": segments, "aligned": context.aligned}
        return laplace_row(q, k, v, **options), None
    wide = max(k.shape[-1], v.shape[-1])
    q, k, v = (_padded(x, wide) for x in (q, k, v))
    cache = write_cache(cache, k, v, positions, segments)
    y = laplace_attention(
        q,
        *keys_values(cache),
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segments,
        k_segments=cache.segments,
        **options,
    )
    return y, cache


FUNCTIONS = {"softmax": softmax, "laplace": laplace}
"""What makes weights of scores, by the name in `MegaConfig.function`."""


def _padded(x: jax.Array, size: int) -> jax.Array:
    """Zeros behind the features, up to `size`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _row(weight: nnx.Param, x: jax.Array) -> jax.Array:
    """A learned vector as it meets x."""
    return weight.get_value().astype(x.dtype)[None, None]


def _pattern(kind: Kind, config: StackConfig) -> Pattern:
    """All keys, or those of a query's chunk; no later ones in a decoder."""
    every = config.pattern_of(kind)
    return every if kind == "mega" else Cells(config.mega.chunk, 0) & every


def _sizes(config: StackConfig) -> tuple[int, int]:
    """Of z, and of a value."""
    return config.mega.key_dim, config.mega.value_dim or 2 * config.width


def _sum(*parts: Flops) -> Flops:
    return Flops(sum(x.forward for x in parts), sum(x.backward for x in parts))
