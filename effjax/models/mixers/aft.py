"""Attention-free transformers: a query gates an average of values that keys and places weigh."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.recurrence.aft import BASE, aft, aft_state
from effjax.ops.recurrence.aft_biases import Factored, Offsets, aft_flops, exact_aft_flops
from effjax.ops.recurrence.wkv import wkv, wkv_state
from effjax.weights import Axes, Tree


class AFTSimple(nnx.Module):
    """AFT-simple: o(sigmoid(q) * average(k, v)), the average's weights exp(k) and no more.

    Every kind of AFT is this but for its average. The projection o is left out of the paper's
    equations, where AFT takes the place of multi-head attention.

    Source: Zhai et al. 2021, section 3.1, https://arxiv.org/abs/2105.14103
    """

    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        width, channels = (("embed", config.width),), (("channels", self.sizes(config)[1]),)
        self.q = Dense("btd,dc->btc", width, channels, rngs)
        self.v = Dense("btd,dc->btc", width, channels, rngs)
        self.o = Dense("btc,cd->btd", channels, width, rngs, gain=config.residual_gain)
        self.k = self.keys(config, rngs)

    @classmethod
    def sizes(cls, config: StackConfig) -> tuple[int, int, int]:
        """Numbers of keys, of channels, and of products in a bias."""
        return config.width, config.width, 0

    def keys(self, config: StackConfig, rngs: Keys) -> Dense:
        """A key for each channel."""
        width, channels = (("embed", config.width),), (("channels", config.width),)
        return Dense("btd,dc->btc", width, channels, rngs)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """The running sums [B D] in float32, whatever the length."""
        return wkv_state(batch, self.k.weight.shape[-1])

    def average(
        self, k: jax.Array, v: jax.Array, context: Context, state: Tree
    ) -> tuple[jax.Array, Tree]:
        """What the query gates [B T D], and the state after it."""
        none = jnp.zeros(k.shape[-1])
        positions, segments = context.positions, context.segments
        return wkv(k, v, none, positions=positions, segments=segments, state=state)

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        y, state = self.average(self.k(x), self.v(x), context, state)
        return self.o(jax.nn.sigmoid(self.q(x)) * y), state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """None: the average is element-wise."""
        return Flops(0, 0)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """None: the average is element-wise."""
        return Flops(0, 0)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """None: the average is element-wise."""
        return 0


class AFTFull(AFTSimple):
    """AFT-full: the average's weights are exp(k_i + u_t . v_i), u and v of positions.

    Both tables begin as normals times `spread`. Positions beyond them read their last row.

    Source: Zhai et al. 2021, sections 3.1 and 3.2 (the factors), https://arxiv.org/abs/2105.14103
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.window = self.reach(config)
        self.bias_q, self.bias_k = self.tables(config, rngs)

    @classmethod
    def reach(cls, config: StackConfig) -> int | None:
        """The distance from which on there is no bias; None where there is no such end."""
        return None

    @classmethod
    def sizes(cls, config: StackConfig) -> tuple[int, int, int]:
        return config.width, config.width, config.aft.rank

    def tables(self, config: StackConfig, rngs: Keys) -> tuple[nnx.Param, nnx.Param]:
        """What the biases are made of."""
        own, axes = config.aft, Axes((), ("positions", "rank"))
        first, second = own.spread * jax.random.normal(rngs(), (2, own.length, own.rank))
        return nnx.Param(first, axes=axes), nnx.Param(second, axes=axes)

    def bias(self) -> Factored | Offsets:
        """The biases, as the op reads them."""
        return Factored(self.bias_q.get_value(), self.bias_k.get_value(), self.window)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """A cache of k and v; with a window only of its tokens, and the sums of those before."""
        keys, values = self.k.weight.shape[-1], self.v.weight.shape[-1]
        return aft_state(batch, keys, values, max_length, self.bias().window, dtype)

    def average(
        self, k: jax.Array, v: jax.Array, context: Context, state: Tree
    ) -> tuple[jax.Array, Tree]:
        at = {"positions": context.positions, "segments": context.segments}
        return aft(k, v, self.bias(), **at, state=state, aligned=context.aligned)

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return exact_aft_flops(T, *cls.sizes(config), cls.reach(config))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        sizes, reach = cls.sizes(config), cls.reach(config)
        return aft_flops(B, T, *sizes, reach, base=BASE, aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token: the biases of all slots of its cache."""
        reach = cls.reach(config)
        return 2 * cls.sizes(config)[-1] * (context if reach is None else reach)


class AFTLocal(AFTFull):
    """AFT-local: AFT-full without a bias from a distance of `window` on; the weights exp(k) stay.

    Source: Zhai et al. 2021, section 3.1, https://arxiv.org/abs/2105.14103
    """

    @classmethod
    def reach(cls, config: StackConfig) -> int | None:
        return config.aft.window


class AFTConv(AFTFull):
    """AFT-conv: a bias for each distance below `window` and head; a head's channels share a key.

    The biases are gain * (w - mean(w)) / std(w) + shift over a head's distances, with w drawn
    standard normal, the gain at first that of the config, and the shift 0.

    Source: Zhai et al. 2021, sections 3.1 and 3.2, https://arxiv.org/abs/2105.14103
    """

    def keys(self, config: StackConfig, rngs: Keys) -> Dense:
        """A key for each head."""
        width, heads = (("embed", config.width),), (("heads", config.aft_conv.heads),)
        return Dense("btd,dn->btn", width, heads, rngs)

    @classmethod
    def reach(cls, config: StackConfig) -> int | None:
        return config.aft_conv.window

    @classmethod
    def sizes(cls, config: StackConfig) -> tuple[int, int, int]:
        heads = config.aft_conv.heads
        return heads, heads * config.head_dim("aft_conv"), 0

    def tables(self, config: StackConfig, rngs: Keys) -> tuple[nnx.Param, nnx.Param]:
        own = config.aft_conv
        w = jax.random.normal(rngs(), (own.heads, own.window))
        scale = jnp.stack([jnp.full((own.heads,), own.gain), jnp.zeros(own.heads)])
        return (
            nnx.Param(w, axes=Axes((), ("heads", "distances"))),
            nnx.Param(scale, axes=Axes((), ("gate", "heads"))),
        )

    def bias(self) -> Factored | Offsets:
        w, (gain, shift) = self.bias_q.get_value(), self.bias_k.get_value()
        centred = w - w.mean(axis=1, keepdims=True)
        spread = jnp.sqrt(jnp.square(centred).mean(axis=1, keepdims=True) + 1e-6)
        return Offsets(gain[:, None] * centred / spread + shift[:, None])
