"""Random feature attention: soft-max estimated by sines and cosines, with a gate that forgets."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.linear_attention import LinearAttention
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.accounting import gated_flops
from effjax.ops.recurrence.random_features import random_feature_attention, random_feature_state
from effjax.weights import Axes, Tree


class RandomFeatureAttention(LinearAttention):
    """o(random_feature_attention(q(x), k(x), v(x), gate(x))), for decoders.

    Each head has its own projection, a constant that is drawn when the model is built, times a
    learned scale of each channel, 1 to begin with, which the paper calls sigma. (In training, the
    paper draws from a pool of projections: a function of the params, which may put others of the
    same shape in the place of `projection`.) Gates are sigmoids with a bias of 0 to begin with; the
    paper does not say.

    Source: Peng et al. 2021, "Random Feature Attention", sections 3.1 and 3.2,
    https://arxiv.org/abs/2103.02143
    """

    kind: ClassVar[Kind] = "rfa"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        own, head_dim = config.rfa, config.head_dim("rfa")
        drawn = jax.random.normal(rngs(), (own.heads, own.features, head_dim))
        self.projection = Constant(drawn, axes=Axes((), ("heads", "rank", "head")))
        sigma = jnp.ones((own.heads, head_dim))
        self.sigma = nnx.Param(sigma, axes=Axes((), ("heads", "head")))
        self.gated = own.gated
        if own.gated:
            heads = (("heads", own.heads),)
            self.gate = Dense("btd,dn->btn", (("embed", config.width),), heads, rngs)
            self.gate_bias = nnx.Param(jnp.zeros(own.heads), axes=Axes((), ("heads",)))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """S [B N 2R Hv+1] in float32, whatever the length."""
        heads, features, _ = self.projection.get_value().shape
        return random_feature_state(batch, heads, features, self.v.weight.shape[-1])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x, gate = context.clear(x), None
        if self.gated:
            gate = self.gate(x).astype(jnp.promote_types(x.dtype, jnp.float32))
            gate = gate + self.gate_bias.get_value()[None, None]
        y, state = random_feature_attention(
            self.q(x),
            self.k(x),
            self.v(x),
            self.projection.get_value() * self.sigma.get_value()[:, None],
            gate,
            positions=context.positions,
            segments=context.segments,
            state=state,
            chunk=self.chunk,
        )
        return self.o(y), state, {}

    @classmethod
    def features(cls, config: StackConfig) -> int:
        """Features of a head's query or key: a sine and a cosine of each projection."""
        return 2 * config.rfa.features

    @classmethod
    def causal_flops(cls, config: StackConfig, B: int, T: int) -> Flops:
        """FLOPs of a decoder's sums as written."""
        if not config.rfa.gated:
            return super().causal_flops(config, B, T)
        heads, features, value_dim = cls._sizes(config)
        return gated_flops(B, T, heads, features, value_dim + 1, config.rfa.chunk)

    @classmethod
    def feature_flops(cls, config: StackConfig, tokens: int) -> Flops:
        """FLOPs of projecting queries and keys; sigma's gradient passes through the projection."""
        heads, features, head_dim = cls._sizes(config)
        forward = 2 * tokens * heads * features * head_dim
        return Flops(forward, 2 * forward)
