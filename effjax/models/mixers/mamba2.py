"""Mamba-2: a memory per head whose rate of forgetting each token decides."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.models.mixers.pieces import in_pieces
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.accounting import exact_gated_flops, mamba2_flops
from effjax.ops.recurrence.mamba2 import Mamba2Inputs, Mamba2Weights, mamba2, mamba2_state
from effjax.weights import Axes, Tree

SEGMENT = 256
"""Tokens of a piece of a long row in training; see `experiments/bench/recurrence.py`."""


class Mamba2(nnx.Module):
    """o(norm(gated_recurrence(convolution(x)) * swish(gate(x)))), with the skip D x.

    Heads begin with rates of forgetting uniform in [1, 16] and steps log-uniform in [dt_min,
    dt_max], filters uniform within 1 / sqrt(taps), as in the paper's code; its biases of the
    filters begin at 0. The projections have no biases. Rows that are longer than a piece are run
    piece by piece where no state is asked for.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 7, https://arxiv.org/abs/2405.21060;
    starts from https://github.com/state-spaces/mamba (`modules/mamba2.py`)
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, (N, P, H) = config.mamba2, _sizes(config)
        self.chunk = own.chunk
        width = (("embed", config.width),)
        heads, shared = (("heads", N), ("head", H)), (("groups", own.groups), ("state", P))
        self.gate = Dense("btd,dnh->btnh", width, heads, rngs)
        self.x = Dense("btd,dnh->btnh", width, heads, rngs)
        self.b = Dense("btd,dgp->btgp", width, shared, rngs)
        self.c = Dense("btd,dgp->btgp", width, shared, rngs)
        self.dt = Dense("btd,dn->btn", width, heads[:1], rngs)
        self.o = Dense("btnh,nhd->btd", heads, width, rngs, gain=config.residual_gain)
        reach = own.taps**-0.5
        for name, (shape, names) in {
            "x": ((N, H), ("heads", "head")),
            "b": ((own.groups, P), ("groups", "state")),
            "c": ((own.groups, P), ("groups", "state")),
        }.items():
            taps = jax.random.uniform(rngs(), (*shape, own.taps), minval=-reach, maxval=reach)
            setattr(self, f"filter_{name}", nnx.Param(taps, axes=Axes((), (*names, "tap"))))
            setattr(self, f"bias_{name}", nnx.Param(jnp.zeros(shape), axes=Axes((), names)))
        low, high = jnp.log(own.dt_min), jnp.log(own.dt_max)
        dt = jnp.exp(jax.random.uniform(rngs(), (N,), minval=low, maxval=high))
        each = Axes((), ("heads",))
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=each)  # softplus gives dt
        rates = jax.random.uniform(rngs(), (N,), minval=1.0, maxval=16.0)
        self.log_a = nnx.Param(jnp.log(rates), axes=each)
        self.skip = nnx.Param(jnp.ones(N), axes=each)
        self.scale = nnx.Param(jnp.ones((N, H)), axes=Axes((), ("heads", "head")))

    def _weights(self) -> Mamba2Weights:
        return Mamba2Weights(*(getattr(self, name).get_value() for name in Mamba2Weights._fields))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """S [B N P H] and the convolution's last inputs in float32, whatever the length."""
        return mamba2_state(self._weights(), batch)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        if state is not None or x.shape[1] <= SEGMENT:
            y, state = self._mixed(x, context, state)
            return y, state, {}
        empty = mamba2_state(self._weights(), x.shape[0])
        return in_pieces(self._mixed, x, context, empty, SEGMENT)[0], None, {}

    def _mixed(self, x: jax.Array, context: Context, state: Tree) -> tuple[jax.Array, Tree]:
        """The layer on one stretch of tokens."""
        x = context.clear(x)
        z, x_, b, c, dt = (layer(x) for layer in (self.gate, self.x, self.b, self.c, self.dt))
        y, state = mamba2(
            Mamba2Inputs(z, x_, b, c, dt, context.positions, context.segments),
            self._weights(),
            state=state,
            chunk=self.chunk,
            aligned=context.aligned,
        )
        return self.o(y), state

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        own = config.mamba2
        return exact_gated_flops(1, T, *_sizes(config), own.chunk, groups=own.groups)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows; of pieces, with what is computed anew."""
        own, (N, P, H) = config.mamba2, _sizes(config)
        pieces = [SEGMENT] * (T // SEGMENT) + [T % SEGMENT] * (T % SEGMENT > 0)
        parts = [mamba2_flops(B, t, N, P, H, own.chunk, groups=own.groups) for t in pieces]
        forward, backward = (sum(part[i] for part in parts) for i in range(2))
        if T > SEGMENT:
            projected = config.width * (2 * N * H + 2 * own.groups * P + N)
            backward += forward + 2 * B * T * projected
        return Flops(forward, backward)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token, whatever came before."""
        return cls.program_flops(config, 1, 1, aligned=False).forward


def _sizes(config: StackConfig) -> tuple[int, int, int]:
    """Heads, and the sizes of their keys (states) and values."""
    own = config.mamba2
    return own.heads, own.states, own.head_dim or 2 * config.width // own.heads
