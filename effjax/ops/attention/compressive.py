"""Compressed memories: what leaves a segment's memory lives on, several positions in one slot.

A group is `rate` consecutive positions, `position // rate`. It is whole when all of them were read;
a group that a gap in positions or the start of a text cuts is not compressed, and is forgotten with
the memory. So a row of T tokens has at most `T // rate` groups, wherever its documents and its
padding stand.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.config import require_divides, require_finite, require_positive
from effjax.errors import ConfigError
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.cache import Cache, keys_values
from effjax.ops.attention.compact import live_first, permute
from effjax.ops.attention.engine import attention, attention_parts
from effjax.ops.attention.layout import pad_time
from effjax.ops.attention.patterns import Pattern
from effjax.ops.attention.transformer_xl import FromSegment, KeysValues, Part, TransformerXL

SlotKeysValues = tuple[Float[Array, "B G K H"], Float[Array, "B G K H"]]
Compression = Literal["mean", "max", "convolution"]


@dataclass(frozen=True)
class Compressive(TransformerXL):
    """A segment, a memory before it, and `slots` compressed memories before that.

    As a pattern it is `TransformerXL`; beyond that a query reads the compressed groups of the
    positions from `start - memory - slots * rate` to `start - memory`, its segment's start.

    rate: positions in a slot. compression: what makes a slot of them. reconstruction_weight: of the
    loss that trains a convolution, and nothing else.

    Raises ConfigError for numbers that are not positive, for a length or a memory that is no
    multiple of rate, and for a memory shorter than a segment.

    Source: Rae et al. 2020, Compressive Transformers, section 3, https://arxiv.org/abs/1911.05507.
    Of its compression functions we have mean and max pooling and the convolution; not the dilated
    ones, nor the most used memories.
    """

    rate: int = 4
    slots: int = 64
    compression: Compression = "convolution"
    reconstruction_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rate", "slots")
        require_finite(self, "reconstruction_weight", low=0)
        require_divides(self, "rate", "length")
        require_divides(self, "rate", "memory")
        if self.memory < self.length:
            raise ConfigError(
                f"Compressive.memory must be at least length={self.length}, got {self.memory}"
            )

    @property
    def compressed(self) -> FromSegment:
        """Where the compressed memories stand."""
        first = -self.memory - self.slots * self.rate
        return FromSegment(self.length, first, -self.memory)

    @property
    def leaving(self) -> FromSegment:
        """What the memory loses when the segment ends."""
        return FromSegment(self.length, -self.memory, self.length - self.memory)


class Groups(NamedTuple):
    """The whole groups of rows, in order; a position of -1 where there is none.

    x: [B G C D]. positions, segments: int32 [B G], of a group's last token. index: int32 [B G],
    where that token stands in its row.
    """

    x: Any
    positions: Any
    segments: Any
    index: Any


def whole_groups(
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    size: int,
    aligned: bool = False,
) -> Groups:
    """Gathers the groups of `size` consecutive positions, from a multiple of `size` on, of rows.

    aligned: position = index in every row, one segment, no padding.

    Source: our own; `floor(n / c)` memories of n are those of Rae et al. 2020, section 3.1,
    https://arxiv.org/abs/1911.05507
    """
    B, T, D = x.shape
    count = T // size
    if aligned or count == 0:
        every = slice(size - 1, count * size, size)
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, every], (B, count))
        grouped = x[:, : count * size].reshape(B, count, size, D)
        return Groups(grouped, positions[:, every], segments[:, every], index)
    order = live_first(positions)
    x, at, of = (permute(v, order) for v in (x, positions, segments))
    # Positions rise within a segment, so the first and the last of a group vouch for the others.
    late, early = slice(size - 1, None), slice(None, T - size + 1)
    ends = (at[:, late] % size == size - 1) & (at[:, late] >= 0)
    ends &= (at[:, early] == at[:, late] - size + 1) & (of[:, early] == of[:, late])
    first = jnp.argsort(~ends, axis=1, stable=True)[:, :count]
    exists = jnp.take_along_axis(ends, first, axis=1)
    last = first + size - 1
    index = jnp.where(exists, jnp.take_along_axis(order[0], last, axis=1), T)
    members = (first[:, :, None] + jnp.arange(size)[None, None]).reshape(B, -1, 1)
    grouped = jnp.take_along_axis(x, members, axis=1).reshape(B, count, size, D)
    return Groups(
        jnp.where(exists[..., None, None], grouped, 0),
        jnp.where(exists, jnp.take_along_axis(at, last, axis=1), -1),
        jnp.take_along_axis(of, last, axis=1),
        index.astype(jnp.int32),
    )


def pool_groups(
    x: Float[Array, "B G C D"], compression: Literal["mean", "max"]
) -> Float[Array, "B G D"]:
    """The mean or the largest of each group's numbers, channel by channel.

    Source: Rae et al. 2020, section 3.1, https://arxiv.org/abs/1911.05507
    """
    return x.mean(axis=2) if compression == "mean" else x.max(axis=2)


def grouped_parts(
    q: Float[Array, "B T N H"],
    keys_values: SlotKeysValues,
    groups: Groups,
    *,
    pattern: FromSegment,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    bias: Bias | None = None,
) -> Part:
    """Attention of a row's queries to its groups, a part for `merge_parts`.

        y_t = softmax_g(scale q_t . k_g) v_g  over groups that lie in the pattern's range

    keys_values: (k, v) [B G K H] of `groups`, which stand at the positions of their last tokens.
    The pattern's range begins and ends on multiples of the groups' size. `length` queries at a time
    read the few groups that may be within their range: the cost does not grow with the row's.

    Source: Rae et al. 2020, algorithm 1, https://arxiv.org/abs/1911.05507
    """
    (B, T, N, H), size = q.shape, groups.x.shape[2]
    if groups.x.shape[1] == 0:
        return jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    near, exists = _near(groups, pattern, T, size, aligned)
    n, R = near.shape[1:]

    def pick(x: Array) -> Array:
        index = near.reshape(B, n * R, *(1 for _ in x.shape[2:]))
        return jnp.take_along_axis(x, index, axis=1).reshape(B * n, R, *x.shape[2:])

    def cut(x: Array, padding: int = 0) -> Array:
        x = pad_time(x, n * pattern.length, padding)
        return x.reshape(B * n, pattern.length, *x.shape[2:])

    k, v = (pick(x) for x in keys_values)
    y, log_sum = attention_parts(
        cut(q),
        k,
        v,
        pattern=pattern,
        q_positions=cut(positions, -1),
        k_positions=jnp.where(exists.reshape(B * n, R), pick(groups.positions), -1),
        q_segments=cut(segments),
        k_segments=pick(groups.segments),
        bias=bias,
    )
    return y.reshape(B, -1, N, H)[:, :T], log_sum.reshape(B, -1, N)[:, :T]


def _near(
    groups: Groups, pattern: FromSegment, T: int, size: int, aligned: bool
) -> tuple[Int[Array, "B n R"], Array]:
    """For each `length` tokens of a row, the groups in their reach, and which of these exist.

    Groups stand `size` live tokens apart at least. So of those that end among the block's own
    tokens there are `length / size` at most, and of the first token's document, from its range's
    beginning to itself, `(length - 1 - low) / size`.
    """
    B, count = groups.positions.shape
    block = np.arange(0, T, pattern.length)
    R = slots_in_reach(pattern, size, aligned)
    if aligned:
        first = jnp.broadcast_to((block + pattern.low)[None] // size, (B, block.size))
    else:
        before = (groups.index[:, None, :] < jnp.asarray(block)[None, :, None]).sum(axis=-1)
        first = before + pattern.length // size - R
    near = first[..., None] + jnp.arange(R)[None, None]
    return jnp.clip(near, 0, count - 1), (near >= 0) & (near < count)


def cache_parts(
    cache: Cache,
    q: Float[Array, "B T N H"],
    *,
    pattern: Pattern,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    bias: Bias | None = None,
) -> Part:
    """`cache.read_cache` as a part for `merge_parts`.

    Source: as `read_cache`.
    """
    return attention_parts(
        q,
        *keys_values(cache),
        pattern=pattern,
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segments,
        k_segments=cache.segments,
        bias=bias,
    )


def reconstruction_loss(
    q: Float[Array, "B T N H"],
    memory: KeysValues,
    compressed: SlotKeysValues,
    groups: Groups,
    *,
    pattern: Compressive,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
) -> Float[Array, ""]:
    """How much attention changes when what leaves the memory is compressed; a sum over tokens.

        sum_t mean_nh (attention(q_t, m) - attention(q_t, f(m)))^2

    m are the `length` oldest positions of the memory and f(m) their groups. Queries, keys and
    values are of contents alone (no positions), without gradients but through f.

    Source: Rae et al. 2020, section 3.2 and algorithm 2, https://arxiv.org/abs/1911.05507, whose
    norm we take squared and by the mean, as is usual.
    """
    wanted = attention(
        q,
        *memory,
        pattern=pattern.leaving,
        q_positions=positions,
        k_positions=positions,
        q_segments=segments,
        k_segments=segments,
        aligned=aligned,
        ordered=True,
    )
    found, _ = grouped_parts(
        q,
        compressed,
        groups,
        pattern=pattern.leaving,
        positions=positions,
        segments=segments,
        aligned=aligned,
    )
    error = (found.astype(jnp.float32) - jax.lax.stop_gradient(wanted.astype(jnp.float32))) ** 2
    return jnp.where(positions >= 0, error.mean(axis=(2, 3)), 0).sum()


class Tail(NamedTuple):
    """The last live tokens of a row, which groups may yet be made of; positions of -1 for none.

    x: [B C D] (one less than a group's size). positions, segments: int32 [B C].
    """

    x: Any
    positions: Any
    segments: Any


def empty_tail(batch: int, size: int, width: int, dtype: Any) -> Tail:
    """The tail of rows of which nothing was read, for groups of `size`.

    Source: our own.
    """
    none = jnp.full((batch, size - 1), -1, jnp.int32)
    return Tail(jnp.zeros((batch, size - 1, width), dtype), none, none)


def append(
    tail: Tail,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
) -> tuple[Tail, Groups]:
    """Reads a piece of each row: the new tail, and the groups that the piece makes whole.

    Source: our own; any split of a text into pieces makes the groups that the whole text has.
    """
    size = tail.x.shape[1] + 1
    parts = zip(tail, (x.astype(tail.x.dtype), positions, segments), strict=True)
    x, positions, segments = (jnp.concatenate(pair, axis=1) for pair in parts)
    groups = whole_groups(x, positions, segments, size)
    live = (positions >= 0).sum(axis=1, keepdims=True)
    last = live - size + 1 + jnp.arange(size - 1)[None]
    index = jnp.take_along_axis(live_first(positions)[0], jnp.maximum(last, 0), axis=1)
    return (
        Tail(
            jnp.take_along_axis(x, index[..., None], axis=1),
            jnp.where(last >= 0, jnp.take_along_axis(positions, index, axis=1), -1),
            jnp.take_along_axis(segments, index, axis=1),
        ),
        groups,
    )


def slot_reads(pattern: Compressive, T: int) -> int:
    """Pairs of a query and a slot that it reads, in a row of T tokens and one document.

    Source: our own count.
    """
    whole = np.maximum(np.arange(T) // pattern.length * pattern.length - pattern.memory, 0)
    return int(np.minimum(whole // pattern.rate, pattern.slots).sum())


def slots_in_reach(pattern: FromSegment, size: int, aligned: bool) -> int:
    """Groups that `grouped_parts` computes for each query.

    Source: our own count; see `_near`.
    """
    if aligned:
        return (pattern.high - pattern.low) // size
    return (pattern.length - 1 - pattern.low) // size + pattern.length // size
