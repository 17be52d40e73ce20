"""The Compressive Transformer's attention: segment, memory and compressed memory."""

from typing import Any, ClassVar

import jax
from jax.lax import stop_gradient

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.kinds import Kind
from effjax.models.layers import Dense
from effjax.models.mixers.transformer_xl import TransformerXLAttention
from effjax.ops.accounting import Flops
from effjax.ops.attention.accounting import engine_flops
from effjax.ops.attention.cache import empty_cache, write_cache
from effjax.ops.attention.compressive import (
    Compressive,
    Groups,
    append,
    cache_parts,
    empty_tail,
    grouped_parts,
    pool_groups,
    reconstruction_loss,
    slot_reads,
    slots_in_reach,
    whole_groups,
)
from effjax.ops.attention.merge import merge_parts
from effjax.ops.attention.transformer_xl import KeysValues
from effjax.weights import Tree, einsum


class CompressiveAttention(TransformerXLAttention):
    """Attention to a segment, a memory, and slots that each hold several positions from before.

    Slots are made of `stop_gradient` of the layer's input, and the attention sees them through
    another: a convolution learns from the reconstruction loss only, and that trains nothing else.

    aux["compression"], of a convolution and without a state: `reconstruction`, a sum over the
    batch's live tokens.

    Source: Rae et al. 2020, algorithms 1 and 2, https://arxiv.org/abs/1911.05507. A slot stands at
    its group's last position, where theirs are a token apart; ours are the distances of the text,
    whatever the scheme of positions.
    """

    kind: ClassVar[Kind] = "compressive"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        self.section: Compressive = config.compressive
        if self.section.compression == "convolution":
            each, width = ("tap", self.section.rate), ("embed", config.width)
            self.convolution = Dense("bgcd,cde->bge", (each, width), (width,), rngs)

    def init_state(
        self, batch: int, max_length: int, piece: int, dtype: Any, memory: Any = None
    ) -> Tree:
        """Caches of the last tokens and of the slots, and the tokens of the group in progress."""
        own, (width, heads, head_dim) = self.section, self.k.weight.shape
        head_dim += own.sinusoids
        reach = own.slots + (own.memory + own.length + piece - 1) // own.rate
        slots = max(1, min(reach, max_length // own.rate))
        at_once = (piece + own.rate - 1) // own.rate
        return {
            "recent": super().init_state(batch, max_length, piece, dtype),
            "slots": empty_cache(batch, heads, slots, head_dim, at_once, dtype),
            "tail": empty_tail(batch, own.rate, width, dtype),
        }

    def __call__(
        self, x: jax.Array, context: Context, state: Tree = None
    ) -> tuple[jax.Array, Tree, dict[str, Any]]:
        x = context.clear(x)
        q = self.queries(x, context.positions)
        if state is not None:
            return self._continue(x, q, context, state)
        at: dict[str, Any] = {"positions": context.positions, "segments": context.segments}
        at["aligned"] = context.aligned
        groups = whole_groups(stop_gradient(x), size=self.section.rate, **at)
        slots = self._compress(groups.x)
        part = grouped_parts(
            q,
            self._slots(slots, groups),
            groups,
            pattern=self.section.compressed,
            bias=self.bias(),
            **at,
        )
        y = self.output(merge_parts([*self.parts(x, q, context), part]))
        if self.section.compression != "convolution":
            return y, None, {}
        content = [self._contents(layer, stop_gradient(x)) for layer in (self.q, self.k, self.v)]
        compressed = self._contents(self.k, slots), self._contents(self.v, slots)
        loss = reconstruction_loss(
            content[0], (content[1], content[2]), compressed, groups, pattern=self.section, **at
        )
        return y, None, {"compression": {"reconstruction": loss}}

    def _continue(
        self, x: jax.Array, q: jax.Array, context: Context, state: Tree
    ) -> tuple[jax.Array, Tree, dict[str, Any]]:
        at = {"positions": context.positions, "segments": context.segments}
        k, v = self.keys_values(x, context.positions)
        recent = write_cache(state["recent"], k, v, **at)
        tail, groups = append(state["tail"], x, **at)
        made = self._slots(self._compress(groups.x), groups)
        slots = write_cache(state["slots"], *made, groups.positions, groups.segments)
        bias = self.bias()
        parts = [
            cache_parts(cache, q, pattern=pattern, bias=bias, **at)
            for cache, pattern in ((recent, self.pattern), (slots, self.section.compressed))
        ]
        state = {"recent": recent, "slots": slots, "tail": tail}
        return self.output(merge_parts(parts)), state, {}

    def _compress(self, x: jax.Array) -> jax.Array:
        """Groups [B G C D] as slots [B G D]."""
        how = self.section.compression
        return self.convolution(x) if how == "convolution" else pool_groups(x, how)

    def _slots(self, slots: jax.Array, groups: Groups) -> KeysValues:
        """The keys and values of slots, where they stand."""
        return self.keys_values(stop_gradient(slots), groups.positions)

    def _contents(self, layer: Dense, x: jax.Array) -> jax.Array:
        """A projection that is not learned through."""
        return einsum(layer.spec, x, jax.tree.map(stop_gradient, layer.weight))

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row, slots and their keys among it.

        Weights are counted elsewhere, as if each met every token; a convolution meets but groups.
        """
        near, made = super().exact_flops(config, T), cls._making(config, 1, T)
        N, H = config.attention.heads, config.head_dim("attention")
        far = 4 * N * H * slot_reads(config.compressive, T)
        return Flops(near.forward + far + made, near.backward + 2 * far + made)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows, with the loss that trains a convolution."""
        own, (N, H) = config.compressive, (config.attention.heads, config.head_dim("attention"))
        near, made = super().program_flops(config, B, T, aligned), cls._making(config, B, T)
        n, groups = -(-T // own.length), T // own.rate
        forward, backward = near.forward + made, near.backward + made
        learned = own.compression == "convolution"
        sizes = (own.compressed, cls.head_size(config)), (own.leaving, H)
        for pattern, wide in sizes[: 1 + learned]:
            R = slots_in_reach(pattern, own.rate, aligned) if groups else 0
            if R:
                part = engine_flops(pattern, B * n, own.length, R, N, wide)
                forward, backward = forward + part.forward, backward + part.backward
        if learned:
            leaving = engine_flops(own.leaving, B, T, T, N, H, aligned=aligned, ordered=True)
            K = config.attention.kv_heads or N
            again = 2 * B * config.width * H * (T * N + 2 * T * K + 2 * groups * K)
            forward += leaving.forward + again
            backward += 2 * 2 * B * groups * config.width * K * H
        return Flops(forward, backward)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token after a context of so many."""
        own, N = config.compressive, config.attention.heads
        slots = min(own.slots + (own.memory + own.length) // own.rate, context // own.rate)
        K = config.attention.kv_heads or N
        made = 2 * 2 * config.width * K * config.head_dim("attention")
        far = 4 * N * cls.head_size(config) * max(1, slots)
        return super().step_flops(config, context) + far + made

    @classmethod
    def _making(cls, config: StackConfig, B: int, T: int) -> int:
        """FLOPs of slots and their keys and values, less what the weights are counted with."""
        own, groups = config.compressive, T // config.compressive.rate
        K = config.attention.kv_heads or config.attention.heads
        keys = 2 * 2 * groups * config.width * K * config.head_dim("attention")
        kernel = 2 * own.rate * config.width**2 * (own.compression == "convolution")
        return B * (keys - kernel * (T - groups))
