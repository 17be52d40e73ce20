"""The plain two-layer network of a transformer block."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.feedforward.gelu import gelu_feedforward


class DenseFeedForward(nnx.Module):
    """down(gelu(up(x))), with GELU in its tanh form."""

    carries: ClassVar[bool] = False

    def __init__(self, config: StackConfig, rngs: Keys):
        width, hidden = (("embed", config.width),), (("mlp", config.hidden),)
        self.up = Dense("btd,df->btf", width, hidden, rngs)
        self.down = Dense("btf,fd->btd", hidden, width, rngs, gain=config.residual_gain)

    def init_state(self, *sizes: Any) -> None:
        """None: a token is treated alone."""

    def __call__(
        self, x: jax.Array, context: Context, state: None = None
    ) -> tuple[jax.Array, None, dict]:
        return gelu_feedforward(context.clear(x), self.up.weight, self.down.weight), None, {}
