"""Reformer's attention: shared queries and keys that meet where they hash alike."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.gathered import PairByPair, WholeRows, to_heads
from effjax.models.positions import SCHEMES
from effjax.ops.accounting import Flops
from effjax.ops.attention.buckets import (
    BucketCache,
    empty_bucket_cache,
)
from effjax.ops.attention.reformer import (
    lsh_codes,
    reformer_attention,
    reformer_flops,
    unit_keys,
)
from effjax.weights import Axes


class ReformerAttention(WholeRows, nnx.Module):
    """o(reformer(qk(x), v(x))): queries are keys, of length 1, rotated before they are hashed.

    Rotations are drawn once, when the model is built, and are constants; the paper draws them anew
    in every pass. They choose with later tokens: for encoders. The paper's reversible layers, which
    save memory and change no result, are left out.

    Source: Kitaev et al. 2020, Reformer, section 2, https://arxiv.org/abs/2001.04451
    """

    kind: ClassVar[Kind] = "reformer"
    stable: ClassVar[Kind | None] = "reformer_stable"

    def __init__(self, config: StackConfig, rngs: Keys):
        own, hashing = config.attention, config.reformer
        self.causal, self.chunk, self.look_back = config.causal, hashing.chunk, hashing.look_back
        self.position = SCHEMES[config.position.scheme](config, rngs)
        head_dim = config.head_dim("attention")
        width = (("embed", config.width),)
        heads = (("heads", own.heads), ("head", head_dim))
        values = (("kv_heads", own.kv_heads or own.heads), ("head", head_dim))
        self.qk = Dense("btd,dnh->btnh", width, heads, rngs)
        self.v = Dense("btd,dkh->btkh", width, values, rngs)
        self.o = Dense("btnh,nhd->btd", heads, width, rngs, gain=config.residual_gain)
        shape = (own.heads, head_dim, hashing.rounds, hashing.buckets // 2)
        self.rotations = Constant(
            jax.random.normal(rngs(), shape), axes=Axes((), ("heads", "head", "rank", "state"))
        )

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        qk, v = self.heads(context.clear(x), context)
        y = reformer_attention(
            qk,
            v,
            self.rotations.get_value(),
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            chunk=self.chunk,
            look_back=self.look_back,
            causal=self.causal,
            bias=self.position.bias(),
        )
        return self.o(y), state, {}

    def heads(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Shared queries and keys, and values, of every head."""
        qk = self.position.rotate(self.qk(x), context.positions)
        return qk, to_heads(self.v(x), qk.shape[2])

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own, (N, H) = config.reformer, _sizes(config)
        return reformer_flops(
            B,
            T,
            N,
            H,
            own.rounds,
            own.buckets,
            chunk=own.chunk,
            look_back=own.look_back,
            aligned=aligned,
        )


class StableReformerAttention(PairByPair, ReformerAttention):
    """The same without sorting: a token reads the tokens of its bucket, in a decoder earlier ones.

    Each pair is decided on its own (`effjax.ops.attention.buckets`), so that it is exactly causal.
    It costs as much as full attention.
    """

    kind: ClassVar[Kind] = "reformer_stable"

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> BucketCache:
        """An empty cache of `max_length` slots, with the code of each slot's key in each round."""
        heads, head_dim, rounds, _ = self.rotations.get_value().shape
        return empty_bucket_cache(batch, heads, rounds, max_length, head_dim, piece, dtype)

    def __call__(
        self, x: jax.Array, context: Context, state: BucketCache | None = None
    ) -> tuple[jax.Array, BucketCache | None, dict[str, jax.Array]]:
        qk, v = self.heads(context.clear(x), context)
        codes = lsh_codes(qk, self.rotations.get_value())
        y, state = self.in_buckets(
            (qk, unit_keys(qk), v),
            (codes, codes),
            context,
            state,
            bias=self.position.bias(),
            itself=False,
            scale=1.0,
        )
        return self.o(y), state, {}

    @classmethod
    def code_flops(cls, config: StackConfig, tokens: int) -> int:
        """FLOPs of the rotations by which tokens are hashed."""
        own, (N, H) = config.reformer, _sizes(config)
        return 2 * tokens * N * H * own.rounds * (own.buckets // 2)


def _sizes(config: StackConfig) -> tuple[int, int]:
    return config.attention.heads, config.head_dim("attention")
