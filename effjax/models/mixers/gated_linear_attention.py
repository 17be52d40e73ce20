"""Gated linear attention: a memory per head that forgets each channel of its keys on its own."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.normalization import rms_norm
from effjax.ops.recurrence.accounting import exact_gated_flops, gated_channels_flops
from effjax.ops.recurrence.gated import gated_recurrence, gated_state
from effjax.weights import Axes, Tree


class GatedLinearAttention(nnx.Module):
    """o(swish(gate(x)) * norm(gated_recurrence(q, k, v))), gates sigmoid(forget(x))^(1 / tau).

    `forget` is of low rank, with a bias that begins at 0. Keys are scaled by H^-0.5 and each head's
    output normalised on its own by one scale for all heads, by its root mean square as in the
    authors' code; the paper says layer norm, and gives the output gate a bias.

    Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient
    Training", sections 4.1 and 4.4, https://arxiv.org/abs/2312.06635, and its code,
    https://github.com/fla-org/flash-linear-attention (`fla/layers/gla.py`)
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, (N, H, Hv) = config.gated_linear_attention, _sizes(config)
        self.chunk, self.tau = own.chunk, own.tau
        width, rank = (("embed", config.width),), (("rank", own.rank),)
        keys, values = (("heads", N), ("head", H)), (("heads", N), ("value", Hv))
        self.q = Dense("btd,dnh->btnh", width, keys, rngs)
        self.k = Dense("btd,dnh->btnh", width, keys, rngs)
        self.v = Dense("btd,dnh->btnh", width, values, rngs)
        self.gate = Dense("btd,dnh->btnh", width, values, rngs)
        self.forget_down = Dense("btd,dr->btr", width, rank, rngs)
        self.forget_up = Dense("btr,rnh->btnh", rank, keys, rngs)
        self.forget_bias = nnx.Param(jnp.zeros((N, H)), axes=Axes((), ("heads", "head")))
        self.scale = nnx.Param(jnp.ones(Hv), axes=Axes((), ("value",)))
        self.o = Dense("btnh,nhd->btd", values, width, rngs, gain=config.residual_gain)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """S [B N H Hv] in float32, whatever the length."""
        heads, key_dim = self.k.weight.shape[-2:]
        return gated_state(batch, heads, key_dim, self.v.weight.shape[-1])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        k = self.k(x)
        kept = self.forget_up(self.forget_down(x)).astype(jnp.promote_types(x.dtype, jnp.float32))
        kept = kept + self.forget_bias.get_value()[None, None]
        y, state = gated_recurrence(
            self.q(x),
            k * k.shape[-1] ** -0.5,
            self.v(x),
            jax.nn.log_sigmoid(kept) / self.tau,
            positions=context.positions,
            segments=context.segments,
            state=state,
            chunk=self.chunk,
        )
        y = rms_norm(y, self.scale.get_value())
        return self.o(jax.nn.silu(self.gate(x)) * y), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return exact_gated_flops(1, T, *_sizes(config), config.gated_linear_attention.chunk)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        return gated_channels_flops(B, T, *_sizes(config), config.gated_linear_attention.chunk)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token, whatever came before."""
        return cls.program_flops(config, 1, 1, aligned=False).forward


def _sizes(config: StackConfig) -> tuple[int, int, int]:
    """Heads, and the sizes of their keys, by default half as large as values, and values."""
    own, value_dim = config.gated_linear_attention, config.head_dim("gated_linear_attention")
    return own.heads, own.key_dim or max(1, value_dim // 2), value_dim
