"""Linear attention: a kernel of features in the place of soft-max, with a memory of one size."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.accounting import exact_gated_flops
from effjax.ops.recurrence.linear_attention import (
    exact_two_sided_flops,
    kernel_sums_flops,
    linear_attention,
    linear_attention_state,
    two_sided_flops,
    two_sided_linear_attention,
)
from effjax.weights import Tree


class LinearAttention(nnx.Module):
    """o(linear_attention(q(x), k(x), v(x))) with features elu + 1, as in the paper.

    A decoder's tokens read what is behind them, an encoder's all of their document. Positions are
    not read: a model that wants them adds them to its embedding, as the paper's do.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", section 3,
    https://arxiv.org/abs/2006.16236
    """

    kind: ClassVar[Kind] = "linear_attention"
    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, head_dim = getattr(config, self.kind), config.head_dim(self.kind)
        self.causal, self.chunk = config.causal, own.chunk
        width = (("embed", config.width),)
        keys = (("heads", own.heads), ("head", head_dim))
        values = (("heads", own.heads), ("value", head_dim))
        self.q = Dense("btd,dnh->btnh", width, keys, rngs)
        self.k = Dense("btd,dnh->btnh", width, keys, rngs)
        self.v = Dense("btd,dnh->btnh", width, values, rngs)
        self.o = Dense("btnh,nhd->btd", values, width, rngs, gain=config.residual_gain)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """S [B N H Hv+1] in float32, whatever the length."""
        heads, key_dim = self.k.weight.shape[-2:]
        return linear_attention_state(batch, heads, key_dim, self.v.weight.shape[-1])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        heads = self.q(x), self.k(x), self.v(x)
        at = {"positions": context.positions, "segments": context.segments, "chunk": self.chunk}
        if self.causal:
            y, state = linear_attention(*heads, **at, state=state)
        else:
            y = two_sided_linear_attention(*heads, **at, aligned=context.aligned)
        return self.o(y), state, {}

    @classmethod
    def features(cls, config: StackConfig) -> int:
        """Features of a head's query or key."""
        return config.head_dim(cls.kind)

    @classmethod
    def feature_flops(cls, config: StackConfig, tokens: int) -> Flops:
        """FLOPs of making features: none, elu is element-wise."""
        return Flops(0, 0)

    @classmethod
    def causal_flops(cls, config: StackConfig, B: int, T: int) -> Flops:
        """FLOPs of a decoder's sums as written: without gates."""
        return kernel_sums_flops(B, T, *cls._sizes(config), getattr(config, cls.kind).chunk)

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        own, sizes = getattr(config, cls.kind), cls._sizes(config)
        made = cls.feature_flops(config, T)
        N, R, Hv = sizes
        summed = (
            exact_gated_flops(1, T, N, R, Hv + 1, own.chunk)
            if config.causal
            else exact_two_sided_flops(1, T, *sizes)
        )
        return Flops(summed.forward + made.forward, summed.backward + made.backward)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own, sizes = getattr(config, cls.kind), cls._sizes(config)
        made = cls.feature_flops(config, B * T)
        summed = (
            cls.causal_flops(config, B, T)
            if config.causal
            else two_sided_flops(B, T, *sizes, own.chunk, aligned=aligned)
        )
        return Flops(summed.forward + made.forward, summed.backward + made.backward)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token, whatever came before."""
        return cls.program_flops(config, 1, 1, aligned=False).forward

    @classmethod
    def _sizes(cls, config: StackConfig) -> tuple[int, int, int]:
        """Heads, features of each, and the size of its values."""
        own = getattr(config, cls.kind)
        return own.heads, cls.features(config), config.head_dim(cls.kind)
