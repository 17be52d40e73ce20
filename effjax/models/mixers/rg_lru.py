"""Griffin's and Hawk's recurrent block: a gated linear recurrence, one number per channel."""

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
from effjax.ops.recurrence.rg_lru import rg_lru, rg_lru_state, ring_decay
from effjax.weights import Axes, Tree

CHANNELS = Axes((), ("channels",))
FILTER_VARIANCE = 0.01
"""Of the filter's start, divided by its taps. Source: `recurrentgemma/jax/layers.py`,
https://github.com/google-deepmind/recurrentgemma
"""


class RGLRU(nnx.Module):
    """o(rg_lru(u) * gelu(gate(x))), u = convolution(x); both gates of the unit are made from u.

    The gates' matrices are block-diagonal: a gate reads the channels of its own block. Every
    projection has a bias, which begins at 0; a channel's factor begins on the ring between 0.9 and
    0.999, the filter small.

    Source: De et al. 2024, Griffin, sections 2.3 and 2.4 and appendix A,
    https://arxiv.org/abs/2402.19427; starts from `recurrentgemma/jax` of
    https://github.com/google-deepmind/recurrentgemma
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, channels = config.rg_lru, _channels(config)
        width, inner = (("embed", config.width),), (("channels", channels),)
        blocks, block = (("blocks", own.blocks),), (("block", channels // own.blocks),)
        self.x = Dense("btd,di->bti", width, inner, rngs)
        self.gate = Dense("btd,di->bti", width, inner, rngs)
        self.recurrence_gate = Dense("btni,nij->btnj", block, block, rngs, batch=blocks)
        self.input_gate = Dense("btni,nij->btnj", block, block, rngs, batch=blocks)
        self.o = Dense("bti,id->btd", inner, width, rngs, gain=config.residual_gain)
        nothing = jnp.zeros(channels)
        self.x_bias = nnx.Param(nothing, axes=CHANNELS)
        self.gate_bias = nnx.Param(nothing, axes=CHANNELS)
        self.recurrence_bias = nnx.Param(nothing, axes=CHANNELS)
        self.input_bias = nnx.Param(nothing, axes=CHANNELS)
        self.o_bias = nnx.Param(jnp.zeros(config.width), axes=Axes((), ("embed",)))
        spread = (FILTER_VARIANCE / own.taps) ** 0.5
        taps = spread * jax.random.normal(rngs(), (channels, own.taps))
        self.filter = nnx.Param(taps, axes=Axes((), ("channels", "tap")))
        self.filter_bias = nnx.Param(nothing, axes=CHANNELS)
        self.decay = nnx.Param(ring_decay(rngs(), channels), axes=CHANNELS)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """h [B D] and the convolution's last inputs [B W-1 D] in float32, whatever the length."""
        channels, taps = self.filter.get_value().shape
        return short_state(batch, channels, taps) | rg_lru_state(batch, channels)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        u, inputs = short_convolution(
            _shifted(self.x(x), self.x_bias),
            self.filter.get_value(),
            self.filter_bias.get_value(),
            positions=context.positions,
            segments=context.segments,
            state=state,
            aligned=context.aligned,
        )
        blocks = u.reshape(*u.shape[:2], *self.input_gate.weight.shape[:2])
        r = _shifted(self.recurrence_gate(blocks).reshape(u.shape), self.recurrence_bias)
        i = _shifted(self.input_gate(blocks).reshape(u.shape), self.input_bias)
        y, h = rg_lru(
            u,
            r,
            i,
            self.decay.get_value(),
            positions=context.positions,
            segments=context.segments,
            state=state,
        )
        y = y * jax.nn.gelu(_shifted(self.gate(x), self.gate_bias))
        after = None if inputs is None or h is None else inputs | h
        return _shifted(self.o(y), self.o_bias), after, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """None: the recurrence makes no product; its gates are weights, counted as such."""
        return Flops(0, 0)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """None, as written too."""
        return Flops(0, 0)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None."""
        return 0


def _channels(config: StackConfig) -> int:
    """Channels of the unit."""
    return config.rg_lru.channels or config.width


def _shifted(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x + bias in x's dtype."""
    return x + bias.get_value().astype(x.dtype)[None, None]
