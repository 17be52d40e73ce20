"""Attention to blocks that smoothed queries and keys predict."""

from typing import Any, ClassVar

import jax

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.mixers.attention import Attention
from effjax.models.mixers.gathered import WholeRows, to_heads
from effjax.ops.accounting import Flops
from effjax.ops.attention.predictable import predictable_attention, predictable_flops


class PredictableAttention(WholeRows, Attention):
    """Attention's own parameters, read at the blocks that means, or Fourier filters, foretell.

    Predictions are made of whole documents: for encoders. They are made before positions rotate
    queries and keys, whose means the rotation would wash out.

    Source: Zhuang et al. 2022, Long-range Sequence Modeling with Predictable Sparse Attention,
    https://aclanthology.org/2022.acl-long.19; without its learned estimator
    """

    kind: ClassVar[Kind] = "predictable"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.section = config.predictable

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        x, own = context.clear(x), self.section
        q = self.q(x)
        k, v = (to_heads(w(x), q.shape[2]) for w in (self.k, self.v))
        y = predictable_attention(
            self.position.rotate(q, context.positions),
            self.position.rotate(k, context.positions),
            v,
            hidden=(q, k),
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            block=own.block,
            keep=own.keep,
            frequencies=own.frequencies,
            bias=self.position.bias(),
        )
        return self.o(y), state, {}

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        N, H, own = config.attention.heads, config.head_dim("attention"), config.predictable
        return predictable_flops(
            B,
            T,
            N,
            H,
            block=own.block,
            keep=own.keep,
            frequencies=own.frequencies,
            aligned=aligned,
        )
