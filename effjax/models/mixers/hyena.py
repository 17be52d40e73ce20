"""Hyena: gates and long convolutions in turn, the filters given by a network of the distance."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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
from effjax.ops.convolution.implicit_filter import (
    FilterNetwork,
    decay_rates,
    implicit_filter,
    implicit_filter_flops,
)
from effjax.ops.convolution.long import Form, long_convolution, long_state
from effjax.ops.convolution.short import short_convolution, short_state
from effjax.weights import Axes, Tree


class Hyena(nnx.Module):
    """Hyena of order N: v <- x_n * v, then v <- h_n * v + skip_n v, for n = N - 1 ... 1; o(x_0 v).

    v and the gates x_0 ... x_{N-1} are projections after a short convolution, h_n the filters. In
    order 2 this is q (h * (k v)), the form of H3. Weights start as in the authors' code, torch's
    linear layers; the house's projections have no bias.

    A state holds the inputs of every long convolution so far, up to the filters' length, and the
    filters themselves, computed once for all rows.

    Source: Poli et al. 2023, Hyena Hierarchy, section 3, https://arxiv.org/abs/2302.10866, and the
    authors' code, https://github.com/HazyResearch/safari/blob/main/standalone_hyena.py, in which
    order N has N gates and N - 1 filters; the paper's first filter is the short convolution.
    """

    causality: ClassVar[str] = "fft"
    decodes: ClassVar[bool] = True
    form: ClassVar[Form] = "auto"

    def __init__(self, config: StackConfig, rngs: Keys):
        own, D = config.hyena, config.width
        self.length, self.shift = own.length, own.shift
        N, E, F = own.order, 2 * own.bands + 1, own.hidden
        width, branches = (("embed", D),), (("gate", N + 1), ("embed", D))
        self.inputs = Dense("btd,dge->btge", width, branches, rngs)
        self.outputs = Dense("btd,de->bte", width, width, rngs, gain=config.residual_gain)

        def uniform(fan_in: int, *sizes: int, names: tuple[str, ...]) -> nnx.Param:
            value = jax.random.uniform(rngs(), sizes, minval=-1, maxval=1) * fan_in**-0.5
            return nnx.Param(value, axes=Axes((), names))

        W = own.width
        self.short = uniform(W, N + 1, D, W, names=("gate", "embed", "tap"))
        self.short_bias = uniform(W, N + 1, D, names=("gate", "embed"))
        self.w_in = uniform(E, E, F, names=("feature", "hidden"))
        self.b_in = uniform(E, F, names=("hidden",))
        self.inner = uniform(F, own.inner, F, F, names=("rank", "hidden", "basis"))
        self.b_inner = uniform(F, own.inner, F, names=("rank", "hidden"))
        self.frequency = nnx.Param(jnp.full(F, own.frequency), axes=Axes((), ("hidden",)))
        self.w_out = uniform(F, F, N - 1, D, names=("hidden", "order", "embed"))
        normal = jax.random.normal(rngs(), (N - 1, D))
        self.skip = nnx.Param(normal, axes=Axes((), ("order", "embed")))
        rates = decay_rates((N - 1) * D, fast=own.fast, slow=own.slow, target=own.target)
        self.rate = Constant(rates.reshape(N - 1, D), axes=Axes((), ("order", "embed")))

    def kernels(self, taps: int) -> jax.Array:
        """The filters' first taps, the skips added to the first: [N-1 S D]."""
        w_out, rate, skip = (p.get_value() for p in (self.w_out, self.rate, self.skip))
        network = FilterNetwork(
            self.w_in.get_value(),
            self.b_in.get_value(),
            self.inner.get_value(),
            self.b_inner.get_value(),
            self.frequency.get_value(),
            w_out.reshape(w_out.shape[0], -1),
            rate.reshape(-1),
        )
        h = implicit_filter(network, taps, length=self.length, shift=self.shift)
        h = jnp.moveaxis(h.reshape(*rate.shape, taps), -1, 1)
        return h.at[:, 0].add(skip.astype(h.dtype))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """A slot for each token that filters reach, float32, for each filter; and the filters."""
        G, D, W = self.short.get_value().shape
        slots = max(1, min(max_length, self.length - 1))
        return {
            "short": short_state(batch, G * D, W),
            "long": {f"{n:02d}": long_state(batch, D, slots) for n in range(G - 2)},
            "kernels": self.kernels(self.length),
        }

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        x = context.clear(x)
        branches, short = self._branches(x, context, None if state is None else state["short"])
        *gates, v = jnp.moveaxis(branches, 2, 0)
        taps = _taps(self.length, x.shape[1], context.aligned)
        kernels = self.kernels(taps) if state is None else state["kernels"]
        after = {}
        for n, kernel in enumerate(kernels):
            name = f"{n:02d}"
            v, after[name] = long_convolution(
                v * gates[len(kernels) - n],
                kernel.T,
                positions=context.positions,
                segments=context.segments,
                state=None if state is None else state["long"][name],
                aligned=context.aligned,
                form=self.form,
            )
        y = self.outputs(v * gates[0])
        if state is None:
            return y, None, {}
        return y, {"short": short, "long": after, "kernels": kernels}, {}

    def _branches(self, x: jax.Array, context: Context, state: Tree) -> tuple[jax.Array, Tree]:
        """The gates, then the values, each through its short convolution: [B T N+1 D]."""
        z = self.inputs(x)
        weight, bias = self.short.get_value(), self.short_bias.get_value()
        y, state = short_convolution(
            z.reshape(*z.shape[:2], -1),
            weight.reshape(-1, weight.shape[-1]),
            bias.reshape(-1),
            positions=context.positions,
            segments=context.segments,
            state=state,
            aligned=context.aligned,
        )
        return y.reshape(z.shape), state

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row; filters are shared by all rows."""
        own = config.hyena
        each = exact_long_convolution_flops(1, T, config.width, own.length, form=cls.form)
        return Flops(*((own.order - 1) * work for work in each))

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows, and of the network that makes the filters."""
        own, D = config.hyena, config.width
        filters, taps = own.order - 1, _taps(own.length, T, aligned)
        each = long_convolution_flops(B, T, D, taps, form=cls.form, aligned=aligned)
        made = implicit_filter_flops(taps, own.bands, own.hidden, own.inner, filters * D)
        return Flops(*(filters * a + b for a, b in zip(each, made, strict=True)))

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token: a product with every slot; filters are kept."""
        own = config.hyena
        slots = max(1, min(context, own.length - 1))
        return (own.order - 1) * long_step_flops(1, config.width, slots)


def _taps(length: int, T: int, aligned: bool) -> int:
    """Taps that rows of T tokens may read: positions may be farther apart than tokens are."""
    return min(length, T) if aligned or T == 1 else length
