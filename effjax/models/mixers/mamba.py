"""Mamba: a state space whose step, input and output each token chooses, behind a convolution."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.convolution.short import short_convolution, short_state
from effjax.ops.recurrence.selective_scan import (
    exact_selective_scan_flops,
    selective_scan,
    selective_scan_flops,
    selective_state,
)
from effjax.weights import Axes, Tree

CHANNELS = Axes((), ("channels",))


class Mamba(nnx.Module):
    """o(selective_scan(u) * swish(gate)), u = swish(convolution(x)); dt, b, c are made from u.

    dt = softplus(W W' u + bias) is of low rank. As in the paper's code, rates begin as 1 ... P in
    every channel, steps log-uniform in [dt_min, dt_max], the skip as 1, the filter and its bias
    uniform within 1 / sqrt(taps), and dt's second matrix with the spread of a uniform one within
    1 / sqrt(rank). No projection has a bias.

    Source: Gu and Dao 2023, sections 3.4 and 3.6, https://arxiv.org/abs/2312.00752; starts from
    https://github.com/state-spaces/mamba (`modules/mamba_simple.py`)
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, (channels, states) = config.mamba, _sizes(config)
        self.piece = own.piece
        width, inner = (("embed", config.width),), (("channels", channels),)
        state, rank = (("state", states),), (("rank", own.rank or -(-config.width // 16)),)
        self.x = Dense("btd,di->bti", width, inner, rngs)
        self.gate = Dense("btd,di->bti", width, inner, rngs)
        self.b = Dense("bti,ip->btp", inner, state, rngs)
        self.c = Dense("bti,ip->btp", inner, state, rngs)
        self.dt_down = Dense("bti,ir->btr", inner, rank, rngs)
        self.dt_up = Dense("btr,ri->bti", rank, inner, rngs, gain=3**-0.5)
        self.o = Dense("bti,id->btd", inner, width, rngs, gain=config.residual_gain)
        reach = own.taps**-0.5
        taps = jax.random.uniform(rngs(), (channels, own.taps), minval=-reach, maxval=reach)
        self.filter = nnx.Param(taps, axes=Axes((), ("channels", "tap")))
        bias = jax.random.uniform(rngs(), (channels,), minval=-reach, maxval=reach)
        self.filter_bias = nnx.Param(bias, axes=CHANNELS)
        low, high = math.log(own.dt_min), math.log(own.dt_max)
        dt = jnp.exp(jax.random.uniform(rngs(), (channels,), minval=low, maxval=high))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=CHANNELS)  # softplus gives dt
        rates = jnp.broadcast_to(jnp.arange(1.0, states + 1)[None], (channels, states))
        self.a_log = nnx.Param(jnp.log(rates), axes=Axes((), ("channels", "state")))
        self.skip = nnx.Param(jnp.ones(channels), axes=CHANNELS)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """h [B P D] and the convolution's last inputs [B W-1 D] in float32, of any length."""
        channels, taps = self.filter.get_value().shape
        states = self.a_log.get_value().shape[-1]
        return short_state(batch, channels, taps) | selective_state(batch, channels, states)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        where = {"positions": context.positions, "segments": context.segments}
        u, inputs = short_convolution(
            self.x(x),
            self.filter.get_value(),
            self.filter_bias.get_value(),
            **where,
            state=state,
            aligned=context.aligned,
        )
        u = jax.nn.silu(u)
        dt = self.dt_up(self.dt_down(u))
        bias = self.dt_bias.get_value().astype(jnp.promote_types(dt.dtype, jnp.float32))
        y, h = selective_scan(
            u,
            jax.nn.softplus(dt + bias[None, None]),
            self.b(u),
            self.c(u),
            a_log=self.a_log.get_value(),
            skip=self.skip.get_value(),
            **where,
            state=state,
            piece=self.piece,
        )
        after = None if inputs is None or h is None else inputs | h
        return self.o(y * jax.nn.silu(self.gate(x))), after, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row: reading the states, the one product."""
        return exact_selective_scan_flops(1, T, *_sizes(config))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        return selective_scan_flops(B, T, *_sizes(config), config.mamba.piece)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token, whatever came before."""
        return cls.program_flops(config, 1, 1, aligned=False).forward


def _sizes(config: StackConfig) -> tuple[int, int]:
    """Channels, and the states of each."""
    return config.mamba.expand * config.width, config.mamba.states
