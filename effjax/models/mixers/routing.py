"""The Routing Transformer's attention: clusters whose centroids follow the tokens."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.kinds import Kind
from effjax.models.mixers.attention import Attention
from effjax.models.mixers.gathered import PairByPair, WholeRows, to_heads
from effjax.ops.accounting import Flops
from effjax.ops.attention.buckets import (
    empty_bucket_cache,
)
from effjax.ops.attention.routing import (
    Centroids,
    commitment,
    normalize,
    routing_attention,
    routing_flops,
    similarities,
    update_centroids,
)
from effjax.weights import Axes, Tree


class RoutingAttention(WholeRows, Attention):
    """Attention inside clusters of normalised queries and keys.

    They are clustered before positions rotate them. Centroids are constants that no gradient moves:
    `aux["centroids"]` holds what they are to be after this batch, and a training loop that trains
    them puts it in place by `with_centroids` after each step (`effjax.training.loop` does not, and
    leaves them as they were drawn). aux["routing"]: sums over the batch's live tokens, `commitment`
    (a loss that draws tokens to their centroids; `effjax.training.objective` adds it) and `live`.

    Clusters take the tokens nearest to them, whichever come later: for encoders.

    Source: Roy et al. 2021, Routing Transformer, section 4.1, https://arxiv.org/abs/2003.05997; its
    heads of local attention are layers of the kind `window` here.
    """

    kind: ClassVar[Kind] = "routing"
    stable: ClassVar[Kind | None] = "routing_stable"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        own, heads = config.routing, config.attention.heads
        self.causal, self.width, self.decay = config.causal, own.width, own.decay
        shape = (heads, own.clusters, config.head_dim("attention"))
        drawn = normalize(jax.random.normal(rngs(), (1, *shape)))[0]
        self.means = Constant(drawn, axes=Axes((), ("heads", "state", "head")))
        self.count = Constant(jnp.ones(shape[:2]), axes=Axes((), ("heads", "state")))

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        x, means = context.clear(x), self.means.get_value()
        q, k, v = self.heads(x)
        y = routing_attention(
            self.position.rotate(q, context.positions),
            self.position.rotate(k, context.positions),
            v,
            similarities(q, means),
            similarities(k, means),
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            width=self.width,
            causal=self.causal,
            bias=self.position.bias(),
        )
        return self.o(y), state, self.followed(q, k, context)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalised queries and keys, and values, of every head."""
        q = normalize(self.q(x))
        return q, to_heads(normalize(self.k(x)), q.shape[2]), to_heads(self.v(x), q.shape[2])

    def followed(self, q: jax.Array, k: jax.Array, context: Context) -> dict[str, Any]:
        """The centroids after this batch, and how far its tokens are from them."""
        both = jnp.concatenate([q, k], axis=1)
        live = jnp.tile(context.positions >= 0, (1, 2))
        old = Centroids(self.means.get_value(), self.count.get_value())
        new = update_centroids(old, both, self.decay, live)
        far = commitment(both, old.means, live)
        return {
            "centroids": {"means": new.means, "count": new.count},
            "routing": {"commitment": far, "live": live.sum() / 2},
        }

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows; without those of new centroids."""
        N, H, own = config.attention.heads, config.head_dim("attention"), config.routing
        return routing_flops(B, T, N, H, own.clusters, width=own.width, aligned=aligned)


class StableRoutingAttention(PairByPair, RoutingAttention):
    """The same without a choice among tokens: a token reads those whose cluster is its own.

    Each pair is decided on its own (`effjax.ops.attention.buckets`), in a decoder for earlier
    tokens only, and a token reads itself: exactly causal, at the cost of full attention.
    """

    kind: ClassVar[Kind] = "routing_stable"

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Any:
        """An empty cache of `max_length` slots, with the cluster of each slot's key."""
        heads, _, head_dim = self.means.get_value().shape
        return empty_bucket_cache(batch, heads, 1, max_length, head_dim, piece, dtype)

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        q, k, v = self.heads(context.clear(x))
        turned = (self.position.rotate(part, context.positions) for part in (q, k))
        codes = self.codes(q), self.codes(k)
        y, new = self.in_buckets((*turned, v), codes, context, state, bias=self.position.bias())
        return self.o(y), new, {} if state is not None else self.followed(q, k, context)

    def codes(self, x: jax.Array) -> jax.Array:
        """The nearest cluster of every token: [B N 1 T]."""
        return similarities(x, self.means.get_value()).argmax(axis=2, keepdims=True).astype("int32")

    @classmethod
    def code_flops(cls, config: StackConfig, tokens: int) -> int:
        """FLOPs of giving queries and keys their nearest clusters."""
        N, H = config.attention.heads, config.head_dim("attention")
        return 4 * tokens * N * H * config.routing.clusters


def with_centroids(params: Tree, aux: Tree) -> Tree:
    """A model's params with the centroids that its `aux` holds after a batch: a pure function."""
    runs = dict(params["stack"]["runs"])
    for run, blocks in aux["stack"].items():
        for block, own in blocks.items():
            if "centroids" in own:
                unit = runs[run][block]
                mixer = {**unit["mixer"], **own["centroids"]}
                runs[run] = {**runs[run], block: {**unit, "mixer": mixer}}
    return {**params, "stack": {**params["stack"], "runs": runs}}
