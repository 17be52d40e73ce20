"""Blocks of scores: product, bias and mask."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from effjax.ops.attention.bias import Bias
from effjax.ops.attention.layout import clear, dot, pad_time, row, to_blocks
from effjax.ops.attention.plan import Plan

# What stands for the segment of padding: neither equals the other, nor a segment in use.
NO_QUERY, NO_KEY = -(2**31), -(2**31) + 1


class Marks(NamedTuple):
    """Where each token stands; a leading size of 1 serves every row."""

    q_positions: Int[Array, "#B T"]
    k_positions: Int[Array, "#B S"]
    q_segments: Int[Array, "#B T"]
    k_segments: Int[Array, "#B S"]

    @property
    def q_live(self) -> Bool[Array, "#B T"]:
        return self.q_positions >= 0

    @property
    def k_live(self) -> Bool[Array, "#B S"]:
        return self.k_positions >= 0


@dataclass(frozen=True, eq=False)
class Scores:
    """The score matrix in blocks [B K d c] that are computed when they are asked for.

    Keys run down the rows; along the columns the queries of the G heads that share a key head.
    """

    plan: Plan
    q: Array  # [n B K c H]
    k: Array  # [m B K d H]
    q_marks: tuple[Array, Array]  # positions and segments, [n B 1 1 c]
    k_marks: tuple[Array, Array]  # positions and segments, [m B 1 d 1]
    heads: Array  # [1 K 1 c]
    bias: Bias | None

    def __call__(self, i: Any, j: Any, masked: bool) -> Array:
        """Block (i, j); where nothing is read, -inf if `masked`, else the caller knows of none."""
        s = dot("bkdh,bkch->bkdc", row(self.k, j), row(self.q, i)) * self.plan.scale
        if self.bias is not None:
            s = s + self.bias(*self.places(i, j)).astype(s.dtype)
        return jnp.where(self._reads(i, j), s, -jnp.inf) if masked else s

    def places(self, i: Any, j: Any) -> tuple[Array, Array, Array]:
        """Positions and heads of block (i, j), to broadcast together."""
        return row(self.q_marks[0], i), row(self.k_marks[0], j), self.heads

    def _reads(self, i: Any, j: Any) -> Array:
        same_segment = row(self.q_marks[1], i) == row(self.k_marks[1], j)
        return same_segment & self.plan.pattern.allowed(*self.places(i, j))


def score_blocks(plan: Plan, q: Array, k: Array, marks: Marks, bias: Bias | None) -> Scores:
    """Lays queries [B T N H], keys [B S K H] and their marks out in blocks."""
    N, K = q.shape[2], k.shape[2]
    heads = plan.group * N + jnp.arange(N).reshape(K, N // K)

    def across(x: Array, padding: int) -> Array:
        x = pad_time(x, plan.q_count * plan.q_size, padding)
        x = x.reshape(x.shape[0], plan.q_count, 1, 1, plan.q_size).swapaxes(0, 1)
        return jnp.tile(x, (1, 1, 1, 1, N // K))

    def down(x: Array, padding: int) -> Array:
        x = pad_time(x, plan.k_count * plan.k_size, padding)
        return x.reshape(x.shape[0], plan.k_count, 1, plan.k_size, 1).swapaxes(0, 1)

    q_segments = jnp.where(marks.q_live, marks.q_segments, NO_QUERY)
    k_segments = jnp.where(marks.k_live, marks.k_segments, NO_KEY)
    return Scores(
        plan=plan,
        q=to_blocks(clear(q, marks.q_live), plan.q_count, plan.q_size, K),
        k=to_blocks(clear(k, marks.k_live), plan.k_count, plan.k_size, K),
        q_marks=(across(jnp.maximum(marks.q_positions, 0), 0), across(q_segments, NO_QUERY)),
        k_marks=(down(jnp.maximum(marks.k_positions, 0), 0), down(k_segments, NO_KEY)),
        heads=jnp.repeat(heads, plan.q_size, axis=1)[None, :, None, :],
        bias=bias,
    )
