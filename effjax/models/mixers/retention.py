"""Retention: attention's parallel training with a recurrence's constant state."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.normalization import rms_norm
from effjax.ops.position.rope import rope
from effjax.ops.recurrence.accounting import exact_retention_flops, retention_flops
from effjax.ops.recurrence.retention import retention, retention_state
from effjax.weights import Axes, Tree


class Retention(nnx.Module):
    """Multi-scale retention: o(swish(gate(x)) * norm(retention(q, k, v))).

    Keys are scaled by H^-0.5, queries and keys rotated, each head's output normalised on its own,
    and head n decays by `1 - 2^(-5 - n)` a position, as in the paper; rotations are the plain
    rotary ones, since the decay already takes the place of xPos's.

    Source: Sun et al. 2023, Retentive Network, sections 2.1-2.3, https://arxiv.org/abs/2307.08621
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own = config.retention
        heads, key_dim, value_dim = _sizes(config)
        self.base, self.chunk = own.rope_base, own.chunk
        width = (("embed", config.width),)
        keys = (("heads", heads), ("head", key_dim))
        values = (("heads", heads), ("value", value_dim))
        self.q = Dense("btd,dnh->btnh", width, keys, rngs)
        self.k = Dense("btd,dnh->btnh", width, keys, rngs)
        self.v = Dense("btd,dnh->btnh", width, values, rngs)
        self.gate = Dense("btd,dnh->btnh", width, values, rngs)
        self.o = Dense("btnh,nhd->btd", values, width, rngs, gain=config.residual_gain)
        decay = 1 - 2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))
        self.log_decay = Constant(jnp.log(decay), axes=Axes((), ("heads",)))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """S [B N H Hv] in float32, whatever the length."""
        heads, key_dim = self.k.weight.shape[-2:]
        return retention_state(batch, heads, key_dim, self.v.weight.shape[-1])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        q = rope(self.q(x), context.positions, base=self.base)
        k = rope(self.k(x), context.positions, base=self.base)
        y, state = retention(
            q,
            k * k.shape[-1] ** -0.5,
            self.v(x),
            self.log_decay.get_value(),
            positions=context.positions,
            segments=context.segments,
            state=state,
            chunk=self.chunk,
        )
        y = rms_norm(y, jnp.ones(y.shape[-1]))
        return self.o(jax.nn.silu(self.gate(x)) * y), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return exact_retention_flops(1, T, *_sizes(config), config.retention.chunk)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        return retention_flops(B, T, *_sizes(config), config.retention.chunk)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token, whatever came before."""
        return cls.program_flops(config, 1, 1, aligned=False).forward


def _sizes(config: StackConfig) -> tuple[int, int, int]:
    """Heads, and the sizes of their keys and values."""
    key_dim = config.head_dim("retention")
    return config.retention.heads, key_dim, config.retention.value_dim or key_dim
