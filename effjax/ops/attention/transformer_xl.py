"""Segment recurrence: attention to one's own segment of a text and to a memory of those before.

A position belongs to the segment `position // length`, so packed documents and padding need nothing
special, and a text may be fed in pieces that end anywhere.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.engine import attention_parts
from effjax.ops.attention.merge import merge_parts
from effjax.ops.attention.patterns import (
    Causal,
    Composed,
    Elementwise,
    Pattern,
    block_edges,
    require_distances,
)


@dataclass(frozen=True)
class FromSegment(Pattern):
    """A query reads a range that is fixed from where its own segment starts.

        start = q // length * length;   start + low <= k < start + high

    Source: our own; the ranges are those of Dai et al. 2019, Transformer-XL, section 3.2,
    https://arxiv.org/abs/1901.02860
    """

    length: int
    low: int
    high: int

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.high <= 1

    def allowed(self, q_pos: Elementwise, k_pos: Elementwise, head: Elementwise) -> Elementwise:
        start = q_pos // self.length * self.length
        return (k_pos >= start + self.low) & (k_pos < start + self.high)

    def blocks(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        first, last, k_first, k_last = self._edges(T, S, size, offset)
        return ((k_last >= first + self.low) & (k_first < last + self.high))[None]

    def whole(self, T: int, S: int, size: int, offset: int = 0) -> np.ndarray:
        first, last, k_first, k_last = self._edges(T, S, size, offset)
        return ((k_first >= last + self.low) & (k_last < first + self.high))[None]

    def _edges(self, T: int, S: int, size: int, offset: int) -> tuple[np.ndarray, ...]:
        """Where the segments of a block's first and last query start, and the edges of keys."""
        q_first, q_last, k_first, k_last = block_edges(T, S, size, offset)
        return *(q // self.length * self.length for q in (q_first, q_last)), k_first, k_last

    def span(self) -> int | None:
        return self.length - self.low


@dataclass(frozen=True)
class TransformerXL(Composed):
    """A query reads its own segment and the `memory` positions before it.

        start = q // length * length;   start - memory <= k < start + length

    length: positions in a segment. memory: positions before the segment, whatever segments they
    are of; nothing that is learned below the keys and values is learned through them
    (`segment_recurrence`). sinusoids: features of the paper's own relative positions, an even
    number (`relative_queries`; the paper has the model's width); with 0, positions are the
    config's scheme.

    Raises ConfigError for a length that is not positive, a memory that is negative, and an odd
    number of sinusoids.

    Source: Dai et al. 2019, Transformer-XL, section 3.2, https://arxiv.org/abs/1901.02860, where
    all of the memory is read by every query of the segment, as here.
    """

    length: int = 64
    memory: int = 64
    sinusoids: int = 0

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length")
        require_finite(self, "memory", low=0)
        require_distances(self, length=self.length, memory=self.memory)
        require_finite(self, "sinusoids", low=0)
        if self.sinusoids % 2:
            owner = type(self).__name__
            raise ConfigError(f"{owner}.sinusoids must be even, got {self.sinusoids}")

    @property
    def own(self) -> Pattern:
        """The part that is learned through."""
        return FromSegment(self.length, 0, self.length)

    @property
    def past(self) -> Pattern:
        """The part that is memory."""
        return FromSegment(self.length, -self.memory, 0)

    def made_of(self) -> Pattern:
        return FromSegment(self.length, -self.memory, self.length)


KeysValues = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]
Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]


def segment_recurrence_parts(
    q: Float[Array, "B T N H"],
    own: KeysValues,
    past: KeysValues,
    *,
    pattern: TransformerXL,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    bias: Bias | None = None,
    block: int | None = None,
) -> list[Part]:
    """The two parts of `segment_recurrence`, for what else a query may read to be merged with.

    Source: as `segment_recurrence`.
    """
    reads = [(pattern.own & Causal(), own)]
    if pattern.memory:
        reads.append((pattern.past, past))
    return [
        attention_parts(
            q,
            k,
            v,
            pattern=part,
            q_positions=positions,
            k_positions=positions,
            q_segments=segments,
            k_segments=segments,
            aligned=aligned,
            ordered=True,
            bias=bias,
            block=block,
        )
        for part, (k, v) in reads
    ]


def segment_recurrence(
    q: Float[Array, "B T N H"],
    own: KeysValues,
    past: KeysValues,
    *,
    pattern: TransformerXL,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    aligned: bool = False,
    bias: Bias | None = None,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention over a row of segments, each of which remembers those before it.

        y_t = softmax(scale [q_t . k_s  for own s;  q_t . k'_s  for past s]) [v_s; v'_s]

    own = (k, v), projected from x, is what a query reads of its own segment, no later than itself;
    past = (k', v'), the same numbers projected from stop_gradient(x), is what it reads of the
    `memory` positions before. So the projections learn from all keys, and x from its own segment
    only: the numbers are one attention's, the derivatives those of segments fed one by one.

    Positions, segments, aligned, bias and block are as in `engine.attention`; rows are `ordered`.

    Source: Dai et al. 2019, Transformer-XL, section 3.2, https://arxiv.org/abs/1901.02860: SG is on
    the hidden states, of which W_k and W_v see both. Positions are the caller's, in q, k and bias.
    """
    parts = segment_recurrence_parts(
        q,
        own,
        past,
        pattern=pattern,
        positions=positions,
        segments=segments,
        aligned=aligned,
        bias=bias,
        block=block,
    )
    return merge_parts(parts)


def relative_queries(
    q: Float[Array, "B T N H"],
    a: Float[Array, "B T N F"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N E"]:
    """Queries of H + F numbers, whose products with `relative_keys` know the distance.

        q'_t . k'_s = q_t . k_s + a_t . R(t - s);   R(d) = [sin(w d), cos(w d)]

    By the sums of angles, `sin w(t - s)` and `cos w(t - s)` are products of one factor of t with
    one of s, so a distance needs no table and no shifted scores, and keys are cached as they are.
    a = W_r^T (q + v) in the paper's terms, q = q + u. Scaled for H, as the paper's are, where the
    engine scales for H + F.

    Source: Dai et al. 2019, Transformer-XL, section 3.3 and appendix B,
    https://arxiv.org/abs/1901.02860; the factors in place of its shift are ours.
    """
    H, F = q.shape[-1], a.shape[-1]
    angle = _angles(positions, F)[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = a[..., : F // 2], a[..., F // 2 :]
    turned = [first * sin + second * cos, second * sin - first * cos]
    wide = jnp.concatenate([q, *(x.astype(q.dtype) for x in turned)], axis=-1)
    return wide * ((H + F) / H) ** 0.5


def relative_keys(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"], F: int
) -> tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """Keys and values of H + F numbers, for `relative_queries`: the values' last F are zeros.

        k'_s = [k_s, cos(w s), sin(w s)],  w_i = 10000^(-2 i / F)

    Source: as `relative_queries`
    """
    angle = _angles(positions, F)[:, :, None]
    places = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1).astype(k.dtype)
    places = jnp.broadcast_to(places, (*k.shape[:3], F))
    return (
        jnp.concatenate([k, places], axis=-1),
        jnp.concatenate([v, jnp.zeros((*v.shape[:3], F), v.dtype)], axis=-1),
    )


def _angles(positions: Array, F: int) -> Array:
    """w s [B T F/2], in float32 at least."""
    w = 10_000.0 ** (-np.arange(0, F, 2) / F)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(float))
    return positions[..., None].astype(dtype) * jnp.asarray(w, dtype)[None, None]
