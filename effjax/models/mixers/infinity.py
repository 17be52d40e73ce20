"""The infinity-former's attention: a segment, a memory, and a continuous long-term memory."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.transformer_xl import TransformerXLAttention
from effjax.ops.accounting import Flops
from effjax.ops.attention.compressive import Groups, append, empty_tail, whole_groups
from effjax.ops.attention.infinity import (
    Infinity,
    Signal,
    densities,
    density_loss,
    empty_signal,
    long_term_attention,
    remember,
    sticky_samples,
)
from effjax.weights import Axes, Tree, einsum


class InfinityAttention(TransformerXLAttention):
    """Transformer-XL's attention, plus what continuous attention reads of all segments that ended.

    y = o(attention(segment, memory)) + o'(continuous attention(signal)); the signal has keys,
    values and an output projection of its own, and takes the attention's queries as they are
    before positions. A segment that a gap in positions cuts is not remembered.

    aux["long_memory"]: `kl`, a sum over the tokens that read the signal.

    Source: Martins et al. 2022, section 3, https://arxiv.org/abs/2109.00301. There the signal gets
    a segment when the short memory loses it; ours has all that ended, those still in the memory
    among them.
    """

    kind: ClassVar[Kind] = "infinity"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.section: Infinity = config.infinity
        basis, heads = self.section.basis, config.attention.heads
        width = (("embed", config.width),)
        inner = (("heads", heads), ("head", config.head_dim("attention")))
        self.long_k = Dense("bgd,dnh->bgnh", width, inner, rngs)
        self.long_v = Dense("btnd,dnh->btnh", width, inner, rngs)
        self.long_o = Dense("btnh,nhd->btd", inner, width, rngs, gain=config.residual_gain)
        draw = lambda: jax.random.normal(rngs(), (basis,)) * basis**-0.5  # noqa: E731
        self.mean = nnx.Param(draw(), axes=Axes((), ("basis",)))
        self.variance = nnx.Param(draw(), axes=Axes((), ("basis",)))

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """A cache of the last tokens, the segment in progress, and the signal of those before."""
        width = self.k.weight.shape[0]
        return {
            "recent": super().init_state(batch, max_length, piece, dtype),
            "tail": empty_tail(batch, self.section.length, width, dtype),
            "signal": empty_signal(batch, self.section, width),
        }

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, Any]]:
        x = context.clear(x)
        at = {"positions": context.positions, "segments": context.segments}
        size, old = self.section.length, empty_signal(x.shape[0], self.section, x.shape[2])
        recent = None if state is None else state["recent"]
        y, recent, _ = super().__call__(x, context, recent)
        if state is None:
            groups = whole_groups(stop_gradient(x), size=size, aligned=context.aligned, **at)
            signal, each = self._remember(old, groups)
            z, kl = self._read(x, context, groups.index, groups.segments, each)
        else:
            old = state["signal"]
            tail, groups = append(state["tail"], stop_gradient(x), **at)
            signal, each = self._remember(old, groups)
            # The old memory may be read at once; a piece's places are counted from its first token.
            none = jnp.iinfo(jnp.int32).min
            of = jnp.where(old.positions >= 0, old.segments, none)[:, None]
            index = jnp.concatenate([jnp.full_like(of, -1), groups.index - size + 1], axis=1)
            segments = jnp.concatenate([of, groups.segments], axis=1)
            each = jnp.concatenate([old.coefficients[:, None], each], axis=1)
            z, kl = self._read(x, context, index, segments, each)
            state = {"recent": recent, "tail": tail, "signal": signal}
        return y + z, state, {"long_memory": {"kl": kl}}

    def _remember(self, signal: Signal, groups: Groups) -> tuple[Signal, jax.Array]:
        return remember(signal, groups, self.section, self._locate if self.section.sticky else None)

    def _keys(self, S: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What queries meet of the keys: their sums under the two learned weightings, [B G N H]."""
        means, variances = (
            self.long_k(einsum("bgpd,p->bgd", S, w.get_value())) for w in (self.mean, self.variance)
        )
        return means, variances

    def _locate(self, S: jax.Array, x: jax.Array) -> jax.Array:
        """Where the queries of a segment [B L D] have read its memory [B P D]."""
        q = self.q(x)
        near = [jnp.broadcast_to(k, q.shape) for k in self._keys(S[:, None])]
        live = jnp.ones(x.shape[:2], bool)
        return stop_gradient(sticky_samples(densities(q, *near), live, self.section))

    def _read(
        self, x: jax.Array, context: Context, index: jax.Array, segments: jax.Array, S: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What tokens read of their memories, and how far their densities are from the prior."""
        if S.shape[1] == 0:
            return jnp.zeros_like(x), jnp.zeros((), jnp.float32)
        S = stop_gradient(S).astype(x.dtype)
        z, density, reads = long_term_attention(
            self.q(x),
            self._keys(S),
            S,
            section=self.section,
            index=index,
            memory_segments=segments,
            positions=context.positions,
            segments=context.segments,
            aligned=context.aligned,
        )
        kl = jnp.where(reads, density_loss(density, self.section), 0).sum()
        return self.long_o(self.long_v(z)), kl

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row, the signal's among it.

        Weights are counted elsewhere, as if each met every token; the keys' meets but memories.
        """
        near = super().exact_flops(config, T)
        own, N = config.infinity, config.attention.heads
        kept, keys = cls._making(config, 1, T // own.length)
        unmet = cls._unmet(config, 1, T)
        far = 2 * N * own.basis * config.width * max(T - own.length, 0)
        forward = near.forward + kept + keys + far - unmet
        return Flops(forward, near.backward + keys + 2 * far - 2 * unmet)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows whose samples are even."""
        near, own = super().program_flops(config, B, T, aligned), config.infinity
        kept, keys = cls._making(config, B, T // own.length, maps=2)
        size, R = min(own.length, T), 1 if aligned else 2
        rows = -(-T // size) * size * B if own.length <= T else 0
        far = 2 * config.attention.heads * own.basis * config.width * rows * R
        # That queries are projected twice makes up for the keys' weight, which memories meet alone.
        return Flops(near.forward + kept + keys + far, near.backward + keys + 2 * far)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token that ends a segment, whatever came before it."""
        near, own = super().step_flops(config, context), config.infinity
        kept, _ = cls._making(config, 1, 1, maps=2)
        _, keys = cls._making(config, 1, 2)
        far = 2 * 2 * config.attention.heads * own.basis * config.width
        return near + kept + keys + far

    @classmethod
    def _making(cls, config: StackConfig, B: int, G: int, maps: int = 1) -> tuple[int, int]:
        """FLOPs of taking G segments into the memory, and of G memories' keys."""
        own, D = config.infinity, config.width
        inner = config.attention.heads * config.head_dim("attention")
        kept = 2 * own.basis * D * (maps * own.length + own.basis)
        return B * G * kept, B * G * 2 * 2 * (own.basis * D + D * inner)

    @classmethod
    def _unmet(cls, config: StackConfig, B: int, T: int) -> int:
        """FLOPs that the keys' weight is counted with elsewhere."""
        return 2 * B * T * config.width * config.attention.heads * config.head_dim("attention")
