"""Additive positions: numbers that depend on distance and head, added to the scores.

Each layer has its own; what belongs to a head is an array with the axis "heads".
"""

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.functional import Constant, Keys
from effjax.models.positions.none import NoPositions
from effjax.ops.attention.bias import Bias
from effjax.ops.position.alibi import Alibi, alibi_slopes
from effjax.ops.position.fire import Fire
from effjax.ops.position.kerple import KerpleLog, KerplePower
from effjax.ops.position.sandwich import Sandwich, sandwich_ratios
from effjax.ops.position.t5 import T5Bias
from effjax.ops.position.tisa import Tisa
from effjax.weights import Axes

HEADS = Axes((), ("heads",))


class AlibiPositions(NoPositions):
    """ALiBi (see `effjax.ops.position.alibi`); the slopes are constants."""

    def __init__(self, config: StackConfig, rngs: Keys):
        slopes = alibi_slopes(config.attention.heads)
        self.slopes = Constant(jnp.asarray(slopes, jnp.float32), axes=HEADS)

    def bias(self) -> Bias:
        return Alibi(self.slopes.get_value())


class KerpleLogPositions(NoPositions):
    """KERPLE's logarithmic kernel; r1 and r2 are kept above 0 by a soft-plus.

    They begin uniform in (0, 2) and (0, 1), as in the authors' code, which clips them at 0.01 after
    each step instead: at least 0.01 here too, where they begin.
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        heads = (config.attention.heads,)
        draws = [high * jax.random.uniform(rngs(), heads, minval=0.01) for high in (2.0, 1.0)]
        self.r1, self.r2 = (nnx.Param(jnp.log(jnp.expm1(x)), axes=HEADS) for x in draws)

    def bias(self) -> Bias:
        return KerpleLog(*(jax.nn.softplus(r.get_value()) for r in (self.r1, self.r2)))


class KerplePowerPositions(NoPositions):
    """KERPLE's power kernel; r1 is kept above 0 by a soft-plus, r2 in (0, 2) by a sigmoid.

    They begin uniform in (0, 1) and (0, 2), as in the authors' code.
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        heads = (config.attention.heads,)
        r1, half = (
            jax.random.uniform(rngs(), heads, minval=0.01, maxval=high) for high in (1.0, 0.99)
        )
        self.r1 = nnx.Param(jnp.log(jnp.expm1(r1)), axes=HEADS)
        self.r2 = nnx.Param(jnp.log(half / (1 - half)), axes=HEADS)

    def bias(self) -> Bias:
        r1, r2 = self.r1.get_value(), self.r2.get_value()
        return KerplePower(jax.nn.softplus(r1), 2 * jax.nn.sigmoid(r2))


class SandwichPositions(NoPositions):
    """Sandwich (see `effjax.ops.position.sandwich`); the heads' ratios are constants."""

    def __init__(self, config: StackConfig, rngs: Keys):
        self.width = config.position.sandwich_width
        ratios = sandwich_ratios(config.attention.heads)
        self.ratios = Constant(jnp.asarray(ratios, jnp.float32), axes=HEADS)

    def bias(self) -> Bias:
        return Sandwich(self.ratios.get_value(), width=self.width)


class T5Positions(NoPositions):
    """T5's buckets (see `effjax.ops.position.t5`), for one side in a model that looks back only.

    T5 shares the table among its layers and draws it with a spread of 1 / sqrt(width).
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        own = config.position
        self.max_distance, self.bidirectional = own.max_distance, not config.causal
        shape = own.buckets, config.attention.heads
        spread = config.width**-0.5
        self.table = nnx.Param(
            spread * jax.random.normal(rngs(), shape), axes=Axes((), ("buckets", "heads"))
        )

    def bias(self) -> Bias:
        return T5Bias(self.table.get_value(), self.max_distance, self.bidirectional)


class TisaPositions(NoPositions):
    """TISA (see `effjax.ops.position.tisa`).

    As in the authors' code amplitudes and sharpness begin at 0.1, spread by 0.01, and offsets at 0,
    spread by 5 tokens.
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        shape = config.position.kernels, config.attention.heads
        axes = Axes((), ("kernels", "heads"))
        self.amplitudes, self.sharpness = (
            nnx.Param(0.1 + 0.01 * jax.random.normal(rngs(), shape), axes=axes) for _ in range(2)
        )
        self.offsets = nnx.Param(5.0 * jax.random.normal(rngs(), shape), axes=axes)

    def bias(self) -> Bias:
        parts = self.amplitudes, self.sharpness, self.offsets
        return Tisa(*(part.get_value() for part in parts))


class FirePositions(NoPositions):
    """FIRE (see `effjax.ops.position.fire`).

    As in the paper's appendix c begins at 0.1, the threshold is learned as a multiple of the
    training length, and the network begins as torch's linear layers do: uniform up to one over the
    root of its inputs.
    """

    def __init__(self, config: StackConfig, rngs: Keys):
        R, N = config.position.fire_hidden, config.attention.heads
        self.length = config.position.train_length
        self.c = nnx.Param(jnp.asarray(0.1), axes=Axes())
        self.multiple = nnx.Param(jnp.asarray(1.0), axes=Axes())

        def uniform(shape: tuple[int, ...], bound: float, *names: str) -> nnx.Param:
            value = jax.random.uniform(rngs(), shape, minval=-bound, maxval=bound)
            return nnx.Param(value, axes=Axes((), names))

        self.w1, self.b1 = uniform((R,), 1.0, "hidden"), uniform((R,), 1.0, "hidden")
        self.w2 = uniform((R, N), R**-0.5, "hidden", "heads")
        self.b2 = uniform((N,), R**-0.5, "heads")

    def bias(self) -> Bias:
        rest = (part.get_value() for part in (self.w1, self.b1, self.w2, self.b2))
        return Fire(self.c.get_value(), self.multiple.get_value() * self.length, *rest)
