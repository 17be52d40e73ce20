"""Learning-to-hash attention: networks put queries and keys into common buckets."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.attention import Attention
from effjax.models.mixers.gathered import PairByPair, WholeRows, to_heads
from effjax.ops.accounting import Flops
from effjax.ops.attention.buckets import (
    empty_bucket_cache,
)
from effjax.ops.attention.learned_hash import hash_attention, hash_flops, hash_loss


class LearnedHashAttention(WholeRows, Attention):
    """Attention's own parameters, read in buckets that two networks of each head choose.

    The networks see queries and keys before positions rotate them, and learn from a loss of their
    own: with a key (training) `aux["hash"]` holds `loss`, nats summed over live tokens and meant
    over heads, and `live`, how many; `effjax.training.objective` adds it, weighed. Attention gives
    the networks no gradient.

    Buckets hold the tokens that fit them best, whichever come later: for encoders.

    Source: Sun et al. 2022, Sparse Attention with Learning-to-Hash,
    https://openreview.net/forum?id=VGnOJhd5Q1q; the networks' size and loss are ours
    """

    kind: ClassVar[Kind] = "learned_hash"
    stable: ClassVar[Kind | None] = "learned_hash_stable"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        own = config.learned_hash
        self.causal, self.width = config.causal, own.width
        each = (("heads", config.attention.heads),)
        head, hidden = (("head", config.head_dim("attention")),), (("value", own.hidden),)
        buckets = (("state", own.buckets),)
        up, down = "nbth,nhf->nbtf", "nbtf,nfc->nbtc"  # XLA wants the batch of a product in front
        self.q_up = Dense(up, head, hidden, rngs, batch=each)
        self.q_down = Dense(down, hidden, buckets, rngs, batch=each)
        self.k_up = Dense(up, head, hidden, rngs, batch=each)
        self.k_down = Dense(down, hidden, buckets, rngs, batch=each)

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        q, k, v = self.heads(context.clear(x))
        q_logits, k_logits = logits = self.logits(q, k)
        y = hash_attention(
            self.position.rotate(q, context.positions),
            self.position.rotate(k, context.positions),
            v,
            q_logits,
            k_logits,
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            width=self.width,
            causal=self.causal,
            bias=self.position.bias(),
        )
        return self.o(y), state, self.taught(q, k, logits, context)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of every head."""
        q = self.q(x)
        return q, to_heads(self.k(x), q.shape[2]), to_heads(self.v(x), q.shape[2])

    def logits(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the networks say of the buckets of queries and keys, [B T N C]; they alone learn."""
        q, k = (jnp.moveaxis(jax.lax.stop_gradient(x), 2, 0) for x in (q, k))
        q_logits = self.q_down(jax.nn.relu(self.q_up(q)))
        k_logits = self.k_down(jax.nn.relu(self.k_up(k)))
        return jnp.moveaxis(q_logits, 0, 2), jnp.moveaxis(k_logits, 0, 2)

    def taught(
        self, q: jax.Array, k: jax.Array, logits: tuple[jax.Array, jax.Array], context: Context
    ) -> dict[str, Any]:
        """The networks' loss in training."""
        if context.key is None:
            return {}
        live, segments = context.positions >= 0, context.segments
        reads = live[:, :, None] & live[:, None] & (segments[:, :, None] == segments[:, None])
        if self.causal:
            reads &= context.positions[:, None] <= context.positions[:, :, None]
        return {"hash": {"loss": hash_loss(q, k, *logits, reads), "live": live.sum()}}

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows; without those of the networks' loss."""
        N, H, own = config.attention.heads, config.head_dim("attention"), config.learned_hash
        return hash_flops(B, T, N, H, own.buckets, width=own.width, aligned=aligned)


class StableLearnedHashAttention(PairByPair, LearnedHashAttention):
    """The same without a bound on buckets: a query reads all keys of its bucket, and itself.

    Each pair is decided on its own (`effjax.ops.attention.buckets`), in a decoder for earlier
    tokens only: exactly causal, at the cost of full attention.
    """

    kind: ClassVar[Kind] = "learned_hash_stable"

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Any:
        """An empty cache of `max_length` slots, with the bucket of each slot's key."""
        heads, head_dim = self.q.weight.shape[-2:]
        return empty_bucket_cache(batch, heads, 1, max_length, head_dim, piece, dtype)

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        q, k, v = self.heads(context.clear(x))
        logits = self.logits(q, k)
        q_codes, k_codes = (
            x.argmax(axis=-1).astype(jnp.int32).swapaxes(1, 2)[:, :, None] for x in logits
        )
        turned = (self.position.rotate(part, context.positions) for part in (q, k))
        y, new = self.in_buckets(
            (*turned, v), (q_codes, k_codes), context, state, bias=self.position.bias()
        )
        return self.o(y), new, {} if state is not None else self.taught(q, k, logits, context)
