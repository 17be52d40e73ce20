"""Position biases of AFT, read off the positions of two tokens, and what they cost in closed form.

A bias is read in two steps: `read` gathers what it needs of each token's place, once a row, and
`weigh` makes w of the places of queries [... t] and of keys [... s].
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.ops.accounting import Flops


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """w(t, i) = u[p_t] . v[p_i], and 0 from a distance of `window` on; one for all channels.

    u, v: [P R], a row for each position; beyond P that of the last row. window: static; None for
    no such end.
    """

    u: Any
    v: Any
    window: int | None = field(default=None, metadata={"static": True})
    relative: ClassVar[bool] = False

    def read(self, positions: Int[Array, "B T"], dtype: Any) -> tuple[Array, Array, Array]:
        """The rows of both tables, and the position."""
        row = jnp.clip(positions, 0, self.u.shape[0] - 1)
        return self.u[row].astype(dtype), self.v[row].astype(dtype), positions

    def weigh(self, queries: Any, keys: Any) -> Float[Array, "... 1 t s"]:
        """The biases of all pairs, for one head that stands for all."""
        w = jnp.einsum("...tr,...sr->...ts", queries[0], keys[1])
        if self.window is not None:
            gap = queries[2][..., :, None] - keys[2][..., None, :]
            w = jnp.where(gap < self.window, w, 0)
        return w[..., None, :, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Offsets:
    """w(t, i) = table[p_t - p_i], and 0 from a distance of the table's length on; for each head.

    table: [N S].
    """

    table: Any
    relative: ClassVar[bool] = True

    @property
    def window(self) -> int:
        """Distances that have a bias."""
        return self.table.shape[1]

    def read(self, positions: Int[Array, "B T"], dtype: Any) -> tuple[Array]:
        """The position."""
        return (positions,)

    def weigh(self, queries: Any, keys: Any) -> Float[Array, "... N t s"]:
        """The biases of all pairs and heads."""
        gap = queries[0][..., :, None] - keys[0][..., None, :]
        w = jnp.moveaxis(self.table[:, jnp.clip(gap, 0, self.window - 1)], 0, -3)
        return jnp.where((gap < self.window)[..., None, :, :], w, 0)


def aft_flops(
    B: int, T: int, K: int, D: int, R: int, window: int | None, *, base: int, aligned: bool
) -> Flops:
    """FLOPs of `aft` as written, without a state: whole chunks, masks not spared.

    Products are those of the weights exp(w) with values and keys, and of the factors of w (R = 0
    for `Offsets`), which aligned rows share. base: tokens whose pairs are summed element by
    element. Every product has two cotangents.

    Source: our own count of `aft.py`.
    """
    whole = 1 << (T - 1).bit_length()
    chunk = whole if window is None else min(whole, 1 << (window - 1).bit_length())
    tokens = -(-T // chunk) * chunk
    size = min(base, chunk)
    direct, pairs = tokens * size, (tokens - chunk) * chunk
    while size < chunk:
        pairs += tokens // 2 * size
        size *= 2
    forward = 2 * B * pairs * (D + K) + 2 * (1 if aligned else B) * (pairs + direct) * R
    return Flops(forward, 2 * forward)


def exact_aft_flops(T: int, K: int, D: int, R: int, window: int | None) -> Flops:
    """FLOPs of AFT itself, of one row: D + K + R multiply-adds a pair that has a bias.

    Without a bias (beyond the window) a weight is a key's alone, and sums run on without a product.

    Source: Zhai et al. 2021, section 3 and table 1, https://arxiv.org/abs/2105.14103
    """
    reach = T if window is None else min(window, T)
    pairs = reach * (reach + 1) // 2 + (T - reach) * reach
    forward = 2 * pairs * (D + K + R)
    return Flops(forward, 2 * forward)
