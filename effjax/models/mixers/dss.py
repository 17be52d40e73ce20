"""DSS: a diagonal state space of shared modes, then a gated linear unit across channels."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.accounting import exact_state_space_flops, state_space_flops
from effjax.ops.recurrence.dss import dss_exp, dss_softmax
from effjax.ops.recurrence.modes import Modes
from effjax.ops.recurrence.s4d import log_time_steps, s4d_legs
from effjax.ops.recurrence.state_space import run_state_space, state_space_state
from effjax.weights import Axes, Tree

CHANNELS = Axes((), ("embed",))
SHARED = Axes((), ("state",))
MODES = Axes((), ("embed", "state"))
WEIGHTS = ("log_dt", "log_a_real", "a_imag", "w_real", "w_imag", "skip")


class DSS(nnx.Module):
    """DSS: glu(mix(gelu(dss(x)))); channels share modes and have weights and steps of their own.

    The modes start as those of HiPPO-LegS's skew-symmetric part less 1/2, weights and skips as
    standard normals, and step sizes log-uniformly in [dt_min, dt_max], as in the paper.

    Source: Gupta et al. 2022, "Diagonal State Spaces are as Effective as Structured State Spaces",
    sections 3 and 4, https://arxiv.org/abs/2203.14343
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, width = config.dss, config.width
        self.kernel, self.length, self.chunk = own.kernel, own.length, own.chunk
        log_a_real, a_imag = (x[0] for x in s4d_legs(1, own.states))
        w = jax.random.normal(rngs(), (2, width, own.states))
        dt = log_time_steps(rngs(), width, own.dt_min, own.dt_max)
        self.log_dt = nnx.Param(dt, axes=CHANNELS)
        self.log_a_real = nnx.Param(log_a_real, axes=SHARED)
        self.a_imag = nnx.Param(a_imag, axes=SHARED)
        self.w_real = nnx.Param(w[0], axes=MODES)
        self.w_imag = nnx.Param(w[1], axes=MODES)
        self.skip = nnx.Param(jax.random.normal(rngs(), (width,)), axes=CHANNELS)
        inputs, outputs = (("embed", width),), (("gate", 2), ("embed", width))
        self.mix = Dense("btd,dge->btge", inputs, outputs, rngs, gain=config.residual_gain)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The modes [B D P] in float32, whatever the length."""
        return state_space_state(batch, *self.w_real.get_value().shape)

    def modes(self, dtype: Any) -> Modes:
        """The discretised system."""
        dtype = jnp.promote_types(dtype, jnp.float32)
        weights = {name: getattr(self, name).get_value().astype(dtype) for name in WEIGHTS}
        if self.kernel == "softmax":
            return dss_softmax(self.length, **weights)
        return dss_exp(**weights)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        y, state = run_state_space(
            x,
            self.modes(x.dtype),
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
        return exact_state_space_flops(1, T, config.width, config.dss.states, config.dss.chunk)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own = config.dss
        return state_space_flops(B, T, config.width, own.states, own.chunk, aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None: a generated token moves the memory without a product, by element-wise work."""
        return 0
