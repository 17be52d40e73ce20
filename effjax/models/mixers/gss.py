"""A gated state space: DSS in a few channels, between two projections, times a gate."""

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
from effjax.ops.recurrence.dss import dss_exp
from effjax.ops.recurrence.modes import Modes
from effjax.ops.recurrence.state_space import run_state_space, state_space_state
from effjax.weights import Axes, Tree

SHARED = Axes((), ("state",))
WEIGHTS = Axes((), ("value", "state"))


class GatedStateSpace(nnx.Module):
    """GSS: out(widen(dss(gelu(narrow(x)))) * gelu(gate(x))), without a step size.

    DSS_exp with dt = 1, modes -exp(N(0, 1)) + i exp(N(0, 1)) that all channels share, and standard
    normals as weights and skips, as in the paper: random starts do as well as HiPPO's here.

    Source: Mehta et al. 2022, "Long Range Language Modeling via Gated State Spaces", section 3.2
    and figure 2, https://arxiv.org/abs/2206.13947
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own = config.gss
        width = (("embed", config.width),)
        narrow, wide = (("value", _narrow(config)),), (("channels", _wide(config)),)
        self.chunk = own.chunk
        self.gate = Dense("btd,df->btf", width, wide, rngs)
        self.narrow = Dense("btd,dh->bth", width, narrow, rngs)
        self.widen = Dense("bth,hf->btf", narrow, wide, rngs)
        self.out = Dense("btf,fd->btd", wide, width, rngs, gain=config.residual_gain)
        a = jax.random.normal(rngs(), (2, own.states))
        w = jax.random.normal(rngs(), (2, _narrow(config), own.states))
        skip = jax.random.normal(rngs(), (_narrow(config),))
        self.log_a_real = nnx.Param(a[0], axes=SHARED)
        self.log_a_imag = nnx.Param(a[1], axes=SHARED)
        self.w_real = nnx.Param(w[0], axes=WEIGHTS)
        self.w_imag = nnx.Param(w[1], axes=WEIGHTS)
        self.skip = nnx.Param(skip, axes=Axes((), ("value",)))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The modes of the narrow channels in float32, whatever the length."""
        return state_space_state(batch, *self.w_real.get_value().shape)

    def modes(self, dtype: Any) -> Modes:
        """The discretised system."""
        names = ("log_a_real", "log_a_imag", "w_real", "w_imag", "skip")
        dtype = jnp.promote_types(dtype, jnp.float32)
        given = {name: getattr(self, name).get_value().astype(dtype) for name in names}
        frequency = jnp.exp(given.pop("log_a_imag"))
        return dss_exp(log_dt=jnp.zeros_like(given["skip"]), a_imag=frequency, **given)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        y, state = run_state_space(
            jax.nn.gelu(self.narrow(x)),
            self.modes(x.dtype),
            positions=context.positions,
            segments=context.segments,
            state=state,
            chunk=self.chunk,
            aligned=context.aligned,
        )
        return self.out(self.widen(y) * jax.nn.gelu(self.gate(x))), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return exact_state_space_flops(1, T, _narrow(config), config.gss.states, config.gss.chunk)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own = config.gss
        return state_space_flops(B, T, _narrow(config), own.states, own.chunk, aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None: a generated token moves the memory without a product, by element-wise work."""
        return 0


def _narrow(config: StackConfig) -> int:
    return config.gss.narrow or max(1, config.width // 4)


def _wide(config: StackConfig) -> int:
    return config.gss.wide or 2 * config.width
