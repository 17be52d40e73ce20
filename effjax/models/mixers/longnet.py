"""Dilated attention as a mixer (see `effjax.ops.attention.longnet`)."""

from typing import Any, ClassVar

import jax

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.mixers.attention import Attention
from effjax.ops.accounting import Flops
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.longnet import (
    Counted,
    longnet_exact_flops,
    longnet_flops,
    longnet_row,
)
from effjax.ops.attention.patterns import Causal, Full, Pattern


class LongNetAttention(Attention):
    """Attention within segments of several lengths, the longer the more thinly, mixed.

    Whole rows of one document take the linear form; packed and padded ones, and a cache, the
    engine's, in which a key counts once for each part that reads it.
    """

    kind: ClassVar[Kind] = "longnet"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.own = config.longnet
        self.within = _within(config)

    def bias(self, scheme: Any = None) -> Bias | None:
        return Counted(self.own, super().bias(scheme))

    def __call__(self, x: jax.Array, context: Context, state: Any = None) -> tuple:
        scheme = self.position.drawn(context.key, x.shape[1])
        if state is not None or not context.aligned or scheme.rotates_cache:
            return super().__call__(x, context, state)
        q, k = (scheme.rotate(part(x), context.positions) for part in (self.q, self.k))
        bias = super().bias(scheme)
        y = longnet_row(q, k, self.v(x), pattern=self.own, within=self.within, bias=bias)
        return self.o(y), None, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        N, H = config.attention.heads, config.head_dim("attention")
        return longnet_exact_flops(config.longnet, _within(config), 1, T, N, H)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        if not aligned:
            return super().program_flops(config, B, T, aligned)
        N, H = config.attention.heads, config.head_dim("attention")
        return longnet_flops(config.longnet, _within(config), B, T, N, H)


def _within(config: StackConfig) -> Pattern:
    return Causal() if config.causal else Full()
