"""SMYRF's attention: balanced clusters of queries and keys."""

from typing import Any, ClassVar

import jax

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.kinds import Kind
from effjax.models.mixers.attention import Attention
from effjax.models.mixers.gathered import WholeRows, to_heads
from effjax.ops.accounting import Flops
from effjax.ops.attention.smyrf import smyrf_attention, smyrf_flops
from effjax.weights import Axes


class SmyrfAttention(WholeRows, Attention):
    """Attention's own parameters, read within clusters: it may take the place of trained attention.

    Projections are drawn once, when the model is built, and are constants; the paper draws them
    anew in every pass. Clusters are made of all tokens: for encoders.

    Source: Daras et al. 2020, SMYRF, section 3, https://arxiv.org/abs/2010.05315
    """

    kind: ClassVar[Kind] = "smyrf"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.size = config.smyrf.size
        shape = (config.attention.heads, config.head_dim("attention") + 2, config.smyrf.rounds)
        self.projections = Constant(
            jax.random.normal(rngs(), shape), axes=Axes((), ("heads", "state", "rank"))
        )

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        x = context.clear(x)
        q, k = (self.position.rotate(w(x), context.positions) for w in (self.q, self.k))
        y = smyrf_attention(
            q,
            to_heads(k, q.shape[2]),
            to_heads(self.v(x), q.shape[2]),
            self.projections.get_value(),
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
            size=self.size,
            bias=self.position.bias(),
        )
        return self.o(y), state, {}

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        N, H, own = config.attention.heads, config.head_dim("attention"), config.smyrf
        return smyrf_flops(B, T, N, H, own.rounds, size=own.size, aligned=aligned)
