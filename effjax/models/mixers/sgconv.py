"""SGConv: a long convolution by a kernel of few weights, then a gated linear unit."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.layers import Dense
from effjax.ops.accounting import Flops
from effjax.ops.convolution.accounting import (
    exact_long_convolution_flops,
    long_convolution_flops,
    long_step_flops,
)
from effjax.ops.convolution.long import long_convolution, long_state
from effjax.ops.convolution.sgconv import sgconv_kernel, sgconv_norm, sgconv_scales
from effjax.weights import Axes, Tree


class SGConv(nnx.Module):
    """Structured global convolution: glu(mix(gelu(K * x + skip x))), K of scales that double.

    Weights and skips start as standard normals, and every channel of K at norm 1, as in the paper.

    A state holds the inputs so far, up to the kernel's length, and the kernel, computed once.

    Source: Li et al. 2022, section 3, https://arxiv.org/abs/2210.09298, and the authors' code,
    https://github.com/ctlllll/SGConv/blob/main/gconv_standalone.py
    """

    causality: ClassVar[str] = "fft"
    decodes: ClassVar[bool] = True

    def __init__(self, config: StackConfig, rngs: Keys):
        own, D = config.sgconv, config.width
        self.decay = own.decay
        scales = sgconv_scales(own.length, own.taps)
        weights = jax.random.normal(rngs(), (D, scales, own.taps))
        norm = sgconv_norm(sgconv_kernel(weights, decay=own.decay))
        self.weights = nnx.Param(weights, axes=Axes((), ("embed", "kernels", "tap")))
        self.norm = Constant(norm, axes=Axes((), ("embed",)))
        self.skip = nnx.Param(jax.random.normal(rngs(), (D,)), axes=Axes((), ("embed",)))
        inputs, outputs = (("embed", D),), (("gate", 2), ("embed", D))
        self.mix = Dense("btd,dge->btge", inputs, outputs, rngs, gain=config.residual_gain)

    def kernel(self) -> jax.Array:
        """All taps of the kernel, the skip added to the first: [S D]."""
        weights, norm, skip = (p.get_value() for p in (self.weights, self.norm, self.skip))
        kernel = sgconv_kernel(weights, norm, decay=self.decay).T
        return kernel.at[0].add(skip.astype(kernel.dtype))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """A slot for each token that the kernel reaches, float32; and the kernel."""
        D, scales, taps = self.weights.get_value().shape
        slots = max(1, min(max_length, (taps << (scales - 1)) - 1))
        return {"long": long_state(batch, D, slots), "kernel": self.kernel()}

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        kernel = self.kernel() if state is None else state["kernel"]
        y, after = long_convolution(
            context.clear(x),
            kernel.T,
            positions=context.positions,
            segments=context.segments,
            state=None if state is None else state["long"],
            aligned=context.aligned,
        )
        mixed = self.mix(jax.nn.gelu(y))
        y = mixed[:, :, 0] * jax.nn.sigmoid(mixed[:, :, 1])
        return y, None if state is None else {"long": after, "kernel": kernel}, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return exact_long_convolution_flops(1, T, config.width, _taps(config))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        return long_convolution_flops(B, T, config.width, _taps(config), aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token: a product with every slot."""
        return long_step_flops(1, config.width, max(1, min(context, _taps(config) - 1)))


def _taps(config: StackConfig) -> int:
    """Taps of the kernel: its scales in full, at least the length that was asked for."""
    own = config.sgconv
    return own.taps << (sgconv_scales(own.length, own.taps) - 1)
