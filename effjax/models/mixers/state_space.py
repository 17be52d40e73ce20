"""A diagonal state space per channel, then a gated linear unit across channels."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.accounting import exact_state_space_flops, state_space_flops
from effjax.ops.recurrence.s4d import log_time_steps, s4d_inv, s4d_legs, s4d_lin
from effjax.ops.recurrence.state_space import diagonal_state_space, state_space_state
from effjax.weights import Axes, Tree

CHANNELS = Axes((), ("embed",))
MODES = Axes((), ("embed", "state"))
STARTS = {"lin": s4d_lin, "inv": s4d_inv, "legs": s4d_legs}


class StateSpace(nnx.Module):
    """S4D: glu(mix(gelu(state_space(x)))), every channel with its own modes and step size.

    Modes start as S4D-Lin, or -Inv or -LegS where the config says so, read-outs C as standard
    complex normals, the skip weights as standard normals, and step sizes log-uniformly in [dt_min,
    dt_max], as in the paper.

    Source: Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space
    Models", sections 3 and 4, https://arxiv.org/abs/2206.11893
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, width = config.state_space, config.width
        self.chunk = own.chunk
        log_a_real, a_imag = STARTS[own.start](width, own.states)
        c = jax.random.normal(rngs(), (2, width, own.states)) * 0.5**0.5
        dt = log_time_steps(rngs(), width, own.dt_min, own.dt_max)
        self.log_dt = nnx.Param(dt, axes=CHANNELS)
        self.log_a_real = nnx.Param(log_a_real, axes=MODES)
        self.a_imag = nnx.Param(a_imag, axes=MODES)
        self.c_real = nnx.Param(c[0], axes=MODES)
        self.c_imag = nnx.Param(c[1], axes=MODES)
        self.skip = nnx.Param(jax.random.normal(rngs(), (width,)), axes=CHANNELS)
        inputs, outputs = (("embed", width),), (("gate", 2), ("embed", width))
        self.mix = Dense("btd,dge->btge", inputs, outputs, rngs, gain=config.residual_gain)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The modes [B D P] in float32, whatever the length."""
        return state_space_state(batch, *self.a_imag.get_value().shape)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        y, state = diagonal_state_space(
            x,
            log_dt=self.log_dt.get_value(),
            log_a_real=self.log_a_real.get_value(),
            a_imag=self.a_imag.get_value(),
            c_real=self.c_real.get_value(),
            c_imag=self.c_imag.get_value(),
            skip=self.skip.get_value(),
            positions=context.positions,
            segments=context.segments,
            state=state,
            chunk=self.chunk,
            aligned=context.aligned,
        )
        mixed = self.mix(jax.nn.gelu(y))
        return mixed[:, :, 0] * jax.nn.sigmoid(mixed[:, :, 1]), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        own = config.state_space
        return exact_state_space_flops(1, T, config.width, own.states, own.chunk)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own = config.state_space
        return state_space_flops(B, T, config.width, own.states, own.chunk, aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None: a generated token moves the memory without a product, by element-wise work."""
        return 0
