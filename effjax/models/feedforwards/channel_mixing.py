"""RWKV's channel mixing: a feed-forward network that sees the token before."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.recurrence.token_shift import token_shift, token_shift_state
from effjax.weights import Axes, Tree

EMBED = Axes((), ("embed",))


class ChannelMixing(nnx.Module):
    """sigmoid(receptance(x_r)) * value(relu(key(x_k))^2), x_i = mu_i x_t + (1 - mu_i) x_{t-1}.

    x_{t-1} is the latest live token before t of its document, the state of this network. Both mu
    begin at (channel / width)^(1/2), RWKV-4's value for a layer of mid depth: a block does not know
    how deep it stands. Its zero weights at the start are the residual gain's here.

    Source: Peng et al. 2023, section 3.1.3 and appendix E, https://arxiv.org/abs/2305.13048; start
    as in github.com/BlinkDL/RWKV-LM, RWKV-v4/src/model.py
    """

    carries: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        width, hidden = (("embed", config.width),), (("mlp", config.hidden),)
        self.key = Dense("btd,df->btf", width, hidden, rngs)
        self.value = Dense("btf,fd->btd", hidden, width, rngs, gain=config.residual_gain)
        self.receptance = Dense("btd,de->bte", width, width, rngs)
        mu = (jnp.arange(config.width) / config.width) ** 0.5
        self.mu_key, self.mu_receptance = nnx.Param(mu, axes=EMBED), nnx.Param(mu, axes=EMBED)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The latest token [B D], in float32."""
        return token_shift_state(batch, self.mu_key.get_value().shape[0])

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        before, state = token_shift(
            x,
            positions=context.positions,
            segments=context.segments,
            state=state,
            aligned=context.aligned,
        )
        key = self.key(mixed(x, before, self.mu_key.get_value()))
        gate = self.receptance(mixed(x, before, self.mu_receptance.get_value()))
        return jax.nn.sigmoid(gate) * self.value(jnp.square(jax.nn.relu(key))), state, {}


def mixed(x: jax.Array, before: jax.Array, mu: jax.Array) -> jax.Array:
    """mu x + (1 - mu) before, channel by channel [B T D]."""
    mu = mu.astype(x.dtype)[None, None]
    return mu * x + (1 - mu) * before
