"""The damped moving average as a mixer (see `effjax.ops.recurrence.ema`)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.ema import (
    damped_ema,
    ema_flops,
    ema_state,
    exact_ema_flops,
    two_sided_ema,
)
from effjax.weights import Axes, Tree

MODES = Axes((), ("direction", "embed", "state"))


class MovingAverage(nnx.Module):
    """silu(ema(x)): every channel is averaged over what came before, on its own.

    Between tokens alone: channels meet in the feed-forward network behind it, or in the gated
    attention that is built on it (`mega`). Where it may look ahead, it sums an average of each
    side. alpha and delta are sigmoids of what is learned; all starts as in the released code.

    Source: Ma et al. 2022, Mega, section 3, https://arxiv.org/abs/2209.10655, and its code,
    https://github.com/facebookresearch/mega (`MultiHeadEMA`), which has the silu.
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, width = config.ema, config.width
        self.chunk = own.chunk
        shape = (_sides(config), width, own.states)
        draw = lambda: jax.random.normal(rngs(), shape)  # noqa: E731
        signs = jnp.where(jnp.arange(own.states) % 2 == 0, 1.0, -1.0)[None, None]
        self.alpha = nnx.Param(0.2 * draw(), axes=MODES)
        self.delta = nnx.Param(0.2 * draw(), axes=MODES)
        self.beta = nnx.Param(signs + 0.02 * draw(), axes=MODES)
        self.eta = nnx.Param(draw(), axes=MODES)
        self.omega = nnx.Param(jax.random.normal(rngs(), (width,)), axes=Axes((), ("embed",)))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The modes [B D P] in float32, whatever the length."""
        return ema_state(batch, *self.eta.get_value().shape[1:])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        modes: dict[str, Any] = {
            "alpha": jax.nn.sigmoid(self.alpha.get_value()),
            "delta": jax.nn.sigmoid(self.delta.get_value()),
            "beta": self.beta.get_value(),
            "eta": self.eta.get_value(),
        }
        options: dict[str, Any] = {
            "omega": self.omega.get_value(),
            "positions": context.positions,
            "segments": context.segments,
            "chunk": self.chunk,
            "aligned": context.aligned,
        }
        if modes["eta"].shape[0] == 2:
            if state is not None:
                raise ValueError("a moving average of both sides knows what follows, not a state")
            return jax.nn.silu(two_sided_ema(x, **modes, **options)), None, {}
        y, state = damped_ema(x, **{k: v[0] for k, v in modes.items()}, **options, state=state)
        return jax.nn.silu(y), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        own = exact_ema_flops(1, T, config.width, config.ema.states, config.ema.chunk)
        return Flops(*(_sides(config) * part for part in own))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        own = config.ema
        each = ema_flops(B, T, config.width, own.states, own.chunk, aligned=aligned)
        return Flops(*(_sides(config) * part for part in each))

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None: a generated token moves the memory without a product, by element-wise work."""
        return 0


def _sides(config: StackConfig) -> int:
    return 1 if config.causal else 2
